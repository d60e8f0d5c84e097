"""Scores of a stand-in model that always predicts the next word of one fixed text."""

from types import SimpleNamespace

import pytest
import torch
from mini_bases import build_tokenizer
from torch import Tensor, nn
from transformers import DynamicCache

from fluxlib import models
from fluxlib.tasks import Example, load
from fluxlib.tasks.batches import encode
from fluxlib.tasks.evaluate import _response_nll, evaluate

TOKENIZER = build_tokenizer()


class Parrot(nn.Module):
    """Prefers ``favourite`` everywhere, by three nats."""

    def __init__(self, favourite: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(TOKENIZER)))
        with torch.no_grad():
            self.bias[TOKENIZER.convert_tokens_to_ids(favourite)] = 3.0

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1), past_key_values=DynamicCache())


def test_the_likelier_option_is_chosen() -> None:
    examples = [
        Example("Question: which?", right, "l", ("red", "blue"), ("red", "blue").index(right))
        for right in ("red", "red", "blue")
    ]
    assert evaluate(Parrot("red"), TOKENIZER, "accuracy", examples, 32).metric == pytest.approx(2 / 3)


def test_loss_is_per_response_token() -> None:
    score = evaluate(Parrot("red"), TOKENIZER, "accuracy", [Example("Question:", "red", "l", ("red", "blue"), 0)], 32)
    total = torch.log(torch.tensor(len(TOKENIZER) - 1 + torch.e**3))
    assert score.loss == pytest.approx(((total - 3) + total).item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["mini-gsm8k", "mini-dolly"])
def test_generation_does_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = models.load("mini-llama-moe")  # random weights tie where they choose a token
    task = load(name, size=40)
    many = evaluate(model, tokenizer, task.metric, task.test, 96)
    monkeypatch.setattr("fluxlib.tasks.evaluate.BATCH_TOKENS", 1)
    one = evaluate(model, tokenizer, task.metric, task.test, 96)
    assert one.metric == pytest.approx(many.metric)
    assert one.loss == pytest.approx(many.loss, rel=1e-4)


@pytest.mark.parametrize("name", ["mini-llama-moe", "mini-deepseek-moe"])
def test_a_response_that_reads_its_prompt_from_a_cache_is_scored_as_the_whole_text(name: str) -> None:
    model, tokenizer = models.load(name)
    texts = [("the moon", "red"), ("the moon", "blue and the"), ("do you", "red"), ("the ore is full of what", "zinc")]
    rows = [encode(Example(prompt, response, "l"), tokenizer, 32) for prompt, response in texts]
    nll, count = _response_nll(model, tokenizer, rows)
    for (ids, start), lost, scored in zip(rows, nll, count, strict=True):
        with torch.no_grad():
            odds = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert scored == len(ids) - start
        whole = sum(odds[at - 1, ids[at]].item() for at in range(start, len(ids)))
        assert lost.item() == pytest.approx(-whole, rel=1e-5)


def test_a_score_has_the_metric_of_each_sample() -> None:
    examples = [Example("a", right, "l", ("red", "blue"), ("red", "blue").index(right)) for right in ("red", "blue")]
    score = evaluate(Parrot("red"), TOKENIZER, "accuracy", examples, 32)
    assert (score.metric, score.of_each) == (0.5, (1.0, 0.0))


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="examples is empty"):
        evaluate(Parrot("red"), TOKENIZER, "accuracy", [], 32)
