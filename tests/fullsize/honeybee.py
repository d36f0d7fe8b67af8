"Honeybee's projectors between CLIP-L/14 and a 7B model."

from functools import lru_cache

import torch

from fullsize import flops
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


@lru_cache(1)
def build(name, device='cpu'):
    config, num_features, *_ = MODULES[name]
    with torch.device(device):
        return build_projector(config, 1024, 4096, num_features).eval(), torch.randn(1, num_features, 1024)


def step(projector, features, backward):
    "One forward, or one forward and backward to all weights, none to the features."
    with torch.set_grad_enabled(backward):
        tokens = projector(features)
    if not backward:
        return
    projector.zero_grad()
    tokens.backward(torch.ones_like(tokens))


def work(name, backward):
    "FLOPs of the module in units of the product's."
    projector, features = build.__wrapped__(name, 'meta')
    return flops(lambda: projector(features), backward)
