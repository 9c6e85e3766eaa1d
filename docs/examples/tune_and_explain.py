"""Measure the backends on one kind of call, and see what changes: who is chosen, and why."""

from __future__ import annotations

import torch

import attnreg
from attnreg import Window

device = "cuda" if torch.cuda.is_available() else "cpu"
query, key, value = torch.randn(3, 1, 4, 512, 32, device=device)
window = Window.causal(16)

before = attnreg.explain(query, key, value, window)
print(f"before: {before.backend}, {before.reason}")

# The figures go into the user's table, and calls go by them from then on; keep=False would leave it as it is.
tuned = attnreg.tune(
    ops=["local_attention"],
    dtypes=[torch.float32],
    head_dims=[32],
    lengths=[512],
    heads=[(4, 4)],
    windows=[16],
    gradients=[False],
    seconds=0.02,
    device=device,
)
for call, figures in tuned.table.rows.items():
    for name, figure in figures.items():
        print(f"W={call.window.size} {name}: {figure.reason or f'{figure.seconds * 1e3:.3f} ms'}")

after = attnreg.explain(query, key, value, window)
print(f"after: {after.backend}, {after.reason}")
print(after)
