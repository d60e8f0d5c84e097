"""FMQ: every expert is held and tuned in few bits.

The whole model fits because its experts are quantised. Forward and backward passes go through the quantised weights;
the gradient of a dequantised weight is taken for that of the weight (straight-through). A step dequantises an expert,
moves it, and quantises it anew: there is no copy of higher precision, so a movement of less than half a level's width
is lost, and what is not lost is rounded. That error, adding up, is what the paper holds against the baseline.

What travels: participants quantise what they download, which the server could do for them, so codes and scales are
enough in both directions. A participant reports the difference of its dequantised experts after and before its steps.
The server adds the mean difference to its own weights in full precision and is evaluated with those: the rounding of
what nobody tuned does not enter the model. The device clock charges the codes; the bytes in the tables are those that
this process sent, of full-precision tensors with the same content.

With low-rank adapters (QLoRA) the experts stay in few bits and their B's learn, in 32: no step is lost. Each round
begins with the server's weights quantised anew; what travels are the B's.

Paper: section 5 of its set-up, "expert parameters quantized to INT4 so that the whole model fits, then fine-tuned".
Deviation: 16 levels best for normal weights (:mod:`fluxlib.moe.packing`), with half the error of evenly spaced ones;
the optimizer's state, for which nothing is said, is kept in 32 bits, and on the host where it does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fluxlib.config import RunConfig
from fluxlib.methods import fmd
from fluxlib.methods.base import ExpertKey, LocalRound, Method, ParticipantState, Update
from fluxlib.methods.local import Stopwatch, make_optimizer, report, run_steps, tune
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.packing import SCALE_BITS
from fluxlib.moe.product import wide_dtype
from fluxlib.moe.quantized import QuantizedExperts, quantize
from fluxlib.moe.replace import restoring


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Quantise, then local steps: on all experts, each quantised again after every step, or on their adapters."""
    bits = local.config.training.fmq_bits
    if bits == 16:
        return fmd.train(model, local)
    watch, adapter = Stopwatch(), Adapter.of(local.config)
    with ExitStack() as held:
        with watch.phase("quantize"):
            held.enter_context(restoring(quantize(model, bits, adapter)))
        with watch.phase("train"):
            experts: list[Any] = [layer.experts for layer in find.layers(model)]
            if adapter:
                tuned = tune(model, experts, local.data.train, local.config)
            else:
                tuned = run_steps(model, QuantizedLearner(experts, local.config), local.data.train, local.config)
    coded: dict[str, Any] = {} if adapter else {"download_bits": bits + SCALE_BITS, "upload_bits": bits + SCALE_BITS}
    update = report(
        local,
        tuned,
        watch,
        num_quantized=local.roles.exploit.numel(),
        profile_bits=bits,
        weight_bits=bits,
        offloaded=True,
        **coded,
    )
    return update, local.state


class QuantizedLearner:
    """All experts of quantised layers, each with an optimizer's state and no weights but the quantised ones.

    An expert that saw no token in a step keeps its codes. Between steps only codes, scales and the optimizer's state
    are held.
    """

    def __init__(self, experts: Sequence[QuantizedExperts], config: RunConfig) -> None:
        self.experts = experts
        self.before = [copy.deepcopy(layer.packed) for layer in experts]
        self.parameters: dict[ExpertKey, dict[str, nn.Parameter]] = {
            (index, expert): {
                name: nn.Parameter(torch.empty(0, dtype=wide_dtype(packed.dtype), device=packed.codes.device))
                for name, packed in layer.packed.items()
            }
            for index, layer in enumerate(experts)
            for expert in range(layer.num_experts)
        }
        self.optimizer = make_optimizer([p for held in self.parameters.values() for p in held.values()], config)
        for layer in experts:
            layer.collects_gradients = True

    @torch.no_grad()
    def step(self) -> Tensor:
        """Dequantise, step, quantise anew, small experts together, large ones one by one; nobody asks for norms."""
        for index, layer in enumerate(self.experts):
            moved = [n for n in range(layer.num_experts) if any(bool(g.any()) for g in layer.grads(n).values())]
            for first in range(0, len(moved), layer.at_once):
                self._step(index, moved[first : first + layer.at_once])
            layer.zero_grad()
        return torch.full((len(self.experts), self.experts[0].num_experts), float("nan"))

    def _step(self, index: int, experts: list[int]) -> None:
        layer = self.experts[index]
        held, weights = [self.parameters[index, expert] for expert in experts], layer.at_rest(experts)
        for place, (expert, parameters) in enumerate(zip(experts, held, strict=True)):
            for name, gradient in layer.grads(expert).items():
                weight = weights[name][place]
                parameters[name].data, parameters[name].grad = weight, gradient.to(weight)
        self.optimizer.step()  # those without a gradient are left as they are
        layer.requantize(experts, weights)
        for parameter in (p for parameters in held for p in parameters.values()):
            parameter.data, parameter.grad = parameter.data.new_empty(0), None

    def changes(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """Dequantised weights after the steps minus those before them."""
        return {
            (index, expert): {
                name: weight - self.before[index][name].read(expert, weight.dtype)
                for name, weight in self.experts[index].expert_tensors(expert).items()
            }
            for index, expert in self.parameters
        }


METHOD = Method("fmq", "FMQ (experts in 4 bit)", fmd.assign, train, profiles=False)
