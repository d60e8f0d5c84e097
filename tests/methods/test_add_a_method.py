"""The fifth method of docs/add-a-method.md, as it stands there, through all that the other four go through."""

import re
import types
from pathlib import Path

import pytest
import torch
from mini_bases import build_tokenizer
from torch import nn

from fluxlib import federation, methods, models
from fluxlib.config import REPO_ROOT, make_config
from fluxlib.figures import style
from fluxlib.methods.base import LocalData, Method

from .test_methods import TestEveryMethod as Promises

DOCUMENT = (REPO_ROOT / "docs" / "add-a-method.md").read_text()
CODE, LINE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    module = types.ModuleType("average")
    exec(compile(CODE, "docs/add-a-method.md", "exec"), module.__dict__)  # noqa: S102 - the document's own code
    monkeypatch.setitem(methods.METHODS, "average", module.METHOD)
    return module.METHOD


def test_the_one_line_is_the_registrys_own_and_one_name_more() -> None:
    source = (REPO_ROOT / "fluxlib" / "methods" / "__init__.py").read_text()
    assert LINE.replace(", average.METHOD", "") in source


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("promise", [name for name in dir(Promises) if name.startswith("test_")])
def test_it_keeps_what_every_method_promises(promise: str, model: nn.Module, data: LocalData) -> None:
    getattr(Promises(), promise)("average", model, data)


@pytest.mark.usefixtures("method")
def test_it_runs_in_a_federation_and_is_drawn(model: nn.Module, tmp_path: Path) -> None:
    models.export(model, tmp_path, build_tokenizer())
    config = make_config({
        "method": "average", "model": str(tmp_path), "task": "mini-mmlu", "data.task_size": 40, "federation.rounds": 2,
        "federation.participants": 2, "training.local_steps": 1, "training.batch_size": 2, "profiling.batches": 1,
        "evaluation.samples": 2,
    })  # fmt: skip
    result = federation.run(config)
    rounds, participants = result.rounds, result.participants
    assert (participants["rejected"] == "").all()
    assert participants["num_tuned"].tolist() == [16] * 4
    assert (participants["num_merged"] <= 4).all()
    assert rounds["epsilon"].isna().all()
    assert (rounds["round_device_s"].iloc[1:] > 0).all()
    base, _ = models.load(str(tmp_path))
    assert not all(torch.equal(a, b) for a, b in zip(base.parameters(), result.model.parameters(), strict=True))
    assert style.method("average").color not in {look.color for look in style.METHODS.values()}
