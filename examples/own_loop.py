"""A GPT and a training loop of one's own, as of nanoGPT, over fastft. Run it: `python examples/own_loop.py`.

Three lines differ from a plain loop: `fastft.pack` (no padding, equal beginnings once), `fastft_kernels.attention` and
`fastft.linear_cross_entropy` (logits of supervised rows alone, a chunk at a time).
"""

from __future__ import annotations

import fastft_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastft


class Block(nn.Module):
    """Attention and MLP of packed tokens, `[T, C]` -> `[T, C]`."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, visible_until: Tensor) -> Tensor:
        """A token sees those before it whose `visible_until` lies behind it: its own text, and no other."""
        q, k, v = self.qkv(self.ln_1(x)).unflatten(1, (3, self.H, -1)).unbind(1)
        x = x + self.proj(fastft_kernels.attention(q, k, v, visible_until).flatten(1))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A small GPT whose head is its token embedding."""

    def __init__(self, V: int, C: int = 32, H: int = 2, n_layer: int = 2, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(context, C)
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(n_layer))
        self.norm = nn.LayerNorm(C)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, batch: fastft.Batch) -> Tensor:
        """The mean loss of a pack."""
        x = self.tokens(batch.tokens) + self.positions(batch.positions)
        for block in self.blocks:
            x = block(x, batch.visible_until)
        return fastft.linear_cross_entropy(
            self.norm(x), self.tokens.weight, batch.targets, rows=batch.rows, row_weights=batch.weights
        )


def texts() -> list[list[int]]:
    """Bytes of questions with one beginning, and their answers."""
    return [list(f"What follows on {n}, counting up by one? {n + 1}\n".encode()) for n in range(10, 42)]


def train(steps: int = 60, batch_size: int = 8) -> list[float]:
    """The loop: the loss of each step."""
    torch.manual_seed(0)
    data, device = texts(), "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(V=256).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        some = [data[i] for i in torch.randperm(len(data))[:batch_size]]
        batch = fastft.pack([ids[:-1] for ids in some], labels=[ids[1:] for ids in some], shifted=True).to(device)
        loss = model(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
