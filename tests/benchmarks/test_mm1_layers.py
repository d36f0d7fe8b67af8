"MM1's experts beside a dense layer with the same active products: top-2 of 8, each half as wide, on the same BLAS."

import pytest
import torch
from timing import seconds_of
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mllm_replica.mm1.experts import Experts, Router, SparseMLP, auxiliary_loss, record_routing

WIDTH, INNER, EXPERTS = 512, 1376, 8  # the dense layer of a width-512 Llama
AIM = 1.5


def step(layer, x, backward):
    "One forward, or one forward and backward with the router's losses."
    with torch.set_grad_enabled(backward), record_routing(layer) as routings:
        out = layer(x)
    if not backward:
        return
    layer.zero_grad()
    x.grad = None
    (out.square().mean() + (auxiliary_loss(routings) if routings else 0)).backward()


@pytest.mark.parametrize('load', ('even', 'uneven'))
@pytest.mark.parametrize('rows, length', [(2, 2048), (4, 2048)])
@pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))
def test_experts_beside_a_dense_layer(rows, length, backward, load, use, judge):
    use('BLAS')  # the dense layer has no other
    torch.manual_seed(0)
    dense = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER))
    sparse = SparseMLP(Router(WIDTH, EXPERTS, std=WIDTH**-0.5), Experts(EXPERTS, WIDTH, INNER // 2))
    common = load == 'uneven'  # a common direction draws all tokens to a few experts
    x = (torch.randn(rows, length, WIDTH) + common).requires_grad_()
    for layer in (dense, sparse):
        step(layer, x, backward)

    def measure():
        pairs = [[seconds_of(lambda: step(layer, x, backward)) for layer in (sparse, dense)] for _ in range(5)]
        ours, best = (min(times) for times in zip(*pairs))
        return ours / best

    judge(f'experts ÷ dense, {rows}, {load}', measure, AIM, 'BLAS', backward)
