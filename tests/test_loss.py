"Properties of the chunked loss beyond the notebook's example: chunk sizes, dtypes, frozen inputs, autocast, evaluation."

import pytest
import torch
from torch.nn.functional import cross_entropy

from mllm_replica.data.encoded import IGNORED
from mllm_replica.models.loss import chunked_cross_entropy


def inputs(positions=37, width=8, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(positions, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    labels[torch.rand(positions, generator=generator) < 0.5] = IGNORED
    return hidden_states.requires_grad_(), weight.requires_grad_(), labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize('chunk_size', [1, 7, 19, 1000, None])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_equals_full_logits(chunk_size, reduction):
    hidden_states, weight, labels = inputs()
    ours = chunked_cross_entropy(hidden_states, weight, labels, chunk_size, reduction)
    full = cross_entropy(hidden_states @ weight.T, labels, reduction=reduction)
    torch.testing.assert_close(ours, full)
    for a, b in zip(gradients(3 * ours, hidden_states, weight), gradients(3 * full, hidden_states, weight)):
        torch.testing.assert_close(a, b)


def test_double_precision_gradients_are_numerically_right():
    hidden_states, weight, labels = inputs(5, 3, 6, torch.float64)
    step = 1e-3
    (grad,) = gradients(chunked_cross_entropy(hidden_states, weight, labels), weight)
    moved = [weight.detach().clone() for _ in range(2)]
    moved[0][2, 1] += step
    moved[1][2, 1] -= step
    up, down = (cross_entropy(hidden_states @ w.T, labels) for w in moved)
    assert abs((up - down).item() / (2 * step) - grad[2, 1].item()) < 1e-6


def test_frozen_sides_and_evaluation():
    hidden_states, weight, labels = inputs()
    both = gradients(chunked_cross_entropy(hidden_states, weight, labels), hidden_states, weight)
    assert torch.equal(
        gradients(chunked_cross_entropy(hidden_states, weight.detach(), labels), hidden_states)[0], both[0]
    )
    assert torch.equal(gradients(chunked_cross_entropy(hidden_states.detach(), weight, labels), weight)[0], both[1])
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden_states, weight, labels).requires_grad


def test_ignored_rows_are_never_read():
    hidden_states, weight, labels = inputs()
    poisoned = hidden_states.detach().clone()
    poisoned[labels == IGNORED] = float('nan')
    poisoned.requires_grad_()
    loss = chunked_cross_entropy(poisoned, weight, labels, chunk_size=4)
    grad_hidden, grad_weight = gradients(loss, poisoned, weight)
    assert loss.isfinite() and grad_weight.isfinite().all() and not grad_hidden[labels == IGNORED].any()


def test_bf16_keeps_an_fp32_loss_and_the_inputs_dtype():
    hidden_states, weight, labels = inputs(dtype=torch.bfloat16)
    loss = chunked_cross_entropy(hidden_states, weight, labels, chunk_size=5)
    full = cross_entropy(hidden_states.float() @ weight.float().T, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=1e-2, atol=1e-2)
    for a, b in zip(gradients(loss, hidden_states, weight), gradients(full, hidden_states, weight)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-2)


def test_autocast_returns_gradients_in_the_dtype_of_the_parameters():
    hidden_states, weight, labels = inputs()
    with torch.autocast('cpu', torch.bfloat16):
        loss = chunked_cross_entropy(hidden_states.bfloat16(), weight, labels)
    grad_hidden, grad_weight = gradients(loss, hidden_states, weight)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.float32)
    (expected,) = gradients(cross_entropy(hidden_states @ weight.T, labels), weight)
    torch.testing.assert_close(grad_weight, expected, rtol=0.05, atol=2e-2)
