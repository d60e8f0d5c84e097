"""Which devices take part, what fits on them, and how long a round would take them.

- :mod:`fluxlib.devices.catalogue` -- devices, links and fleets, with the source of each number
- :mod:`fluxlib.devices.clock` -- seconds per phase and per round, from rooflines, the bus and the link
- :mod:`fluxlib.devices.memory` -- peak memory per method, and memory turned into budgets, from a
  :mod:`~fluxlib.devices.dry_run` of one layer of each make
- :mod:`fluxlib.devices.memory_tracker` -- what is alive and when, measured or dry
"""
