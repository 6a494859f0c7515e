"""`torch.onnx.export` is refused in words, by either exporter, whatever is installed for it."""

import importlib.util
from functools import partial

import pytest
import torch
from inputs import make_inputs
from torch import nn
from torch.onnx._internal.exporter._flags import set_onnx_exporting_flag

from titans_kernels import NeuralMemory, neural_memory
from titans_kernels.layers import TitansMAC

WORD = "torch.onnx.export: got a neural memory, for which ONNX has no operators"


class Operator(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"requires_grad": False, "dtype": torch.float32}
        self.inputs = make_inputs(1, 6, 1, 4, 6, 1, **options)

    def forward(self, x):
        return neural_memory(**self.inputs | {"q": x})[0]


def _by_torch_export(model, args, f):
    """What is first done to a model, up to where onnxscript is needed."""
    return set_onnx_exporting_flag(torch.export.export)(model, args)


INSTALLED = importlib.util.find_spec("onnxscript") is not None
EXPORTERS = {
    "torch.export": partial(torch.onnx.export, dynamo=True) if INSTALLED else _by_torch_export,
    "TorchScript": partial(torch.onnx.export, dynamo=False),
}
MODELS = {
    "layer": (lambda: NeuralMemory(8, heads=2), (1, 6, 8)),
    "block": (lambda: nn.Sequential(nn.Linear(8, 8), TitansMAC(8, heads=2)), (1, 6, 8)),
    "operator": (Operator, (1, 6, 1, 4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("model", MODELS)
def test_onnx_is_refused(model, exporter, tmp_path):
    make, shape = MODELS[model]
    with pytest.raises(Exception, match=WORD) as found:
        EXPORTERS[exporter](make().eval(), (torch.randn(shape),), str(tmp_path / "model.onnx"))
    causes = [found.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-1], NotImplementedError)
    assert not list(tmp_path.iterdir())
