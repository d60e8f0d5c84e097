"""Where models come from: LLaMA-MoE and DeepSeek-MoE as transformers v5 classes, known to its Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fluxlib.models.deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, DeepseekMoeModel
from fluxlib.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM, LlamaMoeModel


def register() -> None:
    """Make the two models known to transformers' Auto classes; calling it again changes nothing."""
    for config, model, causal_lm in (
        (LlamaMoeConfig, LlamaMoeModel, LlamaMoeForCausalLM),
        (DeepseekMoeConfig, DeepseekMoeModel, DeepseekMoeForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


register()

__all__ = [
    "DeepseekMoeConfig",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeModel",
    "LlamaMoeConfig",
    "LlamaMoeForCausalLM",
    "LlamaMoeModel",
    "register",
]
