"""Calls, tables and backends by which tables and tuning are tested."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from typer.testing import CliRunner

import attnreg
from attnreg import Window
from attnreg.cli import app
from attnreg.measured import Figure
from attnreg.measuring.sizes import square_problem
from attnreg.problem import Given
from attnreg.registry import SECONDS_BETWEEN_LOOKS, registry
from attnreg.tables.call import as_measured
from attnreg.tables.environment import environment
from attnreg.tables.table import Table, to_json

CPU = torch.device("cpu")
SMALL = {"ops": ["local_attention"], "dtypes": [torch.float32], "head_dims": [8], "lengths": [64], "heads": [(2, 1)]}


def problem(window=8, length=64, head_dim=8, heads=2, kv_heads=1, dtype=torch.float32, grad=False, **changes):
    sizes = (1, heads, kv_heads, length, head_dim)
    plain = square_problem("local_attention", CPU, dtype, sizes, Window.causal(window), needs_grad=grad)
    return replace(plain, **changes)


def call(window=8, length=64, **options):
    query, key = torch.ones(1, 2, length, 8), torch.ones(1, 1, length, 8)
    return attnreg.local_attention(query, key, key, Window.causal(window), **options)


BIAS = (("bias", Given((1, 2, 1, 8), torch.float32)),)
HARDLY_A_BIAS = (("bias", Given((1, 1, 1, 1), torch.float32)),)
LENGTHS = (("key_lengths", Given((1,), torch.int64)),)
SCALE = (("scale", Given()),)
STARTS = (("key_starts", Given((1,), torch.int64)), ("query_starts", Given((1,), torch.int32)))
PACKED = (("cu_seqlens_q", Given((), torch.int32)),)
PACKED_BOTH = (*PACKED, ("cu_seqlens_k", Given((), torch.int32)))
SOFTCAP = (("softcap", Given()),)
SINKS = (("sinks", Given((2,), torch.float32)),)
DROPOUT = (("dropout_p", Given()), ("seed", Given((1,), torch.int64)))
ALL_RESULTS = (("grad_log_sum_exp", Given()),)


def here():
    return environment(CPU, registry.entries)


def table_of(times, **sizes):
    figures = {
        name: Figure(seconds=time, spread=time / 1000, measured="2026-01-01T00:00:00+00:00")
        for name, time in times.items()
    }
    return Table(here(), {as_measured(problem(**sizes)): figures})


def as_torch_block(name, **changes):
    (block,) = (entry.backend for entry in registry.entries if entry.backend.name == "torch_block")
    return replace(block, name=name, **changes)


def empty_tensors(length=64):
    return torch.empty(1, 2, length, 8), torch.empty(1, 1, length, 8), torch.empty(1, 1, length, 8)


BROKEN = {
    "empty": "",
    "truncated": '{"format": 1, "rows": [',
    "no_json": "hello",
    "a_list": "[]",
    "foreign": '{"name": "x"}',
    "other_format": '{"format": 99}',
    "no_rows": '{"format": 1}',
    "deep": "[" * 100_000,
    "bad_time": None,
    "bad_key": None,
}


def broken_text(kind):
    text = to_json(table_of({"torch": 1.0}))
    if kind == "bad_time":
        return text.replace('"seconds": 1.0', '"seconds": "fast"')
    if kind == "bad_key":
        return text.replace('"window": [7, 0]', '"window": [-7, 0]')
    return BROKEN[kind]


def spy(name, ran):
    """A backend that adds its name to ``ran`` when it runs; nothing parallel: torch's threads do not survive a fork."""

    def forward(query, *arguments, **options):
        ran.append(name)
        return query.clone(), query[..., 0].clone()

    return as_torch_block(name, local_attention=forward, rank=1)


def settles():
    """What is set is noticed within a thousandth of a second."""
    time.sleep(2 * SECONDS_BETWEEN_LOOKS)


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])
