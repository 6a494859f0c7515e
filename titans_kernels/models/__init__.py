"""Titans language models for Hugging Face transformers: `pip install 'titans_kernels[hf]'`.

Importing this registers them: `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`,
`AutoModelForSequenceClassification` and `AutoModelForTokenClassification` then know "titans".
"""

from ..adapt.versions import check_transformers

check_transformers()  # before an import fails for a name that an older one lacks

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..adapt.cache import TitansCache  # noqa: E402
from .classification import (  # noqa: E402
    TitansForSequenceClassification,
    TitansForTokenClassification,
)
from .configuration import TitansConfig  # noqa: E402
from .modeling import TitansForCausalLM, TitansModel, TitansPreTrainedModel  # noqa: E402

AutoConfig.register("titans", TitansConfig, exist_ok=True)
AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    TitansConfig, TitansForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(TitansConfig, TitansForTokenClassification, exist_ok=True)

__all__ = [
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansForTokenClassification",
    "TitansModel",
    "TitansPreTrainedModel",
]
