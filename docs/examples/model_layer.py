"""A transformer layer with sliding-window attention, trained on a task that needs no more than its window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnreg import LocalAttention, Window


class Layer(nn.Module):
    """Attention inside a window, then a feed-forward network, each added to its input."""

    def __init__(self, width: int, heads: int, kv_heads: int, window: Window) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * kv_heads * self.head_dim)
        self.attention = LocalAttention(window)
        self.distance = nn.Parameter(torch.zeros(heads, 1, window.size))  # a bias for each distance
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(N, L, width) in and out. Query, key and value are views, and so is the output: nothing is copied."""
        query = self.query(inputs).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key_value = self.key_value(inputs).unflatten(-1, (2, self.kv_heads, self.head_dim))
        key, value = key_value.permute(2, 0, 3, 1, 4)
        attended = self.attention(query, key, value, bias=self.distance, key_lengths=lengths)
        inputs = inputs + self.output(attended.transpose(1, 2).flatten(2))
        return inputs + self.feed_forward(inputs)


torch.manual_seed(0)
symbols, width = 16, 64
model = nn.Sequential(
    nn.Embedding(symbols, width), Layer(width, heads=4, kv_heads=2, window=Window.causal(8)), nn.Linear(width, symbols)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(201):
    text = torch.randint(symbols, (16, 64))
    logits = model(text)
    loss = nn.functional.cross_entropy(logits[:, 4:].flatten(0, 1), text[:, :-4].flatten())  # say what was four ago
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.2f}")
