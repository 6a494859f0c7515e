"""What `replace` did to a model, written into its configuration.

The recipe is `config.titans_kernels`, a list with an entry per call of `replace`; `save_pretrained`
writes it into config.json. transformers does not know it: loaded by transformers alone, such a
model would have random weights where its memories were. An empty tensor in the checkpoint, named
for what does load it, appears in the load report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MARK = "load_this_with_titans_kernels_from_pretrained"


def remember(model: nn.Module, names: list[str], call: dict[str, Any]) -> None:
    """Add a call of `replace` to the recipe of a model of transformers."""
    hosts = (m for m in model.modules() if hasattr(m, "base_model_prefix"))  # in wrappers too
    host: Any = next(hosts, None)
    if host is None:
        return
    call = {k: v for k, v in call.items() if k not in ("device", "dtype")}
    recipe = [*(getattr(host.config, "titans_kernels", None) or []), {"where": names} | call]
    host.config.titans_kernels = recipe
    if not hasattr(host, MARK):
        host.register_buffer(MARK, torch.zeros(0))
