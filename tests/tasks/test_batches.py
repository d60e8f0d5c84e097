import itertools

import pytest
import torch
from mini_bases import build_tokenizer

from fluxlib import seeding
from fluxlib.tasks import Example
from fluxlib.tasks.batches import IGNORED, encode, make_batch, sample_batches

TOKENIZER = build_tokenizer()
SHORT = Example("Question: red?\nAnswer:", "blue", "l")
LONG = Example("Question: red green white?\nAnswer:", "blue grey", "l")


def test_only_the_response_and_its_end_are_scored() -> None:
    ids, start = encode(SHORT, TOKENIZER, 32)
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["<s>", "question", ":", "red", "?", "answer", ":", "blue", "</s>"]
    assert start == 7


def test_padding_is_right_and_unscored() -> None:
    batch = make_batch([SHORT, LONG], TOKENIZER, 32)
    assert batch["attention_mask"].tolist() == [[1] * 9 + [0] * 3, [1] * 12]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [2, 3]
    assert batch["input_ids"][0, 9:].tolist() == [TOKENIZER.pad_token_id] * 3


def test_a_long_prompt_loses_its_beginning() -> None:
    ids, start = encode(LONG, TOKENIZER, 6)
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["?", "answer", ":", "blue", "grey", "</s>"]
    assert start == 3


def test_a_response_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is 3, allowed is at least 4"):
        encode(LONG, TOKENIZER, 3)


def test_each_pass_holds_every_example_once() -> None:
    examples = [Example(f"Question: {n}?", "red", "l") for n in range(6)]
    batches = sample_batches(examples, TOKENIZER, 4, 32, seeding.generator(0))
    seen = torch.cat([batch["input_ids"] for batch in itertools.islice(batches, 3)])
    numbers = TOKENIZER.convert_ids_to_tokens(seen[:, 3])
    assert sorted(numbers[:6]) == sorted(numbers[6:]) == [str(n) for n in range(6)]


def test_a_free_text_that_is_too_long_is_cut_at_its_end() -> None:
    text = Example("Instruction: red? Response:", "blue grey blue grey blue grey blue grey", "l", may_be_cut=True)
    ids, start = encode(text, TOKENIZER, 8)
    assert TOKENIZER.convert_ids_to_tokens(ids)[start:] == ["blue", "grey", "blue", "grey"]
    assert len(ids) == 8
    whole, _ = encode(text, TOKENIZER, 32)
    assert TOKENIZER.convert_ids_to_tokens(whole)[-2:] == ["grey", "</s>"]
