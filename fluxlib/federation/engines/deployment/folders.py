"""A participant's folder: its own samples, what its device is, its key, and what it keeps between rounds.

``docs/deployment.md`` shows its files. Nothing in it is ever sent: the SuperNode gets paths and names as its node
configuration, which stays with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from fluxlib.config import RunConfig, make_config
from fluxlib.devices import catalogue
from fluxlib.federation.client.local_data import load_task, write_examples
from fluxlib.io import check_writable, reading

SETTINGS, SAMPLES, STATE = "participant.yaml", "train.jsonl", "state"


@dataclass(frozen=True)
class Participant:
    """What ``participant.yaml`` says.

    ``device`` is a name of :mod:`fluxlib.devices.catalogue`; it is all that the server is told. ``torch_device`` is
    where the work is done, such as ``cuda:0``. ``background_profile`` answers first and profiles afterwards, in a
    process of its own.
    """

    participant: int
    device: str
    torch_device: str = "cpu"
    background_profile: bool = False


def read_participant(folder: Path) -> Participant:
    """What the folder's settings say; ConfigError: no such file, or a wrong entry in it, with what is allowed."""
    path, devices = folder / SETTINGS, ", ".join(catalogue.DEVICES)
    with reading(
        f"{path} must say participant (a number) and device (one of {devices}), and may say torch_device and "
        "background_profile"
    ):
        found = Participant(**yaml.safe_load(path.read_text()))
        if type(found.participant) is not int or found.device not in catalogue.DEVICES:
            raise ValueError(f"it says {found.participant!r} and {found.device!r}")
        make_config({"torch_device": found.torch_device})
        return found


def node_config(folder: Path) -> dict[str, str | int | bool]:
    """A SuperNode's configuration: what the client app finds in ``context.node_config``."""
    about, samples = read_participant(folder), folder / SAMPLES
    return {
        "partition-id": about.participant,
        "device": about.device,
        "torch-device": about.torch_device,
        "state-dir": str((folder / STATE).resolve()),
        **({"background-profile": True} if about.background_profile else {}),
        **({"data": str(samples.resolve())} if samples.is_file() else {}),
    }


def make_folders(root: Path, config: RunConfig) -> list[Path]:
    """A folder per participant of ``config``, with the samples that its partition deals to it in process too."""
    task, parts = load_task(config)
    folders = []
    for number, device in enumerate(catalogue.fleet(config.clock.fleet, config.federation.participants)):
        folder = check_writable(root / f"node-{number}")
        write_examples(folder / SAMPLES, [task.train[index] for index in parts[number]])
        (folder / SETTINGS).write_text(yaml.safe_dump(asdict(Participant(number, device.name)), sort_keys=False))
        folders.append(folder)
    return folders
