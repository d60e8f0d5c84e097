"""Where models come from: LLaMA-MoE and DeepSeek-MoE as transformers v5 classes, and models by name.

Importing this package makes the two models known to transformers.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from fluxlib.models.checkpoints import write_checksums
from fluxlib.models.deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from fluxlib.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.models.loading import config, known, load, load_tokenizer, resolve, torch_device
from fluxlib.models.saving import export

for made in (LlamaMoeForCausalLM, DeepseekMoeForCausalLM):
    AutoConfig.register(made.config_class.model_type, made.config_class, exist_ok=True)
    AutoModelForCausalLM.register(made.config_class, made, exist_ok=True)
