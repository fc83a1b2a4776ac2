#!/usr/bin/env python3
"""An embedding layer whose rows live in Lapse, trained by autograd: which of 200 things belong to the same of 4 groups?

    python bindings/embedding.py
    python -m lapse run -s 2 python bindings/embedding.py
"""
import sys

import lapse

try:
    import torch
except ImportError:
    sys.exit("bindings/embedding.py needs PyTorch: pip install lapse[torch]")

THINGS, GROUPS, LENGTH = 200, 4, 8
STEPS, BATCH, RATE = 300, 256, 5.0


class Embedding(torch.nn.Module):
    """Rows are pulled when they are used; `step` pushes what their gradients say. It adds, so workers train the same rows at once."""

    def __init__(self, kv):
        super().__init__()
        self.kv, self.used = kv, []

    def forward(self, things):
        keys, places = torch.unique(things, return_inverse=True)
        rows = torch.empty(len(keys), self.kv.get_key_size())
        self.kv.pull(keys, rows)
        rows.requires_grad_()           # from here on autograd looks on: pull comes before
        self.used.append((keys, rows))
        return rows[places]

    def step(self, rate):
        for keys, rows in self.used:
            self.kv.push(keys, -rate * rows.grad)
        self.used.clear()


def batch(random):
    pairs = torch.randint(THINGS, (BATCH, 2), generator=random)
    return pairs, (pairs % GROUPS).diff(dim=1).eq(0).squeeze(1).float()


def train(kv, seed):
    random = torch.Generator().manual_seed(seed)
    embedding, losses = Embedding(kv), []
    following = batch(random)
    for _ in range(STEPS):
        pairs, same = following
        following = batch(random)
        kv.localize(following[0].flatten(), True)       # the rows of the next step come while this one works
        first, second = embedding(pairs).unbind(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits((first * second).sum(1), same)
        loss.backward()
        embedding.step(RATE)
        losses.append(loss.item())
    return losses


def main():
    torch.set_num_threads(1)
    lapse.setup(THINGS, 1)
    server = lapse.Server(LENGTH)
    kv = lapse.Worker(0, server)
    kv.begin_setup()
    if server.my_rank() == 0:
        kv.set(torch.arange(THINGS), torch.randn(THINGS, LENGTH, generator=torch.Generator().manual_seed(0)))
    kv.end_setup()
    losses = train(kv, seed=1 + server.my_rank())
    print(f"node {server.my_rank()}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    kv.finalize()
    server.shutdown()


if __name__ == "__main__":
    main()
