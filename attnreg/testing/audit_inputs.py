"""What an audited model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.printable import brief

# What ``inputs=`` takes: the arguments of one call, or a function of the length that gives them.
Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[int], Any]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call with one sequence."""

    positional: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()
    # Two dimensions that lie in memory in each other's place, as of queries that are a transpose.
    swapped: tuple[int, int] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are tensors."""
        return [each for each in (*self.positional, *dict(self.named).values()) if isinstance(each, Tensor)]

    @property
    def batched(self) -> bool:
        """Whether every tensor has a batch of one sequence, which can be repeated."""
        return all(each.dim() >= 2 and each.shape[0] == 1 for each in self.tensors)

    def repeated(self, batch: int) -> Arguments:
        """With so many copies of the sequence."""
        if not self.batched and self.swapped is None:
            return self

        def copies(given: Any) -> Any:
            if not isinstance(given, Tensor):
                return given
            some = given.repeat(batch, *[1] * (given.dim() - 1)) if self.batched else given
            return some if self.swapped is None else some.transpose(*self.swapped).contiguous().transpose(*self.swapped)

        return Arguments(tuple(map(copies, self.positional)), tuple((name, copies(each)) for name, each in self.named))

    def cast(self, dtype: torch.dtype | None) -> Arguments:
        """With floating-point tensors of another dtype."""

        def to(given: Any) -> Any:
            return (
                given.to(dtype)
                if isinstance(given, Tensor) and given.is_floating_point() and dtype is not None
                else given
            )

        return Arguments(tuple(map(to, self.positional)), tuple((name, to(each)) for name, each in self.named))


def given_arguments(given: Any) -> Arguments:
    """What the user gave, as arguments.

    Raises:
        TypeError: it is neither a tensor nor a sequence or mapping of arguments.
    """
    if isinstance(given, Tensor):
        return Arguments((given,))
    if isinstance(given, Mapping):
        return Arguments((), tuple(given.items()))
    if isinstance(given, Sequence) and not isinstance(given, str):
        return Arguments(tuple(given))
    raise TypeError(
        f"inputs must be a tensor, a sequence or a mapping of arguments, or a function of the length; got {brief(given)}"
    )


def length_of(arguments: Arguments) -> int:
    """The number of positions: the second size of the first tensor with a batch, else its first."""
    for tensor in arguments.tensors:
        if tensor.dim() >= 2:
            return int(tensor.shape[1] if tensor.shape[0] == 1 else tensor.shape[0])
    raise ValueError("inputs must have a tensor of shape (1, L, ...) or (L, ...)")


def is_language_model(model: nn.Module) -> bool:
    """Whether a model is called as those of Hugging Face are: with ``input_ids``, by a configuration with a vocabulary."""
    return _vocabulary(model) is not None and "input_ids" in parameters(model)


def parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Those of a model's forward."""
    return inspect.signature(model.forward).parameters


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument of that name."""
    return name in parameters(model)


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "text_config", None)):
        size = getattr(owner, "vocab_size", None)
        if isinstance(size, int):
            return size
    return None


def language_arguments(
    model: nn.Module,
    length: int,
    *,
    padding: tuple[int, int] = (0, 0),
    documents: tuple[int, ...] | None = None,
    with_cache: bool = False,
) -> Arguments:
    """Random tokens; padding by ``attention_mask``, packed documents by position ids that restart.

    The model makes no cache, or where ``with_cache`` what it makes unasked.
    """
    size = _vocabulary(model)
    assert size is not None
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(min(3, size - 1), size, (1, length), generator=generator).to(device)
    named: dict[str, Any] = {"input_ids": tokens}
    if padding != (0, 0):
        mask = torch.ones(1, length, dtype=torch.long, device=device)
        mask[:, : padding[0]] = 0
        mask[:, length - padding[1] :] = 0
        named["attention_mask"] = mask
        if padding[0] and takes(model, "position_ids"):
            named["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if documents is not None:
        named["position_ids"] = torch.cat([torch.arange(count, device=device) for count in documents])[None]
    if takes(model, "decoder_input_ids"):
        named["decoder_input_ids"] = tokens
        if "attention_mask" in named and takes(model, "decoder_attention_mask"):
            named["decoder_attention_mask"] = named["attention_mask"]
    if takes(model, "use_cache") and not with_cache:
        named["use_cache"] = False
    return Arguments((), tuple(named.items()))


def guessed_arguments(model: nn.Module, length: int) -> Arguments:
    """Tokens where the model begins with an embedding, else hidden states of the width of its first layer with weights.

    Raises:
        ValueError: it has neither.
    """
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() == 0:
            continue
        if isinstance(module, nn.Embedding):
            return Arguments(
                (torch.randint(module.num_embeddings, (1, length), generator=generator).to(weight.device),)
            )
        if weight.is_floating_point() and weight.dim() <= 2:
            hidden = torch.randn(1, length, weight.shape[-1], generator=generator)
            return Arguments((hidden.to(weight),))
    for name in ("in_proj_weight",):
        for module in model.modules():
            if isinstance(getattr(module, name, None), Tensor):
                return Arguments((torch.randn(1, length, getattr(module, name).shape[-1], generator=generator),))
    raise ValueError("what the model is called with cannot be guessed: give inputs=, the arguments of one call")


def attention_arguments(
    layout: str,
    length: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Arguments:
    """Random query, key and value in a layout such as "NHLE"; ``transposed``, as a transpose of one with H and L swapped."""
    generator = torch.Generator().manual_seed(11)
    tensors = []
    for count in (heads, kv_heads, kv_heads):
        sizes = {"N": 1, "H": count, "L": length, "E": head_dim}
        tensors.append(
            torch.randn([sizes[letter] for letter in layout], generator=generator).to(device=device, dtype=dtype)
        )
    return Arguments(tuple(tensors), swapped=(layout.index("H"), layout.index("L")) if transposed else None)


def check_layout(layout: str) -> None:
    """Refuse a layout that is not made of N (or not), H, L and E, with E last.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(layout, str) or sorted(layout) not in (sorted("NHLE"), sorted("HLE")) or not layout.endswith("E"):
        raise ValueError(
            f'layout must have the letters N (or not, where there is no batch), H, L and, last, E, as "NHLE"; got {brief(layout)}'
        )
