"""Titans language models for Hugging Face transformers: `pip install 'titans_kernels[hf]'`.

Importing this registers them: `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` then know
"titans".
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..adapt.cache import TitansCache
from .configuration import TitansConfig
from .modeling import TitansForCausalLM, TitansModel, TitansPreTrainedModel

AutoConfig.register("titans", TitansConfig, exist_ok=True)
AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)

__all__ = [
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansPreTrainedModel",
]
