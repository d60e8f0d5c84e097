"""Which devices take part, what fits on them, and how long a round would take them.

- :mod:`fluxlib.devices.catalogue` -- devices, links and fleets, with the source of each number
- :mod:`fluxlib.devices.clock` -- seconds per phase and per round, from rooflines, the bus and the link
- :mod:`fluxlib.devices.memory` -- peak memory per method; memory turned into budgets
"""
