"""The demo behind ``attnreg demo``: a small byte-level language model on ``LocalAttention``. Meant to be copied from.

Three parts, each of use alone: the model, ``train``, which yields the loss of every step, and ``measure``, which times
one window and compares it with float64. Nothing here prints; that is the command's work.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnreg.dispatch import Decision
from attnreg.functional import local_attention
from attnreg.inspection import explain
from attnreg.modules import LocalAttention
from attnreg.window import Window

BYTES = 256


class Attention(nn.Module):
    """Local attention between its projections, with a learned bias for each distance.

    That bias is all that the model knows of the order of bytes: it has no position embedding.
    """

    def __init__(self, width: int, heads: int, window: Window, backend: str | None) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.distance = nn.Parameter(torch.zeros(heads, 1, window.size))
        self.attention = LocalAttention(window, backend=backend)
        self.output = nn.Linear(width, width, bias=False)

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (N, H, L, E) each, of inputs (N, L, width); views, which attnreg takes as they lie."""
        projected = self.query_key_value(inputs).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, inputs: Tensor) -> Tensor:
        """Each position's mixture of those that it sees, (N, L, width) in and out."""
        attended = self.attention(*self.project(inputs), bias=self.distance)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, window: Window, backend: str | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, window, backend)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Both halves of the layer, each added to what comes in, (N, L, width)."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Predicts each next byte of a text. A layer sees ``window`` bytes back, the stack ``layers * (window - 1) + 1``.

    Args:
        window: how many keys a query sees, its own position the last.
        width, heads, layers: the model's sizes.
        backend: the attention backend, by name; None lets attnreg choose.
        seed: of the parameters, which are drawn on the CPU: every backend and device starts from the same ones.
    """

    def __init__(
        self,
        *,
        window: int = 32,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(BYTES, width)
            self.layers = nn.ModuleList(Layer(width, heads, Window.causal(window), backend) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.logits = nn.Linear(width, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (N, L, 256) for the byte after each one of ``text`` (N, L)."""
        hidden = self.embedding(text)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.logits(self.norm(hidden))  # type: ignore[no-any-return]

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross-entropy of each byte of ``text`` (N, L) but the first, in bits."""
        logits = self(text[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


def train(
    model: LanguageModel,
    text: Tensor,
    *,
    steps: int,
    batch: int = 8,
    context: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Train ``model`` on random slices of ``text``; yields each step's loss, in bits per byte, after the step.

    The order of the slices depends on ``seed`` alone, so two runs with different backends differ by rounding only.

    Args:
        model: on the device where it is to be trained.
        text: bytes as a one-dimensional integer tensor, more than ``context`` of them.
        steps: how many optimizer steps.
        batch: slices a step.
        context: predicted bytes a slice.
        learning_rate: reached after a short warm-up, then falling to 0 along a cosine.
        seed: of the order of the slices.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    warm_up = min(20, max(steps // 10, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2),
    )
    for _ in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        loss = model.loss(text[starts + torch.arange(context + 1)].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor, *, context: int = 128, slices: int = 32) -> float:
    """The loss on the first slices of ``text``, side by side, in bits per byte."""
    device = next(model.parameters()).device
    return model.loss(text.unfold(0, context + 1, context)[:slices].to(device)).item()


@torch.no_grad()
def first_layer(model: LanguageModel, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (1, H, L, E) of the first layer reading ``text``: real input to measure with."""
    device = next(model.parameters()).device
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    return layer.attention.project(layer.attention_norm(model.embedding(text[None].to(device))))


@dataclass(frozen=True)
class Measurement:
    """One window, measured.

    Attributes:
        window: the window.
        decision: which backend ran, and why.
        seconds: the median time of forward and backward together.
        output_error: the largest error of the output against float64, relative to the output's largest element.
        gradient_error: the same for the worst of the gradients of query, key and value.
    """

    window: Window
    decision: Decision
    seconds: float
    output_error: float
    gradient_error: float


def measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    backend: str | None = None,
    runs: int = 5,
    budget: float = 1.0,
) -> Measurement:
    """Run ``local_attention`` forward and backward on one window: what was chosen, how long it takes, how exact it is.

    Args:
        query: (N, H, L, E).
        key: as query.
        value: as query.
        window: a causal window.
        backend: the backend to use, by name; None lets attnreg choose.
        runs: how many runs to time at most, after one that is not timed.
        budget: seconds after which no further run is started.

    Raises:
        BackendError: the backend asked for cannot run it, or none can.
    """
    query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    # Not a gradient of ones: under it a gradient with its window flipped would look right.
    grad_output = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)

    def run() -> tuple[Tensor, ...]:
        output = local_attention(query, key, value, window, backend=backend)
        return output, *torch.autograd.grad(output, (query, key, value), grad_output)

    decision = explain(query, key, value, window, backend=backend)
    output, *gradients = run()
    exact_output, *exact_gradients = _in_float64(query, key, value, window, grad_output)
    times: list[float] = []
    while not times or (len(times) < runs and sum(times) < budget):
        _synchronize(query.device)
        start = time.perf_counter()
        run()
        _synchronize(query.device)
        times.append(time.perf_counter() - start)
    return Measurement(
        window=window,
        decision=decision,
        seconds=statistics.median(times),
        output_error=_error(output, exact_output),
        gradient_error=max(map(_error, gradients, exact_gradients)),
    )


def _in_float64(query: Tensor, key: Tensor, value: Tensor, window: Window, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients by a dense masked softmax, with nothing of attnreg in it but the meaning of a window."""
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in (query, key, value))
    offset = torch.arange(key.shape[2], device=key.device) - torch.arange(query.shape[2], device=key.device)[:, None]
    hidden = (offset < -window.left) | (offset > window.right)
    scores = (query @ key.transpose(2, 3)) * query.shape[3] ** -0.5
    output = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    return output, *torch.autograd.grad(output, (query, key, value), grad_output.double())


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).abs().max() / exact.abs().max()).item()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def own_text() -> bytes:
    """A real text that every installation has: attnreg's README, from the installed metadata, and its own source."""
    readme = metadata.metadata("attnreg").json.get("description", "")
    sources = sorted(file.name for file in resources.files("attnreg").iterdir() if file.name.endswith(".py"))
    return b"\n".join(
        [str(readme).encode(), *(resources.files("attnreg").joinpath(name).read_bytes() for name in sources)]
    )


def split(text: bytes, context: int = 128) -> tuple[Tensor, Tensor]:
    """``text`` as two tensors of bytes, to train on and, its last tenth or at least one slice, held out.

    Raises:
        ValueError: the text is too short for one slice in each.
    """
    if len(text) < 2 * (context + 1):
        raise ValueError(f"the text has {len(text)} bytes, at least {2 * (context + 1)} are needed")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    held_out = max(len(data) // 10, context + 1)
    return data[:-held_out], data[-held_out:]
