"""Rows of the public data sets, from local files or from the hub's own Parquet copies.

Files may be JSON lines, JSON lists, CSV or Parquet. All of them are read together and split anew (section 7 of the
paper's set-up: 80 % to 20 %), since the public splits differ in size and PIQA's test labels are secret.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fluxlib.io import ConfigError, checked, reading
from fluxlib.tasks.base import Example
from fluxlib.tasks.formats import FORMATS

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
LEFT_OUT = ("auxiliary_train", "socratic")
"""Parts of the public data sets that are not the task itself: MMLU's training material, GSM8K's other wording."""
HUB = {
    "dolly": ("databricks/databricks-dolly-15k", "*/train/*.parquet"),
    "gsm8k": ("openai/gsm8k", "main/*/*.parquet"),
    "mmlu": ("cais/mmlu", "all/*/*.parquet"),
    "piqa": ("ybisk/piqa", "*/*/*.parquet"),
}
"""Hub id of each data set, and its files in the branch :data:`REVISION`."""
REVISION = "refs/convert/parquet"
"""The hub's own copy of every data set; no script of the data set's is run."""
NUM_CLUSTERS, DIMENSIONS = 5, 50
SHOWN = 3
"""Bad rows that a message describes, at most."""


def read(name: str, path: str | Path) -> list[Example]:
    """All samples of the data set ``name`` below ``path``, in the order of the files' names.

    Args:
        path: a file, a folder of files, or a folder with a folder called ``name``.

    Raises:
        OSError: nothing to read there.
        ValueError: a file that is not what its suffix says, or rows without the columns or values they need; the
            message names file, row and column of the first, and says how many there are.
    """
    examples: list[Example] = []
    problems: list[str] = []
    total = 0
    for file in find(name, path):
        with reading(f"{file} is no {file.suffix[1:]} file"):
            rows = list(_rows(file))
        total += len(rows)
        for number, row in rows:
            try:
                with reading(f"{file}, row {number}"):
                    found = json.loads(row) if isinstance(row, str) else row
                    example = FORMATS[name].read(checked("it", found, dict), file)
            except ConfigError as error:
                problems.append(str(error))
            else:
                examples += [example] if example else []
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        columns = f"{name} has the columns {', '.join(FORMATS[name].columns)}"
        raise ValueError(f"{'; '.join(problems[:SHOWN])}{more} of {total} rows; {columns}")
    if not examples:
        raise ValueError(f"{path} holds no labelled row of {name}")
    return examples


def find(name: str, path: str | Path) -> list[Path]:
    """The data files of the data set ``name`` below ``path``, sorted; OSError: there are none."""
    start = Path(path).expanduser()
    if start.is_file() and start.suffix in SUFFIXES:
        return [start]
    folder = start / name if (start / name).is_dir() else start
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in SUFFIXES and not any(part in str(file.relative_to(folder)) for part in LEFT_OUT)
    ]
    if not files:
        what = "holds no data files" if start.exists() else "does not exist"
        raise OSError(f"data.path {start} {what}; {name} is read from {', '.join(SUFFIXES)} files there or in {name}/")
    return files


def fetch(name: str) -> Path:
    """The data set's folder in the hub's cache, downloaded where it is not there yet; OSError: it cannot be."""
    from huggingface_hub import snapshot_download

    (hub_id, pattern), others = HUB[name], [f"*{part}*" for part in LEFT_OUT]
    try:
        folder = snapshot_download(
            hub_id, repo_type="dataset", revision=REVISION, allow_patterns=pattern, ignore_patterns=others
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"task {name}: {hub_id} could not be fetched from the hub ({reason}); "
            "with files of your own, name their folder by data.path (fluxlib run --data FOLDER)"
        ) from None
    return Path(folder)


def _rows(file: Path) -> Iterator[tuple[int, object]]:
    """Rows by number, from 1; those of JSON lines as text, so that one that cannot be read is one row."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from enumerate(pq.read_table(file).to_pylist(), start=1)
        return
    with file.open(newline="", encoding="utf-8-sig") as lines:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(lines, strict=True), start=1)
        elif file.suffix == ".jsonl":
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        else:
            yield from enumerate(checked("it", json.load(lines), list), start=1)


@lru_cache(maxsize=2)
def cluster_labels(texts: tuple[str, ...], num_clusters: int = NUM_CLUSTERS) -> tuple[str, ...]:
    """Labels of data sets that have none: clusters of similar prompts, the largest first; always the same ones.

    Paper: non-IID "following the FedNLP benchmark", which clusters sentence embeddings into 5 groups by K-Means and
    deals those out by a Dirichlet. Deviation: the embedding is TF-IDF reduced to 50 dimensions (latent semantic
    analysis), which needs no further model and gives the same labels on every machine of the same architecture.
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    if len(texts) <= num_clusters:
        return ("cluster0",) * len(texts)
    counts = TfidfVectorizer(sublinear_tf=True, stop_words="english", token_pattern=r"(?u)\b\w+\b").fit_transform(texts)
    size = min(DIMENSIONS, min(counts.shape) - 1)
    points = normalize(TruncatedSVD(size, random_state=0).fit_transform(counts)) if size > 0 else counts.toarray()
    with warnings.catch_warnings():
        # Fewer different prompts than clusters: some stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(num_clusters, n_init=4, random_state=0).fit_predict(np.asarray(points))
    by_size = {cluster: rank for rank, (cluster, _) in enumerate(Counter(found.tolist()).most_common())}
    return tuple(f"cluster{by_size[cluster]}" for cluster in found.tolist())
