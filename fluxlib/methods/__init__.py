"""What one participant does in one round: FLUX and its baselines, all of one type.

To add a method, write a file with a :class:`~fluxlib.methods.base.Method` and name it in :data:`REGISTERED`; see
``docs/add-a-method.md``.
"""

from __future__ import annotations

from fluxlib.methods import flux, flux_plus, fmd, fmes, fmq
from fluxlib.methods.base import Method

REGISTERED = (flux.METHOD, flux_plus.METHOD, fmd.METHOD, fmq.METHOD, fmes.METHOD)
METHODS: dict[str, Method] = {method.name: method for method in REGISTERED}


def get(name: str) -> Method:
    """The method called ``name``; ValueError lists the names that exist."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, allowed are {', '.join(METHODS)}")
    return METHODS[name]
