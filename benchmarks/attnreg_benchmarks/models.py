"""Whole training steps of transformers' models with sliding windows, by each of the attentions that they have.

``python -m attnreg_benchmarks.models --json FILE`` needs transformers. The layers have the shapes of real models, in bf16 on a
GPU and float32 on a CPU; weights and tokens are random. A step is the forward of the model without its head, a loss of the mean
square of what it gives, and the backward. ``--forward`` measures the forward alone, ``--generate`` 256 tokens after a prompt of
the model's length, chosen greedily, one at a time. All attentions of a model are measured in turns, in one process, and beside
the time of a step that of its kernels, which tells where the host is what takes so long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnreg.printable import trouble
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import command_line, now, write

TURNS = 5
GENERATED = 256
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A model of transformers, and what it is given.

    Attributes:
        name: of the line.
        kind: the type of its configuration.
        layers: how many there are; real models of the larger kinds have more of the same.
        settings: of its configuration.
        batch: sequences of a step.
        length: tokens of each.
        generates: whether the next token can be asked of it.
    """

    name: str
    kind: str
    layers: int
    settings: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    length: int = 8192
    generates: bool = True


# The shapes of answerdotai/ModernBERT-base, google/gemma-3-1b, mistralai/Mistral-7B-v0.1 with a window of 1024, and
# openai/gpt-oss-120b with four of its experts.
ON_A_GPU = (
    Model("ModernBERT-base", "modernbert", 22, {"vocab_size": 50368}, batch=4, generates=False),
    Model(
        "Gemma-3-1B", "gemma3_text", 26,
        {
            "vocab_size": 32768, "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256,
        },
        batch=2,
    ),
    Model(
        "Mistral-like, W=1024", "mistral", 6,
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 1024,
        },
    ),
    Model(
        "gpt-oss-like, W=128", "gpt_oss", 4,
        {
            "vocab_size": 32000, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
        },
    ),
)  # fmt: skip
ON_A_CPU = (
    Model("ModernBERT-base", "modernbert", 6, {"vocab_size": 50368}, length=4096, generates=False),
    Model(
        "Mistral-like, W=512", "mistral", 2,
        {
            "vocab_size": 1024, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
            "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 512,
        },
        length=4096,
    ),
)  # fmt: skip


def built(model: Model, device: torch.device, does: str) -> Any:
    """The model, in training mode if that is what it does; with its head if it generates."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM if does == "generate" else AutoModel
    config = AutoConfig.for_model(
        model.kind, num_hidden_layers=model.layers, use_cache=does == "generate", **model.settings
    )
    config.max_position_embeddings = max(config.max_position_embeddings, model.length + GENERATED)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return kind.from_config(config).to(device, dtype).train(does == "train")


def step_of(model: Any, tokens: torch.Tensor, does: str) -> Callable[[], None]:
    """A training step without the optimizer; a forward alone; or the tokens that are generated after a prompt."""

    def train() -> None:
        model(input_ids=tokens).last_hidden_state.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens)

    def generate() -> None:
        given = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "eos_token_id": None}
        model.generate(tokens, **given, do_sample=False, min_new_tokens=GENERATED, max_new_tokens=GENERATED)

    return {"train": train, "forward": forward, "generate": generate}[does]


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """What a step takes."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begins.record()
    step()
    ends.record()
    torch.cuda.synchronize()
    return float(begins.elapsed_time(ends)) / 1000


def memory_of(step: Callable[[], None], device: torch.device) -> float | None:
    """The most that a step holds beside the weights, in GiB; None on a CPU, of which torch does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def on_the_gpu(step: Callable[[], None], device: torch.device) -> float | None:
    """The milliseconds in which a step's kernels ran, one after the other; None on a CPU.

    Where a step takes much longer than that, the host is what it waits for.
    """
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in found.key_averages())) / 1000


def compare(line: Model, attentions: list[str], device: torch.device, does: str) -> dict[str, Any]:
    """Milliseconds and GiB of a step by each attention, and of its kernels; or the reason why there are none."""
    model = built(line, device, does)
    tokens = torch.randint(1, line.settings["vocab_size"], (line.batch, line.length), device=device)
    step = step_of(model, tokens, does)
    found: dict[str, Any] = {}
    for name in attentions:
        try:
            model.set_attn_implementation(name)
            step()
            step()
            found[name] = {"GiB": memory_of(step, device), "kernels, ms": on_the_gpu(step, device)}
        except Exception as error:
            model.zero_grad(set_to_none=True)
            found[name] = trouble(error)
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name, each in found.items() if isinstance(each, dict)}
    for _ in range(TURNS):
        for name, samples in times.items():
            model.set_attn_implementation(name)
            step()
            samples.append(seconds_of(step, device) * 1000)
    for name, samples in times.items():
        found[name]["ms"] = round(statistics.median(samples), 2)
    return found


def lines(device: torch.device, only: str) -> Iterator[Model]:
    """The models whose names have ``only`` in them."""
    yield from (line for line in (ON_A_GPU if device.type == "cuda" else ON_A_CPU) if only in line.name)


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    attention: Annotated[list[str] | None, typer.Option(help="Which attentions; repeatable.")] = None,
    only: Annotated[str, typer.Option(help="Models whose names have this in them.")] = "",
    forward: Annotated[bool, typer.Option("--forward", help="A forward alone instead of a training step.")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help=f"{GENERATED} tokens instead of a training step.")
    ] = False,
) -> None:
    """Measure all, print the times and store everything."""
    import attnreg.integrations.transformers  # noqa: F401

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    names = attention or ["attnreg", "sdpa", "flex_attention", "flash_attention_2", "eager"]
    does = "generate" if generate else "forward" if forward else "train"
    rows = []
    for line in lines(device, only):
        if generate and not line.generates:
            continue
        # FlexAttention is compiled for each line, more often than torch lets one function be.
        torch._dynamo.reset()
        compared = compare(line, names, device, does)
        rows.append({"model": asdict(line), "times": compared})
        print(line.name, flush=True)
        for name, times in compared.items():
            print(f"  {name:18}", times, flush=True)
        stored = {"date": now(), "environment": asdict(environment(device)), "does": does, "rows": rows}
        write({**stored, "command": command_line("attnreg_benchmarks.models", json_file)}, json_file)


if __name__ == "__main__":
    typer.run(main)
