"""Products with weights, and dropout: a CPU does them faster in another way than torch; elsewhere they are torch's.

Knows nothing of models.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


def computes_in_bf16():
    """Whether this CPU has instructions for bfloat16. Without them every operation on it is slow."""
    return torch.cpu._is_avx512_bf16_supported()


class Linear(nn.Linear):
    """x W^T without a bias, in the dtype of x. W gets its values from the model as a whole, so none are drawn here."""

    product = None  # a faster function of x, without a gradient, while `packed` lasts

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        pass

    def forward(self, x):
        if self.product is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight.to(x.dtype))
        return self.product(x)


@contextlib.contextmanager
def packed(*modules):
    """While this lasts, the Linear layers of modules are fast where they have a few rows, as decoding does.

    A BLAS rearranges all of W before it multiplies, which for a few rows costs more than the product. On an x86 CPU W
    is rearranged here, once, by libraries that come with torch: for fp32 oneDNN, for weights in half precision FBGEMM,
    which keeps them in 16 bits. 8 rows times flan-t5-small's output head, two cores with AVX2: 10.6 ms by F.linear,
    3.8 by oneDNN, 2.1 by FBGEMM. The rearranged weights are a copy, which goes when this ends; weights must not change
    before. What is packed already stays so.
    """
    layers = [m for module in modules for m in module.modules() if isinstance(m, Linear) and m.product is None]
    try:
        for layer in layers:
            layer.product = pack(layer.weight.detach())
        yield
    finally:
        for layer in layers:
            layer.product = None


def pack(weight):
    """W -> the function x -> x W^T for x in fp32; None where F.linear is to do it.

    FBGEMM's 16 bits are fp16's: they hold a bfloat16 exactly from 6e-5 to 65,504, below to within 3e-8.
    """
    if not weight.is_cpu or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    if weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        w = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if weight.dtype in (torch.bfloat16, torch.float16) and has_fbgemm and not computes_in_bf16():
        weight = weight.float()
        if weight.abs().max() <= torch.finfo(torch.float16).max:
            w = torch.ops.quantized.linear_prepack_fp16(weight, None)
            return lambda x: torch.ops.quantized.linear_dynamic_fp16.default(x, w)
    return None


class Dropout(nn.Module):
    """Zeros at a rate p and the rest times 1 / (1 - p), in training alone.

    The random numbers cost more than all else. 16 bits an element, where torch draws a double, make dropout 2.1 times
    as fast and a training step 8% shorter (one core with AVX512); they hold the rate to 2**-16.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not (self.training and self.p):
            return x
        if not x.is_cpu:
            return F.dropout(x, self.p)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2**16 values
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15  # the least int16 is -2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
