"""Host memory of loading a checkpoint in a public format, beside the model's own size.

    python benchmarks/loading.py                 a DeepSeek-MoE of 642 MB, in files of 128 MB (`make bench` runs it)
    python benchmarks/loading.py --quick         a tiny one, to see that it runs

Each load is a process of its own; what it needed is read from /proc, so this runs on Linux only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _measure import Row, machine, options_of, table, write
from safetensors.torch import load_file

from fluxlib import models
from fluxlib.models import DeepseekMoeConfig, DeepseekMoeForCausalLM

SHAPE = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 7, "n_routed_experts": 64}
QUICK = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 8}
SHARD_BYTES = 2**27


def make(folder: Path, shape: dict[str, int], shard_bytes: int) -> dict[str, Path]:
    """Write one random model as ``.safetensors`` and as ``.bin``; the folders by kind."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = DeepseekMoeConfig(
        vocab_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8, num_experts_per_tok=6,
        n_shared_experts=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, **shape,
    )  # fmt: skip
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    model = DeepseekMoeForCausalLM(config).to(torch.bfloat16)
    safe = models.export(model, folder / "safetensors", tokenizer, max_shard_bytes=shard_bytes)
    old = folder / "bin"
    shutil.copytree(safe, old, ignore=shutil.ignore_patterns("model*"))
    for file in sorted(safe.glob("model*.safetensors")):
        torch.save(load_file(file), old / _bin_name(file.name))
    index = safe / "model.safetensors.index.json"
    if index.is_file():
        (old / _bin_name(index.name)).write_text(_bin_name(index.read_text()))
    return {"safetensors": safe, "bin": old}


def load(folder: Path) -> Row:
    """Load a folder in this process: sizes in bytes."""
    _ = torch.randn(64, 64) @ torch.randn(64, 64)
    resident, anonymous = _status("VmRSS"), _status("RssAnon")
    model, _tokenizer = models.load(folder, torch.bfloat16)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak, held = _status("VmHWM") - resident, _status("RssAnon") - anonymous
    return {"model_bytes": size, "peak_bytes": peak, "peak_ratio": peak / size, "anonymous_ratio": held / size}


def _bin_name(text: str) -> str:
    return re.sub(r"model([-\w]*)\.safetensors", r"pytorch_model\1.bin", text)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main(arguments: Sequence[str] | None = None) -> Row:
    """Load both kinds and write ``loading.json`` and ``loading.md``."""
    parser = options_of(__doc__)
    parser.add_argument("--only", type=Path, help="load this folder in this process and print what it needed")
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(load(options.only)))
        return {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        shape, shard = (QUICK, 2**16) if options.quick else (SHAPE, SHARD_BYTES)
        for kind, folder in make(Path(temporary), shape, shard).items():
            command = [sys.executable, __file__, "--only", str(folder)]
            made: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            rows.append({"files": kind, **made})
    result: Row = {"machine": machine(torch.device("cpu")), "shape": shape, "loading": rows}
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    write(options.out, "loading", result, "\n\n".join(["# Loading", facts, table(rows, list(rows[0]))]))
    return result


if __name__ == "__main__":
    main()
