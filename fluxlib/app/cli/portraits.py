"""Models without a federation: what a participant's memory holds of one, and which experts a text uses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fluxlib.app.cli.base import JsonOption, PictureOption, check_picture


def plan(
    model: Annotated[str, typer.Option(help="a known model, a folder, or a hub name")] = "llama-moe-3.5b",
    method: Annotated[str, typer.Option(help="flux, fmd, fmq or fmes")] = "flux",
    memory: Annotated[str | None, typer.Option(help="of the participant's device, such as 24GiB")] = None,
    device: Annotated[str | None, typer.Option(help="a device of the catalogue, instead of --memory")] = None,
    batch: Annotated[int, typer.Option(help="sequences per step")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per sequence, padding included")] = 512,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations in the backward pass")] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict a participant's peak memory, and the experts that fit: B_tune and B_non. Needs no weights.

    \b
    Examples:
        fluxlib plan --model deepseek-moe-16b --memory 48GiB
        fluxlib plan --device rtx-3060 --batch 2 --tokens 128 --json
    """
    from fluxlib.config import ConfigError

    if memory and device:
        raise ConfigError("--memory and --device say the same thing: give one of them")
    from fluxlib.devices import catalogue
    from fluxlib.devices import memory as planner

    if device is not None and device not in catalogue.DEVICES:
        raise ConfigError(f"--device is {device!r}, allowed are {', '.join(catalogue.DEVICES)}")
    try:
        size = catalogue.DEVICES[device].memory_bytes if device else memory
        found = planner.plan(model, size, method, batch=batch, tokens=tokens, checkpointing=checkpointing)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    print(json.dumps(found.to_dict()) if as_json else found.table())


def profile(
    model: Annotated[str, typer.Argument(help="a mini model, a folder, or a hub name of any MoE model")],
    text: Annotated[Path, typer.Argument(help="a text file: what the model is to read")],
    bits: Annotated[int, typer.Option(help="of the experts meanwhile: 2, 3, 4, 8; 16: as they are")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per sample, at most what the model reads at once")] = 128,
    samples: Annotated[int, typer.Option(help="at most so many samples are read")] = 64,
    picture: PictureOption = Path("build/profile/activation"),
    as_json: JsonOption = False,
) -> None:
    """Which experts of any MoE model a text uses: a table by layer, and a picture.

    \b
    Example:
        fluxlib profile mini-llama-moe README.md --bits 4
    """
    from fluxlib.config import ConfigError

    if not text.is_file():
        raise ConfigError(f"{text} is a folder, not a text file" if text.is_dir() else f"no file {text}")
    if tokens < 1 or samples < 1:
        raise ConfigError(f"--tokens and --samples must be at least 1, got {tokens} and {samples}")
    check_picture(picture)
    from fluxlib import figures, models
    from fluxlib.analysis import text_profile

    try:
        text_profile.check(models.config(model), bits, tokens)
        loaded, tokenizer = models.load(model)
        batches = text_profile.batches(text.read_text(errors="replace"), tokenizer, tokens, samples)
        with typer.progressbar(batches, label="reading", file=sys.stderr) as shown:
            found = text_profile.profile(loaded, shown, bits)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    unknown = text_profile.unknown_frac(batches, tokenizer)
    files = figures.save(figures.activation(found.frequency), picture.name, picture.parent, found.by_expert)
    if as_json:
        rows = json.loads(found.by_layer.to_json(orient="records"))
        answer = {"model": model, "tokens": found.num_tokens, "unknown_frac": unknown, "layers": rows}
        print(json.dumps(answer | {"picture": str(files["png"])}))
        return
    print(f"{model}: {found.num_tokens} tokens of {text}, {unknown:.0%} of them unknown to its tokenizer; "
          f"experts in {bits} bit")  # fmt: skip
    print(found.by_layer.round(3).to_string(index=False))
    print(f"picture: {files['png']}")
