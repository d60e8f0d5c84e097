"""LLaMA-MoE v1."""

from fluxlib.models.llama_moe.configuration import LlamaMoeConfig
from fluxlib.models.llama_moe.modeling import LlamaMoeForCausalLM, LlamaMoeGate, LlamaMoeModel

__all__ = ["LlamaMoeConfig", "LlamaMoeForCausalLM", "LlamaMoeGate", "LlamaMoeModel"]
