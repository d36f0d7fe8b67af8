"A loss over a large vocabulary."

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile


def full(h, w, y):
    return F.cross_entropy(h @ w.T, y)


class Step:
    "Calling it makes a forward and backward pass and returns the loss and its gradients."

    def __init__(self, loss_of, tokens=4096, width=256, vocabulary=49152):
        torch.manual_seed(0)
        self.loss_of = loss_of
        self.h = torch.randn(tokens, width, requires_grad=True)
        self.w = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
        self.y = torch.randint(0, vocabulary, (tokens,))

    def __call__(self):
        self.h.grad = self.w.grad = None
        loss = self.loss_of(self.h, self.w, self.y)
        loss.backward()
        return loss.detach(), self.h.grad, self.w.grad

    def peak_mb(self):
        "Largest sum of tensors alive during a step, as the allocator counts them, beside those that it is given."
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self()
        events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == '[memory]']
        return torch.tensor(changes).cumsum(0).max().item() / 2**20
