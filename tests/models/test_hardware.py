"""Where models compute: what a name means, what is refused, and who decides it."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Context, RecordDict

from fluxlib import models
from fluxlib.config import make_config
from fluxlib.federation.checks import check
from fluxlib.federation.client import participant
from fluxlib.io import ConfigError
from fluxlib.models.loading import torch_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:0"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_names_of_devices(name: str, found: str) -> None:
    assert torch_device(name) == torch.device(found)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda:2', allowed on this machine are auto, cuda:0, cuda:1, cpu"):
        torch_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_a_run_is_refused_before_any_work_and_auto_is_the_cpu() -> None:
    assert torch_device("auto") == torch.device("cpu")
    check(make_config({"torch_device": "auto"}))
    with pytest.raises(ConfigError, match="torch_device is 'cuda', allowed on this machine are auto, cpu"):
        check(make_config({"torch_device": "cuda"}))
    with pytest.raises(ConfigError, match="torch_device: .*'gpu'"):
        make_config({"torch_device": "gpu"})


def test_hardware_is_nothing_that_numbers_depend_on() -> None:
    assert make_config({"torch_device": "cuda"}).numbers == make_config({}).numbers


@pytest.mark.parametrize(
    ("engine", "own", "used"),
    [
        ("local", None, "cuda:1"),
        ("simulation", None, "cuda"),
        ("deployment", None, "cpu"),
        ("deployment", "mps", "mps"),
    ],
)
def test_a_node_of_a_deployment_decides_for_itself(engine: str, own: str | None, used: str) -> None:
    config = make_config({"engine": engine, "torch_device": "cuda:1"})
    context = Context(1, 1, {} if own is None else {"torch-device": own}, RecordDict(), {})
    assert participant._torch_device(config, context) == used


@pytest.mark.parametrize("name", ["mini-llama-moe"])
def test_a_model_is_loaded_where_it_is_wanted(name: str) -> None:
    model, _ = models.load(name, device=torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
