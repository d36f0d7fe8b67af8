"""Honeybee's projectors at paper scale: never slower than the official code was and near their own FLOPs, measured beside the same matrix product."""
import time
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_replica import layers
from mllm_replica.honeybee.components import build_projector

# module: configuration, features N, official forward and forward + backward, as multiples of the product
MODULES = {
    'linear': (dict(projector_type='mlp', depth=1), 576, 0.28, 0.61),
    'MLP': (dict(projector_type='mlp', depth=2), 576, 1.53, 4.31),
    'C-Abstractor': (dict(projector_type='c-abs', num_query_tokens=144), 576, 1.09, 3.80),
    'C-Abstractor 256': (dict(projector_type='c-abs', num_query_tokens=144), 256, 0.83, 2.69),
    'D-Abstractor': (dict(projector_type='d-abs', num_query_tokens=144), 576, 1.53, 5.67),
    'resampler': (dict(projector_type='resampler', num_query_tokens=144), 576, 3.73, 10.77),
}
MATMUL_FLOPS = 2 * 2048 ** 3
SLACK = 1.2   # other processes share the machine


@lru_cache(1)
def build(name, device='cpu'):
    config, num_features, *_ = MODULES[name]
    with torch.device(device): return build_projector(config, 1024, 4096, num_features).eval(), torch.randn(1, num_features, 1024)


def step(projector, features, backward):
    "One forward, or one forward and backward to all weights, none to the features."
    with torch.set_grad_enabled(backward): tokens = projector(features)
    if not backward: return
    projector.zero_grad()
    tokens.backward(torch.ones_like(tokens))


def convolution_backward(grad_shape, x_shape, weight_shape, *rest, **kwargs):
    "FLOPs of a convolution's two gradients; torch's own formula takes depthwise for dense."
    return 2 * 2 * torch.Size(grad_shape).numel() * torch.Size(weight_shape[1:]).numel()


def bound(name, backward):
    "FLOPs of the module in units of the product's."
    projector, features = build.__wrapped__(name, 'meta')
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}) as counter:
        tokens = projector(features)
        if backward: tokens.backward(torch.empty_like(tokens))
    return counter.get_total_flops() / MATMUL_FLOPS


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize('name,kernel,backward', list(product(MODULES, ('oneDNN', 'BLAS'), (False, True))))
def test_not_slower_than_official(name, kernel, backward, ratio, table, monkeypatch, benchmark, twice_as_fast):
    if kernel == 'oneDNN' and not layers._ONEDNN_PAYS: pytest.skip('no faster product than the BLAS on this processor')
    monkeypatch.setattr(layers, '_ONEDNN_PAYS', kernel == 'oneDNN')
    projector, features = build(name)
    measured, official = ratio(lambda: step(projector, features, backward), rounds=3 if backward else 5), MODULES[name][3 if backward else 2]
    table.append((name, kernel, 'both' if backward else 'forward', measured, official, bound(name, backward)))
    benchmark.extra_info.update(dict(zip(('measured', 'official', 'bound'), table[-1][3:])))
    share = 0.7 if kernel == 'oneDNN' and twice_as_fast and name in ('D-Abstractor', 'resampler') else 1.0   # these two are to be clearly faster
    assert measured <= min(share * official, 1.3 * table[-1][-1]) * SLACK
