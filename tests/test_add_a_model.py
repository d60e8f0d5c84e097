"""The worked example of docs/add-a-model.md, from top to bottom as it stands there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fluxlib.config import REPO_ROOT

DOCUMENT = REPO_ROOT / "docs" / "add-a-model.md"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the document's code leaves, run in an empty folder; the line of an error is the document's."""
    found: dict[str, Any] = {"__name__": "add_a_model"}
    text = DOCUMENT.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("add-a-model"))
        for block in re.finditer(r"```python\n(.*?)```", text, re.S):
            above = text[: block.start(1)].count("\n")
            exec(compile("\n" * above + block[1], str(DOCUMENT), "exec"), found)  # noqa: S102 - the document's own code
        found["folders"] = {name: found[name].resolve() for name in ("folder", "tuned_folder")}
    return found


def test_a_model_that_the_project_does_not_know_goes_all_the_way(namespace: dict[str, Any]) -> None:
    assert namespace["result"].rounds["round"].tolist() == [0, 1, 2]
    assert namespace["changed"]


def test_its_export_is_a_model_that_transformers_loads_with_a_card(namespace: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = namespace["folders"]["tuned_folder"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "Glm4MoeForCausalLM"
    card = " ".join((folder / "README.md").read_text().split())
    assert "2 of 2 rounds" in card and "method `flux`" in card


def test_the_project_did_not_name_it_before() -> None:
    sources = [*(REPO_ROOT / "fluxlib").rglob("*.py"), *(REPO_ROOT / "tests" / "moe").glob("*.py")]
    assert not [path.name for path in sources if "glm4" in path.read_text().lower()]


@pytest.mark.parametrize("message", re.findall(r"^\| `([^`|]+)` \|", DOCUMENT.read_text(), re.M))
def test_a_message_of_the_table_is_one_that_is_raised(message: str) -> None:
    source = "".join(path.read_text() for path in (REPO_ROOT / "fluxlib" / "moe").glob("*.py"))
    for part in message.split(" ... "):
        assert part in source, part
