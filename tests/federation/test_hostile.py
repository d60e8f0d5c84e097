"""Hundreds of damaged messages, states and files: only the project's own errors come out.

Hypothesis draws every choice, so what fails is made as small as it can be. ``FLUX_CASES=100`` tries that many times as
many (``tests/conftest.py``).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib.config import SETTINGS, RunConfig, make_config
from fluxlib.federation import LocalGrid
from fluxlib.federation.client import client_app, node_state
from fluxlib.federation.protocol import parcels
from fluxlib.federation.protocol.messages import Instruction, JoinReport, ProfileReport, TrainReport
from fluxlib.federation.protocol.sync import ExpertStore, ModelVersion
from fluxlib.federation.protocol.wire import WireError, encode_changes, make_array
from fluxlib.federation.server.validation import MOST_NORM, Expected, Rejected, most_counts, read_reply
from fluxlib.federation.store import tensor_file
from fluxlib.io import ConfigError
from fluxlib.methods.base import Budget, ParticipantState, Update, Work
from fluxlib.profiling import Profile
from fluxlib.roles import Roles
from fluxlib.tasks import files

CHANCE = st.randoms(use_true_random=False)
A_FIFTH = settings(max_examples=settings().max_examples // 5)

NUMBERS = [-1, 0, 1, 3, 2**31, 10**15, 2**63 - 1, 0.5, -0.5, 3.5, 1e308, math.nan, math.inf, -math.inf]
TEXTS = ["", "x", "0.1", "\ud800", "[" * 5000, "{}", "null", "[1]", "1e999", "9" * 5000, "x" * 5000]
VALUES = [*NUMBERS, *TEXTS, True, b"", b"\0" * 7, b"\xff" * 32, [], [1], [-1, 8], [2**40, 2**40], [0.5], ["a"], [b"a"]]


def flipped(data: bytes, chance: random.Random) -> bytes:
    """With one bit, or one piece, changed."""
    at = chance.randrange(len(data) or 1)
    if data and chance.random() < 0.7:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    return (
        data[:at] + bytes(chance.randrange(256) for _ in range(chance.randrange(4))) + data[at + chance.randrange(4) :]
    )


def changed_text(text: str, chance: random.Random) -> str:
    """With one number in it replaced, or one character."""
    at = chance.randrange(len(text) or 1)
    piece = json.dumps(chance.choice(NUMBERS)) if chance.random() < 0.7 else chance.choice(TEXTS)
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    at = chance.choice(digits) if digits and chance.random() < 0.7 else at
    return text[:at] + piece + text[at + 1 :]


def changed_value(value: Any, chance: random.Random) -> Any:
    if isinstance(value, str) and chance.random() < 0.6:
        return changed_text(value, chance)
    return flipped(value, chance) if isinstance(value, bytes) and chance.random() < 0.6 else chance.choice(VALUES)


def damage(content: RecordDict, chance: random.Random) -> RecordDict:
    """A copy of ``content`` with one thing or a few of it changed."""
    content = RecordDict({name: record.copy() for name, record in content.items()})
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not content:
            break
        name = chance.choice(list(content))
        record, what = content[name], chance.random()
        if what < 0.05:
            del content[name]
        elif what < 0.1:
            content[name] = chance.choice(list(content.values()))
        elif record:
            key = chance.choice(list(record))
            value = record[key]
            if what < 0.2:
                del record[key]
            elif isinstance(record, ArrayRecord):
                parts = {"dtype": value.dtype, "shape": value.shape, "stype": value.stype, "data": value.data}
                part = chance.choice(["data", *parts])
                others = {"dtype": ["float64", "int8", "O", "f4,(", "x" * 99], "stype": ["", "fluxlib.parcel", "x"],
                          "shape": [(), (1,), (-1, -32), (2**31, 2**31), value.shape[::-1]]}  # fmt: skip
                parts[part] = flipped(value.data, chance) if part == "data" else chance.choice(others[part])
                key = chance.choice([key, key, key, "9.9.w", "0.1", "x" * 99, "0.1.\ud800"])
                record[key] = make_array(**parts)
            else:
                try:
                    record[chance.choice([key, key, "more"])] = changed_value(value, chance)
                except (TypeError, ValueError):  # Flower's records hold no such thing
                    continue
    return content


CONFIG = make_config({
    "training.local_steps": 2, "training.batch_size": 2, "training.max_tokens": 20, "profiling.batches": 1,
})  # fmt: skip


@pytest.fixture
def expected(store: ExpertStore) -> Expected:
    assigned = torch.zeros(2, 4, dtype=torch.bool)
    assigned[0, 1] = assigned[1, 2] = True
    held = ModelVersion(store.version, store.digest)
    return Expected(1, 3, held, "float32", assigned, store.shapes, most_counts(CONFIG, 8))


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_no_damaged_reply_gets_further_than_its_check(expected: Expected, wire: Any) -> None:
    expected = replace(expected, wire=wire)
    changes = {key: {n: torch.ones(s) for n, s in expected.shapes[key].items()} for key in ((0, 1), (1, 2))}
    work = Work(8, num_tuned=2, train_steps=2, train_samples=4, train_tokens=80, routed_tokens=160, tuned_tokens=40)
    update = Update(changes, torch.full((2, 4), math.nan), torch.ones(2, 4), 1.0, 4, work, {"train": 0.5})
    good = TrainReport(1, 3, expected.held, update).to_records(encode_changes(changes, wire, {})[0])
    asked, refused = LocalGrid(client_app.app, 1).create_message(RecordDict(), "train", 3, "3"), []

    @given(CHANCE)
    def case(chance: random.Random) -> None:
        message = Message(RecordDict(), reply_to=asked)
        message.content = damage(good, chance)
        try:
            report = read_reply(message, expected)
        except Rejected as error:
            assert len(str(error)) < 500
            refused.append(str(error))
            return
        found = report.update
        assert (report.participant, report.round, report.held) == (1, 3, expected.held)
        assert abs(found.loss) <= 1e15 and type(found.num_samples) is int and 0 <= found.num_samples <= 4
        assert ((found.tokens >= 0) & (found.tokens <= 80)).all() and not (found.utilities < 0).any()
        for name, count in vars(found.work).items():
            assert type(count) in (int, bool) or name in ("download_bits", "upload_bits")
        assert found.work.num_experts == 8 and 0 <= found.work.train_tokens <= 80
        for tensors in found.changes.values():
            assert all(float(tensor.float().norm()) <= MOST_NORM for tensor in tensors.values())

    case()
    assert refused


def reports(store: ExpertStore) -> dict[str, tuple[RecordDict, Callable[[RecordDict], Any]]]:
    held, roles = ModelVersion(2, "d" * 64, frozenset({(0, 1)})), torch.eye(4, dtype=torch.bool)[:2]
    frequency, state = torch.full((2, 4), 0.25), RecordDict()
    profile = Profile(frequency, frequency.long(), frequency, 17, ((2, 1, 8, 4),))
    node_state.save_state(state, ParticipantState(profile, 3))
    instruction = Instruction(CONFIG, 3, 1, store.delta(), Roles(roles, ~roles), Budget(2, 2)).to_records()
    return {
        "join": (JoinReport(1, 0, held, "f" * 64, "l20").to_records(), JoinReport.from_records),
        "profile": (
            ProfileReport(1, 3, held, frequency, Work(8), {"profile": 1.0}).to_records(),
            ProfileReport.from_records,
        ),
        "instruction": (instruction, Instruction.from_records),
        "parcels": (parcels.pack(instruction), parcels.unpack),
        "state": (state, node_state.load_state),
    }


@pytest.mark.parametrize("kind", ["join", "profile", "instruction", "parcels", "state"])
def test_what_cannot_be_read_is_an_error_of_our_own(store: ExpertStore, kind: str) -> None:
    (good, read), refused = reports(store)[kind], []

    @given(CHANCE)
    def case(chance: random.Random) -> None:
        try:
            read(damage(good, chance))
        except WireError as error:
            assert len(str(error)) < 500
            refused.append(str(error))

    case()
    assert refused


def test_a_damaged_file_of_a_state_is_an_error_of_our_own(tmp_path: Path, store: ExpertStore) -> None:
    path = tmp_path / "state.safetensors"
    tensor_file.write_tensors(path, node_state.to_tensors(reports(store)["state"][0]))
    good = path.read_bytes()

    @given(CHANCE)
    def case(chance: random.Random) -> None:
        bad = flipped(good, chance)
        path.write_bytes(bad)
        if bad != good:
            with pytest.raises(ConfigError, match=str(path)):
                tensor_file.read_tensors(path)

    case()


SETTING = st.sampled_from([*SETTINGS, "merging", 3, "\ud800"])
VALUE = st.sampled_from([*VALUES, {}, {1: 2}, None])


@given(st.dictionaries(SETTING, VALUE, min_size=1, max_size=3))
def test_damaged_settings_are_an_error_of_our_own(given: dict[Any, Any]) -> None:
    try:
        assert isinstance(make_config(given), RunConfig)
    except ConfigError as error:
        assert len(str(error)) < 3000


ROWS = {
    "dolly": {"instruction": "Which?", "context": "", "response": "Tope", "category": "open_qa"},
    "gsm8k": {"question": "Half of 48?", "answer": "24\n#### 24"},
    "mmlu": {"question": "Red?", "choice0": "a", "choice1": "b", "choice2": "c", "choice3": "d", "answer": 2},
    "piqa": {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the floor.", "label": 0},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_damaged_file_of_a_task_trains_on_nothing_else(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [ROWS[name]] * 3
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("\n".join(",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    good = path.read_bytes()

    @A_FIFTH
    @given(CHANCE)
    def case(chance: random.Random) -> None:
        if kind.startswith("json") and chance.random() < 0.7:
            wrong = {chance.choice(list(rows[0])): chance.choice([*NUMBERS, *TEXTS, None, True, [], {}, ["a"]])}
            bad = [rows[0] | wrong, *rows[1:]]
            path.write_text(json.dumps(bad) if kind == "json" else "\n".join(map(json.dumps, bad)))
        else:
            path.write_bytes(flipped(good, chance))
        try:
            found = files.read(name, path)
        except ValueError as error:
            assert len(str(error)) < 1500
            return
        for example in found:
            assert all(
                type(text) is str for text in (example.prompt, example.response, example.label, *example.options)
            )
            assert example.answer is None or example.options[example.answer] == example.response

    case()
