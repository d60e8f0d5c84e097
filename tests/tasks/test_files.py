"""Public data sets from files of their own schemas, and what is said of files that are not."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fluxlib import tasks
from fluxlib.tasks import files
from fluxlib.tasks.files import cluster_labels

DOLLY = {"instruction": "Which is a fish?", "context": "Tope or rope.", "response": "Tope", "category": "open_qa"}
GSM8K = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}
MMLU = {"question": "Red?", "choice0": "a", "choice1": "b", "choice2": "c", "choice3": "d", "answer": 2}
PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the floor.", "label": 0}


def jsonl(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def numbered(row: dict, column: str, count: int) -> list[dict]:
    return [row | {column: f"{row[column]} {number}"} for number in range(count)]


def everything(task: tasks.Task) -> set[str]:
    return {example.prompt for example in (*task.train, *task.test)}


def test_all_files_of_a_task_are_read_and_split_anew(tmp_path: Path) -> None:
    rows = numbered(GSM8K, "question", 10)
    jsonl(tmp_path / "gsm8k" / "train.jsonl", *rows[:7])
    jsonl(tmp_path / "gsm8k" / "test.jsonl", *rows[7:])
    jsonl(tmp_path / "gsm8k" / "socratic.jsonl", {"other": "wording"})
    jsonl(tmp_path / "piqa" / "validation.jsonl", PIQA)
    task = tasks.load("gsm8k", path=tmp_path)
    assert (len(task.train), len(task.test), task.metric) == (8, 2, "exact_match")
    assert everything(task) == {f"Question: {row['question']}\nSolution:" for row in rows}
    assert tasks.load("gsm8k", path=tmp_path / "gsm8k") == task
    assert task.train[0].response.endswith("#### 24")


def test_subjects_are_columns_or_names_of_files(tmp_path: Path) -> None:
    table(tmp_path / "test" / "anatomy_test.csv", *numbered(MMLU, "question", 3))
    table(tmp_path / "dev" / "world_religions_dev.csv", *numbered(MMLU | {"answer": "B"}, "question", 2))
    hub = {"question": "Hub?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 3}
    pq.write_table(pa.Table.from_pylist([hub]), tmp_path / "test" / "0000.parquet")
    examples = files.read("mmlu", tmp_path)
    assert sorted({example.label for example in examples}) == ["anatomy", "virology", "world_religions"]
    assert {(example.label, example.response) for example in examples} == {
        ("anatomy", "c"), ("virology", "d"), ("world_religions", "b"),
    }  # fmt: skip
    assert all(example.options == ("a", "b", "c", "d") for example in examples)


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "piqa.jsonl", *numbered(PIQA, "goal", 3), PIQA | {"label": -1}, PIQA | {"label": "1"})
    examples = files.read("piqa", path)
    assert [example.answer for example in examples] == [0, 0, 0, 1]
    assert examples[0].prompt == "Goal: Open a jar. 0\nSolution:"


def test_json_lists_are_read_too(tmp_path: Path) -> None:
    rows = [*numbered(DOLLY, "instruction", 4), *numbered(DOLLY | {"category": "closed_qa"}, "instruction", 4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = tasks.load("dolly", path=tmp_path)
    assert task.labels == ("closed_qa", "open_qa")
    assert task.train[0].prompt.endswith("\nContext: Tope or rope.\nResponse:")


def test_data_sets_without_labels_get_clusters_of_similar_prompts(tmp_path: Path) -> None:
    topics = ("apples pears fruit", "trains rails station", "paint brush wall", "moon stars sky", "salt soup pan")
    texts = tuple(f"{topic} {number}" for number in range(12) for topic in topics)
    labels = cluster_labels(texts)
    by_topic = [{labels[i] for i in range(len(texts)) if texts[i].startswith(topic)} for topic in topics]
    assert all(len(found) == 1 for found in by_topic) and len(set.union(*by_topic)) == 5
    jsonl(tmp_path / "a.jsonl", *[GSM8K | {"question": text} for text in texts])
    assert len(tasks.load("gsm8k", path=tmp_path).labels) == 5


def test_a_few_samples_are_a_seeded_draw(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", *numbered(GSM8K, "question", 30))
    one, again, other = (tasks.load("gsm8k", seed, 10, tmp_path) for seed in (0, 0, 1))
    assert one == again
    assert len(everything(one)) == 10 and everything(one) != everything(other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "gsm8k",
            '{"question": "a"}',
            "row 1: lacks answer; it has question of 1 rows; gsm8k has the columns question, ",
        ),
        ("gsm8k", '\n\n{"question": "a", "answer"', "row 3: Expecting ':' delimiter"),
        ("gsm8k", "[1, 2]", "row 1: it is [1, 2], allowed is dict"),
        ("gsm8k", "", "holds no labelled row of gsm8k"),
        ("gsm8k", GSM8K | {"answer": None}, "row 1: answer is None, allowed is text"),
        ("gsm8k", GSM8K | {"answer": float("nan")}, "row 1: answer is nan, allowed is text"),
        ("gsm8k", GSM8K | {"answer": {"text": "4"}}, "row 1: answer is {'text': '4'}, allowed is text"),
        ("gsm8k", GSM8K | {"question": "\ud800"}, r"row 1: question is '\ud800', allowed is text"),
        ("gsm8k", GSM8K | {"skill": 3}, "row 1: skill is 3, allowed is text"),
        ("gsm8k", "[" * 100_000, "row 1: maximum recursion depth exceeded"),
        ("gsm8k", '{"question": ' + "1" * 5000 + "}", "row 1: Exceeds the limit"),
        ("dolly", DOLLY | {"context": None}, "row 1: context is None, allowed is text"),
        ("mmlu", MMLU | {"answer": 7}, "row 1: answer is 7, allowed are 0 to 3"),
        ("mmlu", MMLU | {"answer": True}, "row 1: answer is True, allowed are 0 to 3"),
        ("mmlu", MMLU | {"answer": "E"}, "row 1: answer is 'E', allowed are 0 to 3"),
        ("mmlu", MMLU | {"choice1": ["b"]}, "row 1: choice1 is ['b'], allowed is text"),
        ("mmlu", MMLU | {"choices": "abcd"}, "row 1: choices is 'abcd', allowed is list"),
        ("mmlu", MMLU | {"choices": list("abcde")}, "row 1: choices has 5 entries, allowed are 4"),
        ("piqa", PIQA | {"label": 2}, "row 1: label is 2, allowed are 0 to 1"),
        ("piqa", PIQA | {"label": 0.5}, "row 1: label is 0.5, allowed are 0 to 1"),
        ("piqa", PIQA | {"label": float("inf")}, "row 1: label is inf, allowed are 0 to 1"),
        ("piqa", PIQA | {"label": None}, "row 1: label is None, allowed are 0 to 1"),
        ("piqa", PIQA | {"label": [1]}, "row 1: label is [1], allowed are 0 to 1"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_row_is_named(name: str, content: str | dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tasks.load(name, path=path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_many_bad_rows_are_summed_up(tmp_path: Path) -> None:
    rows = [PIQA | {"label": label} for label in (0, 9, 1, 9, 9, -1, 9, 9, "x" * 10_000)]
    with pytest.raises(ValueError, match=r"row 2: .*row 4: .*row 5: .*; and 3 more of 9 rows; piqa has") as caught:
        files.read("piqa", jsonl(tmp_path / "rows.jsonl", *rows))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"question": "a"}', "is no json file: it is {'question': 'a'}, allowed is list"),
        ("a.json", b"[" * 100_000, "is no json file: maximum recursion depth"),
        ("a.json", b'[{"question": "a", "answer": Nan}]', "is no json file: Expecting value"),
        ("a.jsonl", b"\xff", "is no jsonl file: 'utf-8' codec"),
        ("a.csv", b'question,answer\n"a', "is no csv file: unexpected end of data"),
        ("a.csv", b"question,answer\na\n", "row 1: answer is None, allowed is text"),
        ("a.csv", b"question,answer\na,b,c\n", "row 1: has more fields than columns"),
        ("a.parquet", b"", "is no parquet file: "),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "is no parquet file: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}")) as caught:
        files.read("gsm8k", tmp_path)
    assert message in str(caught.value)


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(numbered(GSM8K, "question", 3)), path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        try:
            assert len(files.read("gsm8k", path)) == 3
        except ValueError as error:
            assert str(path) in str(error)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="nowhere does not exist; gsm8k is read from .jsonl, .json, .csv, .parquet files"):
        tasks.load("gsm8k", path=tmp_path / "nowhere")
    with pytest.raises(OSError, match="holds no data files"):
        tasks.load("gsm8k", path=tmp_path)
    jsonl(tmp_path / "a.jsonl", *numbered(GSM8K, "question", 12))
    with pytest.raises(ValueError, match="task_size is 13, allowed is at most the 12 samples of gsm8k"):
        tasks.load("gsm8k", size=13, path=tmp_path)
    with pytest.raises(ValueError, match="mini-gsm8k is generated; it is for dolly, gsm8k"):
        tasks.load("mini-gsm8k", path=tmp_path)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"task piqa: ybisk/piqa could not be fetched .*\(no route to host\); .* --data"):
        tasks.load("piqa")


def test_what_the_hub_gives_is_read_like_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    (tmp_path / "main" / "train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(numbered(GSM8K, "question", 10)), tmp_path / "main" / "train" / "0000.parquet")
    asked: list[object] = []

    def download(*args: object, **named: object) -> str:
        asked.append((args, named))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(tasks.load("gsm8k").train) == 8
    (where, named), *_ = asked
    assert where == ("openai/gsm8k",) and named["revision"] == "refs/convert/parquet"
