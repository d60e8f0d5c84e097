"""The shapes of the two mini models, and their tokenizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from fluxlib.models import DeepseekMoeConfig, DeepseekMoeForCausalLM, LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.models.loading import MINI
from fluxlib.tasks import mini

LARGEST_NUMBER = 59


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that any generated task can hold, sorted; the mini models' tokenizer is made of it."""
    fixed = """question solution answer goal instruction context response brings more then loses how many are there
        take the and start do you"""
    world = [mini.WORLD[part] for part in mini.PARTS], mini.names()
    things = mini.words_of(fixed, mini.PEOPLE, mini.LABELS, *world)
    marks = {"+", "-", "*", "=", ";", ",", ".", "?", ":", "####"}
    return tuple(sorted(things | marks)) + tuple(map(str, range(LARGEST_NUMBER + 1)))


def build_tokenizer() -> Any:
    """Word-level tokenizer over the mini world's vocabulary: lower case, one token per word, mark or number."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: index for index, word in enumerate((*special, *vocabulary()))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_model(name: str, vocab_size: int) -> nn.Module:
    """A mini model with random weights (global torch generator)."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if name == "mini-llama-moe":
        return LlamaMoeForCausalLM(
            LlamaMoeConfig(
                **shared,
                num_key_value_heads=4,
                num_hidden_layers=6,
                intermediate_size=16 * 96,
                num_experts=16,
                num_selects=4,
                gate_network="mlp",
                gate_add_noise=False,
                score_scale_factor=4.0,
                rms_norm_eps=1e-5,
            )
        )
    if name == "mini-deepseek-moe":
        return DeepseekMoeForCausalLM(
            DeepseekMoeConfig(
                **shared,
                num_key_value_heads=4,
                num_hidden_layers=7,
                intermediate_size=256,
                moe_intermediate_size=48,
                n_routed_experts=32,
                n_shared_experts=2,
                num_experts_per_tok=6,
                first_k_dense_replace=1,
                norm_topk_prob=True,
            )
        )
    raise ValueError(f"model is {name!r}, allowed are {', '.join(MINI)}")
