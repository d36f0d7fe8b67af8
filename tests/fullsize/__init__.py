"Modules at the sizes of the papers: what `benchmarks/` times, and `test_fullsize.py` counts and compares."

import torch
from torch.utils.flop_counter import FlopCounterMode

MATMUL_FLOPS = 2 * 2048**3  # of the matrix product beside which modules are measured


def close(found, expected):
    "Whether two results differ by rounding alone."
    return (found - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1)


def convolution_backward(grad_shape, x_shape, weight_shape, *rest, **kwargs):
    "FLOPs of a convolution's two gradients; torch's own formula takes depthwise for dense."
    return 2 * 2 * torch.Size(grad_shape).numel() * torch.Size(weight_shape[1:]).numel()


def flops(function, backward=False):
    "FLOPs in units of the product's; for modules on the meta device, so without memory."
    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        out = function()
        if backward:
            out.backward(torch.empty_like(out))
    return counter.get_total_flops() / MATMUL_FLOPS
