"""The README's gallery: ``python -m fluxlib.app.gallery`` writes it anew from the tracked figures.

Every family of figures appears once, in the order of the notebooks, with what it shows and, from the numbers beside
it, on which tasks, seeds and clock.
"""

from __future__ import annotations

import csv
from pathlib import Path

from fluxlib.app import pages
from fluxlib.config import REPO_ROOT

FOLDER = Path("figures") / "full"
MODELS = ("mini-llama-moe", "mini-deepseek-moe")

TITLES: dict[str, str] = {
    "convergence": "Score over time of each method",
    "time_to_accuracy": "Time to target, and how much sooner than FMD",
    "claims": "Ours beside the paper's, claim by claim",
    "speed_up": "How much sooner FLUX is, task by task",
    "sensitivity": "The lead on other devices and links",
    "scale_participants": "More participants (Fig. 12)",
    "scale_settings": "Other heterogeneity, other budgets",
    "activation_by_layer": "Which experts are used, by layer (Fig. 2)",
    "profile_error": "A profile in few bits (Fig. 6b)",
    "sample_size": "How many samples a profile needs",
    "drift": "How activation drifts, and a profile one round old (Fig. 6a, 14)",
    "round_saving": "Round time that a stale profile saves",
    "discarding": "Dropping or merging (Fig. 3a)",
    "error_growth": "How an error travels through the layers (Fig. 3b, 8)",
    "attention_frequency": "Attention is not frequency (Fig. 9)",
    "layer_budgets": "Where slots go, and what that costs (Fig. 15)",
    "clustering_time": "Finding clusters, fused or layer by layer (Fig. 16)",
    "merge_options": "Weights of a merge, and what goes beyond the paper (Fig. 17)",
    "own_share": "FLUX's own share of a round (Fig. 20)",
    "role_utilities": "Utilities from forward passes against true ones",
    "role_probes": "Forward-only probes: cost and quality (Fig. 18)",
    "role_seconds": "What learning a utility costs",
    "role_map": "Who tunes which expert over rounds",
    "role_convergence": "Assignments compared, over rounds and device clock",
    "role_ablation": "Assignments compared, at the end",
    "role_coverage": "How many experts anybody has tuned",
    "role_epsilon": "How much to exploit (Fig. 19)",
    "role_options": "Assignments beyond the paper",
    "round_phases": "Where a round's time goes",
    "round_memory": "Memory by method",
    "link_speed": "The speed-up over the link",
    "clock_check": "The device clock against this machine",
    "real_memory": "Memory of a training step at real size",
    "real_phases": "A round at real size, by device and phase",
    "real_links": "A round at real size, by link and bits",
}

DEVICE, HERE, BOTH = "device clock", "measured", "device clock and measured"
CLOCKS: dict[str, str] = {
    "time_to_accuracy": BOTH, "round_saving": DEVICE, "clustering_time": HERE, "own_share": BOTH, "role_seconds": BOTH,
    "role_ablation": DEVICE,
    "sensitivity": DEVICE, "scale_settings": DEVICE, "scale_participants": DEVICE,
    "role_options": DEVICE, "round_phases": DEVICE, "link_speed": DEVICE, "clock_check": BOTH,
    "real_phases": DEVICE, "real_links": DEVICE,
}  # fmt: skip
"""Whose seconds a figure shows where the numbers beside it do not say; others show none."""


def families(folder: Path) -> dict[str, Path]:
    """Each family of figures in ``folder`` and the picture that stands for it: known ones first, as in ``TITLES``."""
    found: dict[str, Path] = {}
    for model in MODELS:
        for path in sorted(folder.glob(f"*-{model}.png")):
            found.setdefault(path.stem.removesuffix(f"-{model}"), path)
    for path in sorted(folder.glob("*.png")):
        if not path.stem.endswith(MODELS):
            found.setdefault(path.stem, path)
    order = {name: place for place, name in enumerate(TITLES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def about(numbers: Path) -> str:
    """What the csv beside a picture says of its scale: model, tasks, seeds, the shapes and link of its clock."""
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

    tasks, seeds, shapes = values("task"), values("seed"), values("clock_model")
    family = numbers.stem
    for name in MODELS:
        family = family.removesuffix(f"-{name}")
    model = next((name for name in MODELS if numbers.stem.endswith(name)), ", ".join(values("model")))
    parts = [f"`{model}`" if model else "", ", ".join(f"`{task}`" for task in tasks)]
    parts += [f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else ""]
    parts += [
        f"device clock: {', '.join(shapes)} over {', '.join(values('link'))}" if shapes else CLOCKS.get(family, "")
    ]
    return " · ".join(part for part in parts if part)


def gallery(root: Path = REPO_ROOT) -> str:
    """The section as Markdown: two pictures a row, each with its caption."""
    cells = []
    for name, path in families(root / FOLDER).items():
        title = TITLES.get(name, name.replace("_", " "))
        link = path.relative_to(root).as_posix()
        cells.append(f"![{title}]({link})<br>**{title}.** {about(path.with_suffix('.csv'))}")
    cells += [""] * (len(cells) % 2)
    rows = [f"| {left} | {right} |" for left, right in zip(cells[::2], cells[1::2], strict=True)]
    return "\n".join(["", "| | |", "|---|---|", *rows, ""])


def main() -> None:
    """Write the gallery into the README."""
    pages.replace(REPO_ROOT / "README.md", "gallery", gallery())


if __name__ == "__main__":
    main()
