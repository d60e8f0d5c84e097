"""The seam: everything that touches a model's experts.

- :mod:`~fluxlib.moe.find` -- find the experts of a model, read and write one of them,
- :mod:`~fluxlib.moe.replace` -- another module in the experts' place, and the originals back,
- :mod:`~fluxlib.moe.compact` -- a participant's customised layer: tuned, merged and dropped experts,
- :mod:`~fluxlib.moe.quantized` -- experts at rest in 2, 3, 4 or 8 bits,
- :mod:`~fluxlib.moe.offloaded` -- experts in host memory, a few of them on the device,
- :mod:`~fluxlib.moe.mask` -- dropped experts leave the top-k,
- :mod:`~fluxlib.moe.capture` -- what was routed where, and how much attention it received,
- :mod:`~fluxlib.moe.dispatch` -- a token's way, from the router's choices to the experts' outputs,
- :mod:`~fluxlib.moe.expert`, :mod:`~fluxlib.moe.product` -- one expert's arithmetic, and the fast matrix product.

The router never changes and never learns: top-k is over the original experts, then indices are mapped.
"""
