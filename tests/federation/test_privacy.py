"""Clipping, noise and their account; and why Flower's own mods cannot do it for some experts of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

from fluxlib import federation, seeding
from fluxlib.config import ConfigError, RunConfig, make_config
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app
from fluxlib.federation.protocol import privacy
from fluxlib.federation.protocol.privacy import Guard, moved_bound

Make = Callable[..., RunConfig]

CHANGES = {(0, 1): {"w": torch.tensor([3.0, 0.0])}, (1, 2): {"w": torch.tensor([0.0, 4.0])}}


def test_the_norm_is_of_all_experts_together() -> None:
    assert privacy.norm(CHANGES) == 5.0 and privacy.norm({}) == 0.0
    clipped, within = privacy.clip(CHANGES, 2.5)
    assert not within and clipped[0, 1]["w"].tolist() == [1.5, 0.0] and clipped[1, 2]["w"].tolist() == [0.0, 2.0]
    same, within = privacy.clip(CHANGES, 5.0)
    assert within and same[0, 1]["w"] is CHANGES[0, 1]["w"]


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    zeros = {(0, 0): {"w": torch.zeros(20_000)}}
    noisy = privacy.add_noise(zeros, 0.5, seeding.generator(0, "noise"))[0, 0]["w"]
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.03) and abs(float(noisy.mean())) < 0.02


def test_an_adaptive_bound_moves_towards_its_quantile() -> None:
    assert moved_bound(1.0, 1.0, 0.5) == pytest.approx(math.exp(-0.1))
    assert moved_bound(1.0, 0.0, 0.5) == pytest.approx(math.exp(0.1))
    norms, bound = torch.linspace(1, 3, 21), 1.0
    for _ in range(200):
        bound = moved_bound(bound, float((norms <= bound).float().mean()), 0.5)
    assert bound == pytest.approx(2.0, abs=0.15)


def test_what_rounds_cost() -> None:
    assert privacy.spent_epsilon(0, 5) == math.inf
    assert privacy.spent_epsilon(1.0, 1, 1e-5) == pytest.approx(0.5 + 2 * math.sqrt(0.5 * math.log(1e5)))
    orders = torch.linspace(1.001, 200, 100_000, dtype=torch.float64)
    by_search = (10 * orders / (2 * 4.0) + math.log(1e6) / (orders - 1)).min()
    assert privacy.spent_epsilon(2.0, 10, 1e-6) == pytest.approx(float(by_search), rel=1e-4)


def test_central_noise_is_on_the_sum_so_more_tuners_dilute_it() -> None:
    guard = Guard(make_config({"privacy.clip_norm": 2.0, "privacy.noise_multiplier": 0.5}))
    zeros = {(0, e): {"w": torch.zeros(20_000)} for e in (0, 1)}
    noisy = guard.finish(1, zeros, lambda key: 1 + 3 * key[1], 4)
    assert [float(noisy[0, e]["w"].std()) for e in (0, 1)] == pytest.approx([1.0, 0.25], rel=0.03)


def test_the_server_clips_what_a_participant_did_not() -> None:
    changes, weights = Guard(make_config({"privacy.clip_norm": 2.5})).admit(CHANGES, torch.full((2, 4), 7.0), None)
    assert privacy.norm(changes) == pytest.approx(2.5) and (weights == 7).all()
    _, weights = Guard(make_config({"privacy.clip_norm": 2.5, "privacy.noise_multiplier": 1})).admit(
        CHANGES, torch.full((2, 4), 7.0), None
    )
    assert (weights == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"privacy.noise_multiplier": 1.0}, "privacy.noise_multiplier is set and privacy.clip_norm is not"),
        ({"privacy.clip_quantile": 0.5}, "privacy.clip_quantile is set and privacy.clip_norm is not"),
        (
            {"privacy.noise_multiplier": 1.0, "privacy.clip_norm": 1.0, "aggregation.rule": "median"},
            "allowed with noise on the server",
        ),
        (
            {"privacy.noise_multiplier": 0.5, "privacy.clip_norm": 1.0, "privacy.clip_quantile": 0.5},
            r"privacy.clip_quantile is 0.5, allowed with noise is None",
        ),
        ({"privacy.withhold_reports": True}, "allowed with privacy.withhold_reports is 'random'"),
        ({"aggregation.trim_frac": 0.5}, "aggregation.trim_frac: Input should be less than 0.5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(options)


@pytest.mark.parametrize(
    "options",
    [
        {"privacy.clip_norm": 0.05},
        {"privacy.clip_norm": 0.05, "privacy.clip_quantile": 0.5},
        {"privacy.clip_norm": 0.05, "privacy.noise_multiplier": 0.1},
        {
            "privacy.clip_norm": 0.05,
            "privacy.noise_multiplier": 0.1,
            "privacy.noise": "participant",
            "wire.uplink": "int8",
        },
        {"aggregation.rule": "median"},
        {
            "aggregation.rule": "trimmed_mean",
            "privacy.clip_norm": 0.05,
            "privacy.noise_multiplier": 0.1,
            "privacy.noise": "participant",
        },
    ],
    ids=str,
)
def test_runs_go_through_and_repeat_with_every_option(make_config: Make, options: dict[str, Any]) -> None:
    plain, one, other = (federation.run(make_config({"federation.rounds": 2} | o)) for o in ({}, options, options))
    assert (one.participants["rejected"] == "").all()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), plain.model.parameters(), strict=True))


def test_options_that_protect_from_nothing_say_so(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    noise = {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 0.01, "privacy.noise": "participant"}
    federation.run(make_config(noise))
    assert "noise_multiplier 0.01 is epsilon 1.6e+04 after 3 rounds, which hides nothing; see docs" in caplog.text
    assert privacy.weakness(make_config({"privacy.clip_norm": 1.0})) == ""
    enough = noise | {"privacy.noise_multiplier": 1.0}
    assert privacy.weakness(make_config(enough)) == ""
    withheld = {"roles.assignment": "random", "privacy.withhold_reports": True}
    assert "withhold_reports leaves the changes" in privacy.weakness(make_config(withheld))
    assert privacy.weakness(make_config(enough | withheld)) == ""


def test_withheld_reports_never_leave(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    replies: list[Message] = []
    deliver = LocalGrid._deliver

    def watch(grid: LocalGrid, message: Message) -> Message | None:
        replies.append(deliver(grid, message))  # type: ignore[arg-type]
        return replies[-1]

    monkeypatch.setattr(LocalGrid, "_deliver", watch)
    config = make_config({
        "method": "flux", "roles.assignment": "random", "privacy.withhold_reports": True, "federation.rounds": 2
    })  # fmt: skip
    participants = federation.run(config).participants
    assert (participants[["rejected", "utility_faults"]] == "").all(axis=None), "what is withheld is not missing"
    found = [dict(reply.content["config"]) for reply in replies]
    profiles = [torch.frombuffer(bytearray(c["frequency"]), dtype=torch.float32) for c in found if "frequency" in c]
    trained = [c for c in found if "tokens" in c]
    assert len(profiles) == 3 and len(trained) == 6
    assert all(torch.equal(p, torch.full((8,), 0.25)) for p in profiles)
    for content in trained:
        assert not any(content["tokens"]), "token counts"
        assert torch.frombuffer(bytearray(content["utilities"]), dtype=torch.float32).isnan().all()


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
def test_flowers_mods_refuse_a_reply_with_some_experts(mod: Any) -> None:
    """Why they are not used: they compare the reply's arrays with the request's, one by one."""

    def app(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"0.1.w": Array(torch.ones(2).numpy())})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 1.0})}), reply_to=message)

    arrays = ArrayRecord({f"0.{e}.w": Array(torch.zeros(2).numpy()) for e in (0, 1)})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"clipping_norm": 1.0})})
    message = LocalGrid(client_app.app, 1).create_message(content, "train", 2, "1")
    reply = mod(message, Context(1, 2, {}, RecordDict(), {}), app)
    assert reply.has_error() and "expects the keys in the ArrayRecord of the reply" in str(reply.error.reason)
