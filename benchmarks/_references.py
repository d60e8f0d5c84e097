"""Other authors' rules for keeping fewer experts, as references: what a layer did with some tokens goes in, what its
experts become comes out.

- :func:`frequency`, :func:`reap` -- experts are dropped,
- :func:`ream`, :func:`hc_smoe`, :func:`m_smoe` -- experts are merged,
- :func:`observe` makes a layer's :class:`Seen`, :func:`in_force` puts the :class:`Fewer` of all layers into a model,
- :func:`rest` and :func:`lifted`: some experts are tuned, a rule is asked about the others.

The definitions are from the papers and, where these leave something open, from their authors' programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlib.merging import match_neurons
from fluxlib.methods.local import customized
from fluxlib.moe import find, mask
from fluxlib.moe.compact import CompactExperts, LayerPlan
from fluxlib.moe.expert import Activation, to_matrices

REAM_GROUP = 16
"""Largest group of REAM as its authors ran it, on 128 experts and more."""

RIDGE = 0.1
"""Penalty on the change of a down projection, as a share of the mean square of its inputs."""


@dataclass(frozen=True)
class Seen:
    """What one layer did with N tokens: E experts of I neurons, hidden size H.

    Attributes:
        hidden: ``[N, H]`` that reach the layer.
        added: ``[N]`` squared length of the experts' output, as a share of that of the hidden state behind the layer.
        logits: ``[N, E]`` of the router.
        gates: ``[N, E]`` weight of each expert in the layer's output, 0 where it was not chosen.
        neurons: ``[E, N, I]`` activations of every expert on every token, whoever was chosen.
        outputs: ``[E, N, H]`` likewise what they give, without the gate.
        experts: each expert's tensors, in ``layout``.
    """

    hidden: Tensor
    added: Tensor
    logits: Tensor
    gates: Tensor
    neurons: Tensor
    outputs: Tensor
    experts: Sequence[Mapping[str, Tensor]]
    layout: find.Layout

    @property
    def used(self) -> Tensor:
        """``[E]`` share of the choices."""
        chosen = (self.gates > 0).sum(dim=0)
        return chosen / chosen.sum()


@dataclass(frozen=True)
class Fewer:
    """What becomes of a layer's experts.

    Attributes:
        plan: Its groups are the experts that are left; a dropped expert has weight 0 in some group.
        routed: Experts that the router may still choose; a token's gate weights are renormalised to the sum that they
            had. None: the router is tied: it chooses as before, and what stands for its choice answers.
        fit_to: Groups' down projections are fitted to what the members did here (:data:`RIDGE`). None: they are means.
    """

    plan: LayerPlan
    routed: tuple[int, ...] | None = None
    fit_to: Seen | None = None


def frequency(seen: Seen, kept: int) -> Fewer:
    """The most used experts stay. The router chooses among these."""
    return _drop(seen.used, kept)


def reap(seen: Seen, kept: int) -> Fewer:
    """Router-weighted expert activation pruning (arXiv 2510.13999, equation 9). The router chooses among those kept."""
    return _drop(saliency(seen), kept)


def saliency(seen: Seen) -> Tensor:
    """``[E]`` mean of gate weight times length of the output, over the tokens that chose the expert (equation 9)."""
    size = seen.gates * seen.outputs.norm(dim=2).T
    return size.sum(dim=0) / (seen.gates > 0).sum(dim=0).clamp(min=1)


def ream(seen: Seen, kept: int, group_size: int = REAM_GROUP, tied: bool = False) -> Fewer:
    """Router-weighted expert activation merging (arXiv 2604.04356, equations 5 to 8), of one layer.

    The experts of highest saliency are centres. The first takes the experts that are most like it until its group has
    ``group_size`` members, then the second, and so on, so that most centres stay as they are. Members' neurons are
    matched to the centre's by activations and weights; the merged expert is their mean, weighted by saliency. Layers
    go first to last, each seen behind merged ones. The router keeps the centres' rows alone (not if ``tied``).

    Two experts are alike by the mean of two cosines (0 to 1): of their router logits, and of their gated outputs,
    averaged over the tokens first, as in the authors' program: cosines token by token would not depend on the gates.
    Deviation: the weights are compared as they are, not by 64 principal components.

    Raises:
        ValueError: groups too small to hold every expert.
    """
    num_experts = len(seen.experts)
    if kept * group_size < num_experts:
        raise ValueError(f"group_size must be at least {-(-num_experts // kept)} for {kept} groups, got {group_size}")
    salient = saliency(seen)
    salient = salient.where(salient > 0, salient[salient > 0].min())
    gated = F.normalize((seen.logits.softmax(dim=1).T[:, :, None] * seen.outputs).mean(dim=1), dim=1)
    routed = F.normalize(seen.logits.T, dim=1)
    apart = torch.cdist(routed, routed)
    alike = ((gated @ gated.T + 1) / 2 + 1 - apart / apart.max()) / 2
    order = salient.argsort(descending=True, stable=True).tolist()
    centres, rest = order[:kept], set(order[kept:])
    groups = []
    for centre in centres:
        nearest = sorted(rest, key=lambda e, centre=centre: -float(alike[centre, e]))[: group_size - 1]
        groups.append((centre, *nearest))
        rest -= set(nearest)
    orders = [(None, *(_matched(seen, group[0], e) for e in group[1:])) for group in groups]
    return Fewer(grouped(groups, salient, orders), None if tied else tuple(centres))


def _matched(seen: Seen, centre: int, other: int) -> Tensor:
    """Order of the other expert's neurons: least distance of activations plus that of weights, both of length 1."""
    cost = torch.zeros(())
    for rows in (lambda e: seen.neurons[e].T, lambda e: find.neurons(seen.experts[e], seen.layout)):
        cost = cost + torch.cdist(F.normalize(rows(centre), dim=1), F.normalize(rows(other), dim=1))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def hc_smoe(seen: Seen, kept: int) -> Fewer:
    """HC-SMoE (arXiv 2410.08589): hierarchical clusters of the experts' mean outputs over all tokens.

    Euclidean distance, average linkage; a cluster becomes the mean of its members, weighted by how often they are
    chosen. The router is tied.
    """
    labels = cut_tree(linkage(seen.outputs.mean(dim=1).numpy(), "average"), n_clusters=kept).flatten()
    groups = [tuple((labels == cluster).nonzero()[0].tolist()) for cluster in range(kept)]
    return Fewer(grouped(groups, seen.used))


def m_smoe(seen: Sequence[Seen], kept: int) -> list[Fewer]:
    """M-SMoE (arXiv 2310.01334), for all layers: ``kept`` is the mean number of experts of a layer.

    Neurons of a layer's experts are matched to those of its first, by weights. Dominant are the experts that are chosen
    most often in the whole model, at least one of each layer; each other expert joins the dominant one whose router
    logits are most like its own (cosine over the tokens). A group becomes the mean of its members, weighted by how
    often they are chosen. The router is tied.
    """
    used = [layer.used for layer in seen]
    first = torch.cat([share.index_fill(0, share.argmax(), 1.0) for share in used])
    dominant = torch.zeros_like(first, dtype=torch.bool)
    dominant[first.argsort(descending=True, stable=True)[: kept * len(seen)]] = True
    found = []
    for layer, share, heads in zip(seen, used, dominant.split([len(share) for share in used]), strict=True):
        logits, leaders = F.normalize(layer.logits.T, dim=1), heads.nonzero().flatten()
        joined = leaders[(logits @ logits[leaders].T).argmax(dim=1)]
        joined[leaders] = leaders
        groups = [tuple((joined == leader).nonzero().flatten().tolist()) for leader in leaders]
        orders = [tuple(match_neurons(layer.experts[0], layer.experts[e], layer.layout) for e in g) for g in groups]
        found.append(Fewer(grouped(groups, share, orders)))
    return found


def _drop(value: Tensor, kept: int) -> Fewer:
    """The ``kept`` experts of highest value alone."""
    order = value.argsort(descending=True, stable=True).tolist()
    stay, gone = sorted(order[:kept]), order[kept:]
    groups = [(stay[0], *gone), *((expert,) for expert in stay[1:])]
    return Fewer(grouped(groups, torch.zeros(len(value)).index_fill(0, torch.tensor(stay), 1.0)), tuple(stay))


def grouped(groups: Sequence[tuple[int, ...]], weight: Tensor, orders: Sequence[tuple] | None = None) -> LayerPlan:
    """Groups of experts with their shares of ``weight [E]``."""
    weights = tuple(tuple(weight[list(group)].tolist()) for group in groups)
    return LayerPlan(groups=tuple(groups), weights=weights, permutations=None if orders is None else tuple(orders))


def rest(seen: Seen, tuned: Tensor) -> Seen:
    """The layer without the experts of the mask ``tuned [E]``."""
    others = (~tuned).nonzero().flatten()
    return replace(
        seen, logits=seen.logits[:, others], gates=seen.gates[:, others], neurons=seen.neurons[others],
        outputs=seen.outputs[others], experts=[seen.experts[expert] for expert in others.tolist()],
    )  # fmt: skip


def lifted(fewer: Fewer, tuned: Tensor) -> Fewer:
    """What was said of the :func:`rest`, said of the layer: the ``tuned`` experts have slots of their own."""
    stay, others = tuple(tuned.nonzero().flatten().tolist()), (~tuned).nonzero().flatten()
    groups = tuple(tuple(others[list(group)].tolist()) for group in fewer.plan.groups)
    routed = None if fewer.routed is None else (*stay, *others[list(fewer.routed)].tolist())
    return replace(fewer, plan=replace(fewer.plan, tuned=stay, groups=groups), routed=routed)


@torch.no_grad()
def observe(model: nn.Module, layers: Sequence[find.MoELayer], batches: Sequence[Mapping[str, Tensor]]) -> list[Seen]:
    """What some layers' own experts do with the tokens of ``batches`` that reach them; padding is left out."""
    heard: list[list[tuple[Tensor, ...]]] = [[] for _ in layers]
    with ExitStack() as stack:
        for layer, parts in zip(layers, heard, strict=True):
            decoder, place = find.decoder_layers(model, layer)
            stack.callback(mask.find_router(layer).register_forward_hook(partial(_hear, parts)).remove)
            stack.callback(decoder[place].register_forward_hook(partial(_hear_stream, parts)).remove)
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    real = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches])
    return [
        _seen(layer, *(torch.cat(part)[real] for part in zip(*parts, strict=True)))
        for layer, parts in zip(layers, heard, strict=True)
    ]


def _hear(parts: list, _router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    parts.append((args[0].flatten(0, -2), *output))


def _hear_stream(parts: list, _decoder: nn.Module, _args: Any, output: Any) -> None:
    stream = output[0] if isinstance(output, tuple) else output
    parts[-1] = (*parts[-1], stream.flatten(0, -2))


def _seen(layer: find.MoELayer, hidden: Tensor, logits: Tensor, weights: Tensor, index: Tensor, stream: Tensor) -> Seen:
    layout, activation = find.read_layout(layer.experts), Activation(layer.experts)
    experts = [find.expert_tensors(layer.experts, e) for e in range(layer.num_experts)]
    matrices = [to_matrices(tensors, layout, hidden.dtype) for tensors in experts]
    neurons = torch.stack([activation.forward(hidden @ each.up) for each in matrices])
    outputs = neurons @ torch.stack([each.down for each in matrices])
    gates = torch.zeros_like(logits).scatter(1, index, weights)
    added = (torch.einsum("ne,enh->nh", gates, outputs).norm(dim=1) / stream.norm(dim=1)).square()
    return Seen(hidden, added, logits, gates, neurons, outputs, experts, layout)


@contextmanager
def in_force(model: nn.Module, fewer: Sequence[Fewer]) -> Iterator[None]:
    """The model with what each layer's experts became; afterwards it is what it was."""
    with customized(model, [each.plan for each in fewer]) as compact, ExitStack() as stack:
        for layer, experts, each in zip(find.layers(model), compact, fewer, strict=True):
            if each.routed is not None:
                choose = partial(_choose, torch.tensor(each.routed))
                stack.callback(mask.find_router(layer).register_forward_hook(choose).remove)
            if each.fit_to is not None:
                _fit(experts, each.fit_to)
        yield


def _choose(routed: Tensor, _router: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The router's answer with some experts alone; both mini models give a token's weights a fixed sum, which stays."""
    logits, weights, _ = output
    best, place = logits[:, routed].topk(min(weights.shape[1], len(routed)), dim=1)
    return logits, best.softmax(dim=1) * weights.sum(dim=1, keepdim=True), routed[place]


@torch.no_grad()
def _fit(experts: CompactExperts, seen: Seen) -> None:
    """Add to each group's down projection what its mean leaves of the members' joint output, by ridge regression."""
    for group in experts.plan.groups:
        gates = seen.gates[:, list(group)]
        tokens = gates.sum(dim=1) > 0
        if len(group) == 1 or not tokens.any():
            continue
        merged = to_matrices(experts.expert_tensors(group[0]), seen.layout, seen.hidden.dtype)
        neurons = experts.activation.forward(seen.hidden[tokens] @ merged.up) * gates[tokens].sum(dim=1, keepdim=True)
        wanted = torch.einsum("ne,enh->nh", gates[tokens], seen.outputs[list(group)][:, tokens])
        products = neurons.T @ neurons
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        change = torch.linalg.solve(products, neurons.T @ (wanted - neurons @ merged.down))
        merged.down.add_(change)  # a view of the slot


def one_by_one(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], rules: Sequence[Callable[[Seen], Fewer]]
) -> list[Fewer]:
    """One rule per layer, carried out first to last, each layer seen behind those that are done."""
    layers = find.layers(model)
    done = [Fewer(LayerPlan(tuned=tuple(range(layer.num_experts)))) for layer in layers]
    for place, (layer, rule) in enumerate(zip(layers, rules, strict=True)):
        with in_force(model, done):
            (seen,) = observe(model, [layer], batches)
        done[place] = rule(seen)
    return done
