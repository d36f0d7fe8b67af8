"""MM1's mixture of experts: the worked numbers, a token-by-token reference, up-cycling, and its losses under checkpointing and accumulation."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from mllm_replica.mm1.experts import (
    Experts,
    Router,
    SparseMLP,
    auxiliary_loss,
    expert_capacity,
    insert_experts,
    queue_positions,
    record_routing,
    route,
)
from mllm_replica.models.cost import as_fake, count

CASE = yaml.safe_load((Path(__file__).parent / 'golden' / 'mm1' / 'moe_router.yaml').read_text())
CONFIG = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
)
NUMBERS = dict(rtol=1e-6, atol=2e-9)  # the file has nine digits


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def model(every=2, num_experts=8, dtype=torch.float32, **more):
    found = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).eval()
    insert_experts(found, every, num_experts, **more)
    for layer in found.model.layers[every - 1 :: every]:
        layer.mlp.router.weight.data.normal_(std=0.5)  # decided routers, uneven loads
    return found


def ids(rows=2, length=16):
    return torch.randint(0, 60, (rows, length))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize('name', ['no_capacity', 'with_capacity_2'])
def test_worked_example(name):
    case, logits = CASE[name], tensor(CASE['logits'])
    capacity = case.get('capacity', {}).get('capacity')
    routing = route(logits, capacity)

    def agree(found, expected):
        return torch.testing.assert_close(found, tensor(expected), **NUMBERS)

    agree(logits.softmax(-1), case['probs'])
    assert routing.experts.T.tolist() == [case['top1'], case['top2']]
    agree(logits.softmax(-1).gather(1, routing.experts).T, [case['gate1_raw'], case['gate2_raw']])
    agree(routing.gates.T, [case['gate1'], case['gate2']])
    agree(routing.load.double(), case['frac_top1']) if name == 'no_capacity' else None
    agree(logits.softmax(-1).mean(0), case['mean_prob'])
    agree(routing.balance, case['load_balance_loss'])
    agree(logits.logsumexp(-1), case['logsumexp'])
    agree(routing.z, case['router_z_loss'])
    agree(auxiliary_loss([routing]), case['aux_total_0p01_lb_plus_0p001_z'])
    if capacity:
        positions = queue_positions(routing.experts, 4, capacity).T
        assert positions.tolist() == [case['capacity']['position_top1'], case['capacity']['position_top2']]
        assert (positions < capacity).tolist() == [case['capacity']['kept_top1'], case['capacity']['kept_top2']]
        assert routing.kept.T.tolist() == (positions < capacity).tolist()
        agree((routing.gates * routing.kept).T, [case['capacity']['combine_gate1'], case['capacity']['combine_gate2']])
    linear = case['expert_outputs_linear']
    layer = SparseMLP(Router(2, 4), Experts(4, 2, 2, 'linear', gated=False)).double()
    layer.experts.up_proj.data, layer.experts.down_proj.data = (
        torch.eye(2).double().repeat(4, 1, 1),
        tensor(linear['W']).mT.contiguous(),
    )
    agree(layer.mix(tensor(linear['x']), routing), linear['y'])


def test_choices_that_are_zero_in_single_precision():
    assert route(torch.tensor([[200.0, 0, 50, -3]])).experts.tolist() == [[0, 2]]


@pytest.mark.parametrize('capacity', [0, -1])
def test_a_capacity_that_is_none(capacity):
    with pytest.raises(ValueError, match=f'capacity is {capacity}; expected at least 1'):
        route(torch.zeros(3, 4), capacity)


def test_limits_of_the_losses():
    zeros = route(torch.zeros(7, 4))
    assert zeros.experts.tolist() == [[0, 1]] * 7 and zeros.balance == 1  # ties go to the lower number
    assert zeros.z.item() == pytest.approx(CASE['balanced']['z_loss_zero_logits_E4'], rel=1e-6)
    collapsed = CASE['collapse_example']
    assert route(tensor([collapsed['P']]).log()).balance.item() == pytest.approx(collapsed['load_balance_loss'])
    assert route(torch.tensor([[200.0, 0, 0]])).experts.tolist() == [[0, 1]] and route(
        torch.tensor([[200.0, 0, 0]])
    ).gates.tolist() == [[1, 0]]


def test_capacity_of_axlearn():
    assert [
        expert_capacity(n, e, f) for n, e, f in ((4096, 64, 2.0), (100, 8, 2.0), (6, 8, 2.0), (20, 4, 1.0), (7, 4, 1.0))
    ] == [128, 28, 1, 8, 1]


@pytest.mark.parametrize('seed', range(4))
def test_queue(seed):
    "First choices in order, then second choices, behind those that were kept."
    experts = route(torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))).experts
    queue, positions = [0] * 5, torch.zeros(30, 2, dtype=torch.long)
    for choice in (0, 1):
        asked = list(queue)
        for token, e in enumerate(experts[:, choice].tolist()):
            positions[token, choice] = asked[e]
            asked[e] += 1
        queue = [min(7, n) for n in asked]
    found = queue_positions(experts, 5, 7)
    assert torch.equal(found, positions) and 0 < (found < 7).sum() < 60


def token_by_token(layer, x):
    "What a sparse layer means."
    rows = []
    for token in x.flatten(0, -2):
        p = (layer.router.weight @ token).softmax(-1)
        gates, chosen = p.topk(2)
        row = 0
        for gate, e in zip(gates / (gates.sum() + 1e-9), chosen):
            inner = layer.experts.up_proj[e] @ token
            if layer.experts.gated:
                inner = layer.experts.activation(inner.chunk(2)[0]) * inner.chunk(2)[1]
            else:
                inner = layer.experts.activation(inner)
            row = row + gate * (layer.experts.down_proj[e] @ inner)
        rows.append(row)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('rows, length, num_experts', [(1, 1, 2), (1, 1, 8), (2, 3, 3), (3, 11, 8), (1, 40, 64)])
def test_grouped_form_means_the_same(rows, length, num_experts, gated):
    "Outputs and all gradients, also where most experts are without a token."
    layer = SparseMLP(
        Router(6, num_experts, std=1.0),
        Experts(num_experts, 6, 5, 'silu' if gated else 'gelu_pytorch_tanh', gated, std=0.5),
    ).double()
    x, found = torch.randn(rows, length, 6, dtype=torch.float64), []
    for forward in (layer, lambda x: token_by_token(layer, x)):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = forward(inputs)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        found.append([out.detach(), inputs.grad] + [p.grad.clone() for p in layer.parameters()])
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)
    used = set(layer.router(x.flatten(0, 1)).experts.flatten().tolist())
    for e in set(range(num_experts)) - used:
        assert layer.experts.up_proj.grad[e].abs().max() == layer.experts.down_proj.grad[e].abs().max() == 0


@pytest.mark.parametrize('dtype, limit', [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('every, num_experts', [(1, 2), (2, 8), (4, 5)])
def test_up_cycling_changes_nothing(every, num_experts, dtype, limit):
    "Whatever the router: the gates sum to 1, but for the 1e-9 in their divisor."
    dense = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).eval()
    sparse, tokens = copy.deepcopy(dense), ids()
    insert_experts(sparse, every, num_experts)
    assert [i for i, layer in enumerate(sparse.model.layers) if isinstance(layer.mlp, SparseMLP)] == list(
        range(every - 1, 4, every)
    )
    for layer in sparse.model.layers[every - 1 :: every]:
        layer.mlp.router.weight.data.normal_()
    a, b = dense(tokens).logits.double(), sparse(tokens).logits.double()
    assert (a - b).abs().max() <= limit * a.abs().max()


def test_experts_are_copies_that_part():
    "After a step they differ from each other."
    found = model()
    experts = found.model.layers[1].mlp.experts
    assert experts.up_proj.shape == (8, 96, 32) and (experts.up_proj == experts.up_proj[:1]).all()
    optimizer = torch.optim.SGD(found.parameters(), 0.1)
    tokens = ids()
    found(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_new_experts_of_another_width():
    found = LlamaForCausalLM(LlamaConfig(**CONFIG))
    insert_experts(found, 4, 3, intermediate_size=24)
    experts = found.model.layers[3].mlp.experts
    assert experts.up_proj.shape == (3, 48, 32) and experts.down_proj.shape == (3, 32, 24)
    assert experts.up_proj.std().item() == pytest.approx(found.config.initializer_range, rel=0.1)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_state_returns_and_generation_with_cache():
    found, again, tokens = model(), model(), ids(1, 8)
    again.load_state_dict(found.state_dict())
    assert torch.equal(found(tokens).logits, again(tokens).logits)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(found.generate(tokens, **settings), again.generate(tokens, use_cache=False, **settings))


def test_rows_of_a_batch_do_not_meet():
    found, tokens = model(), ids(3)
    assert torch.allclose(found(tokens).logits[1:2], found(tokens[1:2]).logits, atol=1e-5)


def test_dropped_tokens_get_nothing():
    layer = SparseMLP(Router(6, 4, capacity_factor=0.5, std=1.0), Experts(4, 6, 5, std=0.5))
    x = torch.randn(40, 6)
    routing, out = layer.router(x), layer(x)
    assert routing.kept.sum() <= 4 * expert_capacity(40, 4, 0.5) < 80
    dropped = ~routing.kept.any(1)
    assert dropped.any() and out[dropped].abs().max() == 0 and (out[~dropped].abs().amax(1) > 0).all()


def test_router_is_single_precision():
    router, x = Router(64, 8, std=1.0), torch.randn(50, 64)
    with torch.autocast('cpu', torch.bfloat16):
        logits = router(x).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, router(x).logits)
    low = copy.deepcopy(router).bfloat16()
    assert low(x.bfloat16()).logits.dtype == torch.float32
    layer = SparseMLP(router, Experts(8, 64, 16))
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    assert (out.float() - layer(x)).abs().max() < 0.02 * layer(x).abs().max()


def gradients(found, tokens, **checkpointing):
    found = copy.deepcopy(found).train()
    enable = (
        getattr(found, 'activation_checkpointing_enable', None) or found.gradient_checkpointing_enable
    )  # the older name
    if checkpointing:
        enable(checkpointing)
    with record_routing(found) as routings:
        loss = found(tokens, labels=tokens).loss
    extra = auxiliary_loss(routings)
    (loss + extra).backward()
    assert len(routings) == 2  # a layer computed again is not heard again
    assert not any(module._forward_hooks for module in found.modules() if isinstance(module, Router))
    return extra.detach(), {name: p.grad for name, p in found.named_parameters()}


def test_losses_survive_checkpointing():
    found, tokens = model(), ids()
    (plain, expected), (again, computed) = gradients(found, tokens), gradients(found, tokens, use_reentrant=False)
    assert plain == again
    for name, grad in expected.items():
        torch.testing.assert_close(computed[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    alone = copy.deepcopy(found)
    alone(tokens, labels=tokens).loss.backward()
    for name, p in alone.named_parameters():  # the auxiliary loss teaches something, all the way down
        if name.endswith('router.weight') or name == 'model.layers.0.self_attn.v_proj.weight':
            assert (p.grad - expected[name]).abs().max() > 1e-6


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(RuntimeError, match='use_reentrant=False'):
        gradients(model(), ids(), use_reentrant=True)
    found = model()
    with torch.no_grad(), record_routing(found) as routings:
        found(ids())
    assert not auxiliary_loss(routings).requires_grad


def test_losses_follow_accumulation():
    "Two parts of a batch, each at half weight, give the mean of their gradients."
    found, parts = model(), [ids(), ids()]
    apart = [gradients(found, part)[1] for part in parts]
    found.train()
    for part in parts:
        with record_routing(found) as routings:
            loss = found(part, labels=part).loss
        ((loss + auxiliary_loss(routings)) / 2).backward()
    for name, p in found.named_parameters():
        torch.testing.assert_close(p.grad, (apart[0][name] + apart[1][name]) / 2, rtol=1e-5, atol=1e-7, msg=name)


def test_balance_loss_evens_the_load():
    torch.manual_seed(1)
    router, x = Router(16, 8, std=0.5), torch.randn(512, 16) + 1
    optimizer, entropy = torch.optim.Adam(router.parameters(), 0.05), []
    for _ in range(60):
        routing = router(x)
        entropy.append(torch.special.entr(routing.load).sum().item())
        optimizer.zero_grad()
        auxiliary_loss([routing]).backward()
        optimizer.step()
    assert entropy[-1] > 0.9 * math.log(8) and entropy[-1] > entropy[0] + 0.1, entropy[::20]


def test_plans_count_two_experts_of_many():
    "On tensors without data: as many products as a dense layer of twice the width, and the router."
    width, inner, n = 32, 24, 64
    flops = {}
    for name, make in (
        ('dense', lambda: LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=2 * inner))),
        ('sparse', lambda: SparseMLP(Router(width, 8), Experts(8, width, inner))),
    ):
        with torch.device('meta'):
            module = make()
        with as_fake(module):
            flops[name] = count(lambda: module(torch.randn(2, n // 2, width, requires_grad=True)))
    router = 2 * n * width * 8
    assert (
        flops['sparse'].forward == flops['dense'].forward + router
        and flops['sparse'].backward == flops['dense'].backward + 2 * router
    )


def test_refusals():
    found = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for arguments, said in (((0, 8), 'every 0th'), ((5, 8), 'every 5th of 4 layers'), ((2, 1), '2 or more')):
        with pytest.raises(ValueError, match=said):
            insert_experts(found, *arguments)
    with pytest.raises(ValueError, match='capacity_factor'):
        insert_experts(found, 2, 4, capacity_factor=0.0)
    with pytest.raises(NotImplementedError, match='mlp_bias=True'):
        insert_experts(LlamaForCausalLM(LlamaConfig(**CONFIG, mlp_bias=True)), 2, 4)
    assert not any(isinstance(layer.mlp, SparseMLP) for layer in found.model.layers)
    insert_experts(found, 4, 2)
    with pytest.raises(NotImplementedError, match='SparseMLP'):
        insert_experts(found, 2, 2)
    with pytest.raises(ValueError, match='no router was heard'):
        auxiliary_loss([])
