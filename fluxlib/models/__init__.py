"""Where models come from: LLaMA-MoE and DeepSeek-MoE as transformers v5 classes, and models by name.

Importing this package makes the two models and the keys of their public checkpoints known to transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fluxlib.models.checkpoints import register_conversions, write_checksums
from fluxlib.models.deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, DeepseekMoeModel
from fluxlib.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM, LlamaMoeModel
from fluxlib.models.loading import config, known, load, resolve, torch_device
from fluxlib.models.saving import export, load_compact, save_compact


def register() -> None:
    """Make the two models known to transformers; calling it again changes nothing."""
    for config_class, model, causal_lm in (
        (LlamaMoeConfig, LlamaMoeModel, LlamaMoeForCausalLM),
        (DeepseekMoeConfig, DeepseekMoeModel, DeepseekMoeForCausalLM),
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal_lm, exist_ok=True)
    register_conversions()


register()

__all__ = [
    "DeepseekMoeConfig",
    "DeepseekMoeForCausalLM",
    "DeepseekMoeModel",
    "LlamaMoeConfig",
    "LlamaMoeForCausalLM",
    "LlamaMoeModel",
    "config",
    "export",
    "known",
    "load",
    "load_compact",
    "register",
    "resolve",
    "save_compact",
    "torch_device",
    "write_checksums",
]
