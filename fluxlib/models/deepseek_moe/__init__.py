"""DeepSeek-MoE."""

from fluxlib.models.deepseek_moe.configuration import DeepseekMoeConfig
from fluxlib.models.deepseek_moe.modeling import DeepseekMoeForCausalLM, DeepseekMoeGate, DeepseekMoeModel

__all__ = ["DeepseekMoeConfig", "DeepseekMoeForCausalLM", "DeepseekMoeGate", "DeepseekMoeModel"]
