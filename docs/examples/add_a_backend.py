"""A backend of one's own, tried without packaging it: scores by one shifted product a slot."""

from __future__ import annotations

import torch
from torch import Tensor

import attnreg
from attnreg import Backend, Capability, Window


def local_dot_product(query: Tensor, key: Tensor, window: Window, *, scale: float) -> Tensor:
    """Slot c of row i is key i - left + c. It names neither bias nor key_lengths: a call with one goes elsewhere."""
    length = query.shape[2]
    positions = torch.arange(length, device=query.device)
    scores = []
    for offset in range(-window.left, window.right + 1):
        visible = ((positions + offset >= 0) & (positions + offset < length)).unsqueeze(-1)
        shifted = key[:, :, (positions + offset).clamp(0, length - 1)].where(visible, 0.0)
        scores.append(scale * (query * shifted).sum(-1).where(visible.squeeze(-1), -torch.inf))
    return torch.stack(scores, dim=-1)


shifted = Backend(
    name="shifted",
    summary="one shifted product a slot",
    capability=Capability(dtypes={torch.float32, torch.float64}, grouped_heads=False, unequal_lengths=False),
    local_dot_product=local_dot_product,
    differentiable=True,
)

torch.manual_seed(0)
query, key = torch.randn(2, 1, 4, 100, 32, dtype=torch.float64, requires_grad=True)
window = Window.centered(8)
with attnreg.register(shifted):
    scores = attnreg.local_dot_product(query, key, window, backend="shifted")
    expected = attnreg.local_dot_product(query, key, window, backend="torch")
    upstream = torch.randn_like(scores).where(scores.isfinite(), 0.0)
    gradients = [torch.autograd.grad(each, key, upstream, retain_graph=True)[0] for each in (scores, expected)]
    print("scores agree:", torch.allclose(scores, expected), "gradients agree:", torch.allclose(*gradients))
    # What it cannot do is refused with the reason, before it is called.
    try:
        attnreg.local_dot_product(query, key[:, :2], window, backend="shifted")
    except attnreg.BackendError as error:
        print(error)
