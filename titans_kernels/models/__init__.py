"""Titans language models for Hugging Face transformers: `pip install 'titans_kernels[hf]'`.

Importing this registers them: `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` then know
"titans".
"""

from ..adapt.versions import check_transformers

check_transformers()  # before an import fails for a name that an older one lacks

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from ..adapt.cache import TitansCache  # noqa: E402
from .configuration import TitansConfig  # noqa: E402
from .modeling import TitansForCausalLM, TitansModel, TitansPreTrainedModel  # noqa: E402

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
