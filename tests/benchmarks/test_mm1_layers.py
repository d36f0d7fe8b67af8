"""MM1's experts beside a dense layer with the same active products: top-2 of 8, each half as wide, on one thread and the same BLAS."""
import time

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mllm_replica import layers
from mllm_replica.mm1.experts import Experts, Router, SparseMLP, auxiliary_loss, record_routing

WIDTH, INNER, EXPERTS = 512, 1376, 8   # the dense layer of a width-512 Llama
AIM = 1.5


def step(layer, x, backward):
    "One forward, or one forward and backward with the router's losses."
    with torch.set_grad_enabled(backward), record_routing(layer) as routings: out = layer(x)
    if not backward: return
    layer.zero_grad()
    x.grad = None
    (out.square().mean() + (auxiliary_loss(routings) if routings else 0)).backward()


def seconds(layer, x, backward):
    start = time.process_time()
    step(layer, x, backward)
    return time.process_time() - start


@pytest.mark.parametrize('load', ('even', 'uneven'))
@pytest.mark.parametrize('rows, length', [(2, 2048), (4, 2048)])
@pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))
def test_within_half_of_dense(rows, length, backward, load, monkeypatch, record_property):
    monkeypatch.setattr(layers, '_ONEDNN_PAYS', False)   # the dense layer has none either
    torch.manual_seed(0)
    dense = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER))
    sparse = SparseMLP(Router(WIDTH, EXPERTS, std=WIDTH ** -0.5), Experts(EXPERTS, WIDTH, INNER // 2))
    x = (torch.randn(rows, length, WIDTH) + (load == 'uneven')).requires_grad_()   # a common direction draws all tokens to a few experts
    for layer in (dense, sparse): step(layer, x, backward)
    pairs = [(seconds(dense, x, backward), seconds(sparse, x, backward)) for _ in range(5)]   # in turn
    best, ours = (min(times) for times in zip(*pairs))
    largest = sparse.router(x.detach().flatten(0, 1)).load.max().item()
    what = f'{rows} × {length}, {"both passes" if backward else "forward"}, {load} load (largest {largest:.2f})'
    print(f'\n{what}: dense {best:.3f} s, experts {ours:.3f} s, ratio {ours / best:.2f}')
    record_property('ratio', ours / best)
    assert ours <= AIM * best
