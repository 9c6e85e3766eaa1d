"""The one table of cases, from which those are taken that a backend declares that it can do.

Each is a call of ``local_attention`` in float32; properties make the calls of other ops, dtypes and devices of it. Where a
backend takes certain head dims or windows alone, a case gets the nearest of these.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, product
from typing import Any

import torch

from attnreg.backend import Capability
from attnreg.testing.case import LAYOUTS, Case, make_case
from attnreg.window import Window


def _over(group: str, *, quick: Collection[str] = (), **cases: dict[str, Any]) -> list[Row]:
    return [Row(group, make_case(name, **facts), name in quick) for name, facts in cases.items()]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        group: what the case is about.
        case: the case.
        quick: whether a quick run has it.
    """

    group: str
    case: Case
    quick: bool = False


# One call of many tiny sequences, of every number of queries and keys up to 4; an off-by-one has nowhere to hide.
_SIZES = list(product(range(5), repeat=2))
_PACKED_OF_ALL_SIZES = {
    "heads": 1,
    "head_dim": 4,
    "query_length": sum(queries for queries, _ in _SIZES) + 1,
    "key_length": sum(keys for _, keys in _SIZES) + 2,
    "cu_seqlens_q": (0, *accumulate(queries for queries, _ in _SIZES)),
    "cu_seqlens_k": (0, *accumulate(keys for _, keys in _SIZES)),
    "window": Window(1, 2),
}
# Likewise of rows that stand anywhere around a few keys, of which any may be the first and the last.
_PLACES = list(product(range(-6, 8, 2), (0, 2, 4), (5, 3, 1)))
_ROWS_OF_ALL_KINDS = {
    "batch": len(_PLACES),
    "heads": 1,
    "head_dim": 4,
    "query_length": 4,
    "key_length": 5,
    "query_starts": tuple(start for start, _, _ in _PLACES),
    "key_starts": tuple(low for _, low, _ in _PLACES),
    "key_lengths": tuple(high for _, _, high in _PLACES),
    "window": Window(1, 2),
}

TABLE: Sequence[Row] = (
    *_over(
        "window",
        quick=(
            "causal",
            "window_of_one",
            "centered_even",
            "over_a_tile",
            "over_large_tiles",
            "wider_than_the_sequence",
            "several_sequences",
            "three_dimensions",
        ),
        causal={},
        window_of_one={"window": Window(0, 0)},
        centered_even={"window": Window.centered(8)},
        centered_odd={"window": Window.centered(9)},
        only_the_future={"window": Window(0, 6)},
        wider_than_a_tile={"query_length": 150, "window": Window(70, 11)},
        over_a_tile={"query_length": 150, "batch": 1, "heads": 1, "window": Window(9, 3)},
        over_large_tiles={"query_length": 270, "batch": 1, "heads": 1, "head_dim": 8, "window": Window(5, 2)},
        wide_over_large_tiles={"query_length": 270, "batch": 1, "heads": 1, "head_dim": 8, "window": Window(150, 40)},
        several_sequences={"query_length": 9, "batch": 5, "heads": 3, "window": Window(2, 1)},
        tile_sized={"query_length": 64, "window": Window.causal(64)},
        wider_than_the_sequence={"query_length": 20, "window": Window(33, 45)},
        far_wider_than_the_sequence={"query_length": 5, "window": Window(300, 200)},
        one_query_one_key={"query_length": 1, "window": Window(2, 1)},
        empty_batch={"query_length": 9, "window": Window(2, 1), "batch": 0},
        one_dimension={"head_dim": 1, "query_length": 19},
        three_dimensions={"head_dim": 3, "query_length": 19},
        head_dim_17={"head_dim": 17, "query_length": 19},
        head_dim_64={"head_dim": 64, "query_length": 33},
        head_dim_80={"head_dim": 80, "query_length": 19},
        # What kernels pad to several sizes in one call, over more than one tile of rows and keys.
        head_dim_80_over_tiles={"head_dim": 80, "query_length": 150, "window": Window(70, 11), "batch": 1},
        head_dim_256={"head_dim": 256, "query_length": 19, "batch": 1},
    ),
    *_over(
        "scale",
        quick=("scale_negative", "scale_zero", "scale_one"),
        scale_negative={"scale": -0.7},
        scale_zero={"scale": 0.0},
        scale_one={"scale": 1.0},
        scale_one_as_an_int={"scale": 1, "query_length": 19},
        scale_large={"scale": 3.0, "query_length": 19},
    ),
    # What kernels may have to choose by: a size past each bound of theirs.
    *_over(
        "sizes",
        quick=("head_dim_128", "nine_heads"),
        **{
            f"head_dim_{size}": {"head_dim": size, "query_length": 19, "batch": 1, "heads": 1}
            for size in (32, 96, 128, 192, 257)
        },
        nine_heads={"query_length": 5, "heads": 9, "head_dim": 4, "window": Window(2, 1)},
        many_short_sequences={"query_length": 5, "batch": 9, "heads": 12, "head_dim": 4, "window": Window(2, 1)},
        longer_than_1024={"query_length": 1030, "batch": 1, "heads": 1, "head_dim": 4},
        window_of_700={"query_length": 720, "batch": 1, "heads": 1, "head_dim": 4, "window": Window(650, 49)},
    ),
    *_over(
        "lengths",
        quick=("decode_step", "more_queries_than_keys", "one_over_a_tile"),
        decode_step={"query_length": 1, "key_length": 50, "window": Window.causal(16)},
        few_queries_many_keys={"query_length": 5, "key_length": 70, "window": Window(9, 2)},
        more_queries_than_keys={"query_length": 40, "key_length": 13, "window": Window(3, 4)},
        far_more_queries_than_keys={"query_length": 70, "key_length": 2, "window": Window(1, 1)},
        one_over_a_tile={"query_length": 65, "key_length": 129, "window": Window.centered(33)},
        no_query={"query_length": 0, "key_length": 9, "window": Window(2, 1)},
        no_key={"query_length": 9, "key_length": 0, "window": Window(2, 1)},
    ),
    *_over(
        "value_dim",
        quick=("value_dim_larger",),
        value_dim_larger={"head_dim": 8, "value_dim": 40},
        value_dim_smaller={"head_dim": 40, "value_dim": 1},
    ),
    *_over(
        "grouped",
        quick=("grouped_heads",),
        grouped_heads={"heads": 6, "kv_heads": 2},
        one_kv_head={"heads": 5, "kv_heads": 1, "window": Window(4, 3)},
        grouped_decode={"heads": 8, "kv_heads": 2, "query_length": 1, "key_length": 40, "key_lengths": (40, 17)},
    ),
    *_over(
        "key_lengths",
        quick=("key_lengths", "key_lengths_zero", "key_lengths_int32", "four_key_lengths", "equal_key_lengths"),
        key_lengths={"key_lengths": (23, 37)},
        key_lengths_zero={"key_lengths": (0, 5), "window": Window(3, 2)},
        key_lengths_int32={"key_lengths": (31, 8), "key_lengths_dtype": torch.int32, "window": Window(6, 5)},
        key_lengths_with_bias={"key_lengths": (30, 9), "bias": "NHLW", "hidden": 0.3},
        four_key_lengths={"batch": 4, "key_lengths": (21, 0, 1, 7), "query_length": 21, "window": Window(5, 2)},
        equal_key_lengths={"key_lengths": (9, 9), "query_length": 21, "window": Window(5, 2)},
        key_lengths_around_tiles={
            "batch": 4,
            "heads": 1,
            "head_dim": 8,
            "key_lengths": (63, 64, 65, 130),
            "query_length": 150,
            "window": Window(70, 11),
        },
    ),
    *_over(
        "bias",
        quick=(
            "bias_full",
            "bias_hides_some",
            "bias_hides_whole_rows",
            "bias_of_grouped_heads",
            "bias_in_a_decode_step",
            "bias_of_grouped_wide_values",
        ),
        bias_full={"bias": "NHLW"},
        bias_over_batch={"bias": "NH1W", "heads": 4, "kv_heads": 2},
        bias_hides_some={"bias": "NHLW", "hidden": 0.4},
        bias_hides_whole_rows={"bias": "N1L1", "hidden": 0.4},
        bias_hides_everything={"bias": "NHLW", "hidden": 1.0},
        bias_scaled={"bias": "H1W", "scale": 0.3, "window": Window(5, 5)},
        bias_table_long={"bias": "H1W", "query_length": 150, "window": Window(70, 11)},
        bias_of_grouped_heads={
            "bias": "NHLW",
            "batch": 1,
            "heads": 4,
            "kv_heads": 2,
            "query_length": 21,
            "key_length": 30,
            "window": Window(5, 2),
        },
        bias_in_a_decode_step={
            "bias": "NHLW",
            "batch": 1,
            "query_length": 1,
            "key_length": 50,
            "window": Window.causal(16),
        },
        bias_of_grouped_wide_values={
            "bias": "NHLW",
            "heads": 6,
            "kv_heads": 2,
            "query_length": 21,
            "head_dim": 8,
            "value_dim": 48,
            "window": Window(5, 2),
        },
    ),
    *_over(
        "bias_dtype",
        quick=("bias_in_float32", "bias_in_float16", "bias_in_float64"),
        bias_in_float32={"bias": "H1W", "bias_dtype": torch.float32},
        bias_in_bfloat16={"bias": "NHLW", "bias_dtype": torch.bfloat16},
        bias_in_float16={"bias": "NHLW", "bias_dtype": torch.float16, "query_length": 21, "batch": 1},
        bias_in_float64={"bias": "H1W", "bias_dtype": torch.float64, "query_length": 21, "batch": 1},
    ),
    # Numbers that no dtype of 16 bits holds, as of ALiBi far from the diagonal.
    *_over(
        "wide_bias", quick=("bias_of_100",), bias_of_100={"bias": "H1W", "bias_dtype": torch.float32, "shift": -100.0}
    ),
    *_over(
        "everything",
        quick=("everything",),
        everything={
            "heads": 6,
            "kv_heads": 3,
            "query_length": 70,
            "key_length": 90,
            "head_dim": 24,
            "value_dim": 17,
            "window": Window(20, 9),
            "bias": "H1W",
            "key_lengths": (90, 41),
            "layout": "transposed",
            "scale": 0.3,
        },
    ),
    # Left padding, chunks of queries in the middle of the keys, and what lies far outside of them.
    *_over(
        "key_starts",
        quick=("key_starts", "starts_and_lengths_around_tiles"),
        key_starts={"key_starts": (5, 23)},
        key_starts_int32={
            "key_starts": (3, 30),
            "key_starts_dtype": torch.int32,
            "key_lengths": (33, 29),
            "window": Window(6, 5),
        },
        starts_and_lengths_around_tiles={
            "batch": 4,
            "heads": 1,
            "head_dim": 8,
            "key_starts": (63, 64, 65, 1),
            "key_lengths": (150, 129, 65, 64),
            "query_length": 150,
            "window": Window(70, 11),
        },
    ),
    *_over(
        "query_starts",
        quick=("query_starts", "rows_of_all_kinds"),
        query_starts={"query_starts": (30, 61), "query_length": 5, "key_length": 70, "window": Window.causal(16)},
        query_starts_int32={
            "query_starts": (-4, 7),
            "query_starts_dtype": torch.int32,
            "bias": "NHLW",
            "hidden": 0.2,
            "query_length": 21,
            "key_length": 30,
            "heads": 4,
            "kv_heads": 2,
            "key_starts": (2, 0),
            "key_lengths": (9, 30),
            "window": Window(5, 2),
        },
        query_starts_far_away={
            "batch": 7,
            "heads": 1,
            "query_starts": (-3, 17, 40, 2**31, 2**40, -(2**40), 2**32 + 4),
            "query_length": 6,
            "key_length": 20,
            "window": Window(4, 3),
        },
        query_starts_around_tiles={
            "batch": 3,
            "heads": 1,
            "head_dim": 8,
            "query_starts": (1, 63, 200),
            "query_length": 150,
            "key_length": 270,
            "window": Window(70, 11),
        },
        rows_of_all_kinds=_ROWS_OF_ALL_KINDS,
    ),
    # Positions past 32 bits that see keys all the same: no band has so many slots.
    *_over(
        "far_rows",
        quick=("rows_past_32_bits",),
        rows_past_32_bits={
            "batch": 5,
            "heads": 1,
            "query_starts": (2**31 + 5, 2**32 + 7, 2**40, -(2**31) - 9, -(2**40)),
            "query_length": 9,
            "key_length": 20,
            "window": Window(2**32 + 3, 2**31 + 1),
        },
    ),
    *_over(
        "packed",
        quick=("packed_sequences", "packed_unequal", "packed_of_all_sizes"),
        packed_sequences={"cu_seqlens_q": (0, 1, 1, 9, 30, 37)},
        packed_int32={
            "cu_seqlens_q": (0, 10, 12, 30, 30, 30),
            "cu_seqlens_q_dtype": torch.int32,
            "window": Window(6, 5),
        },
        packed_alone={"cu_seqlens_q": (0, 37), "window": Window(3, 4)},
        packed_around_tiles={
            "heads": 1,
            "head_dim": 8,
            "cu_seqlens_q": (0, 1, 64, 65, 129, 150),
            "query_length": 150,
            "window": Window(70, 11),
        },
        # Keys without queries, more queries than keys, queries without keys, and rows and keys of no sequence.
        packed_unequal={
            "cu_seqlens_q": (0, 3, 3, 20, 24, 24),
            "cu_seqlens_q_dtype": torch.int32,
            "cu_seqlens_k": (0, 9, 12, 16, 16, 30),
            "query_length": 26,
            "key_length": 33,
            "window": Window(6, 2),
        },
        packed_with_bias={
            "cu_seqlens_q": (0, 3, 11, 20, 24),
            "cu_seqlens_k": (0, 9, 12, 26, 30),
            "cu_seqlens_k_dtype": torch.int32,
            "query_length": 26,
            "key_length": 33,
            "heads": 6,
            "kv_heads": 2,
            "value_dim": 24,
            "bias": "NHLW",
            "hidden": 0.3,
            "scale": 0.3,
            "layout": "transposed",
            "window": Window(6, 2),
        },
        packed_decode={
            "cu_seqlens_q": (0, 1, 2, 3),
            "cu_seqlens_k": (0, 5, 5, 37),
            "query_length": 3,
            "key_length": 37,
        },
        packed_of_all_sizes=_PACKED_OF_ALL_SIZES,
    ),
    # What lies between the two products.
    *_over(
        "softcap",
        quick=("softcap_with_bias",),
        softcap_large={"softcap": 30.0, "magnitude": 8.0, "query_length": 19},
        softcap_with_bias={"softcap": 0.8, "bias": "H1W", "window": Window(5, 2)},
        softcap_of_negative_scores={"softcap": 2.0, "scale": -1.5, "grad_log_sum_exp": True, "query_length": 19},
    ),
    *_over(
        "sinks",
        quick=("sinks", "sinks_of_all_sizes"),
        sinks={"sinks": (), "heads": 4, "kv_heads": 2, "layout": "strided"},
        sinks_of_all_sizes={
            "sinks": (2.0, -math.inf, 30.0, -40.0, 0.0),
            "sinks_dtype": torch.float32,
            "heads": 5,
            "key_lengths": (30, 0),
            "window": Window(5, 2),
        },
        sinks_in_bfloat16={
            "sinks": (1.0, -2.0),
            "sinks_dtype": torch.bfloat16,
            "query_length": 150,
            "batch": 1,
            "head_dim": 8,
        },
        sinks_with_bias={"sinks": (), "heads": 3, "bias": "NHLW", "hidden": 0.4, "query_length": 21},
        sinks_alone={"sinks": (3.0, 1.0), "query_length": 12, "key_length": 5, "window": Window(0, 0)},
    ),
    *_over(
        "lse_gradients",
        quick=("lse_gradients", "lse_gradients_with_sinks"),
        lse_gradients={"grad_log_sum_exp": True},
        lse_gradients_with_sinks={
            "grad_log_sum_exp": True,
            "sinks": (),
            "heads": 4,
            "kv_heads": 2,
            "query_length": 40,
            "key_length": 33,
            "key_lengths": (20, 0),
            "window": Window(5, 4),
        },
        lse_gradients_around_tiles={
            "grad_log_sum_exp": True,
            "batch": 1,
            "heads": 1,
            "head_dim": 8,
            "query_length": 150,
            "bias": "H1W",
            "window": Window(70, 11),
        },
    ),
    *_over(
        "dropout",
        quick=("dropout_of_a_half",),
        dropout_of_a_tenth={"dropout_p": 0.1, "heads": 4, "kv_heads": 2, "query_length": 70, "key_length": 90},
        dropout_of_a_half={"dropout_p": 0.5, "query_length": 70, "window": Window(20, 9)},
        dropout_of_one_key={"dropout_p": 0.5, "window": Window(0, 0)},
        dropout_with_sinks={
            "dropout_p": 0.3,
            "sinks": (),
            "bias": "H1W",
            "softcap": 3.0,
            "query_length": 70,
            "window": Window(20, 9),
        },
    ),
    # All that goes together.
    *_over(
        "combined",
        quick=("all_padded", "all_packed"),
        all_padded={
            "heads": 4,
            "kv_heads": 2,
            "query_length": 37,
            "key_length": 50,
            "head_dim": 24,
            "value_dim": 17,
            "window": Window(12, 5),
            "bias": "NHLW",
            "hidden": 0.1,
            "key_starts": (5, 17),
            "key_lengths": (50, 39),
            "query_starts": (12, 1),
            "layout": "transposed",
            "scale": 0.3,
            "softcap": 4.0,
            "sinks": (),
            "sinks_dtype": torch.float32,
            "dropout_p": 0.2,
            "grad_log_sum_exp": True,
        },
        all_packed={
            "heads": 4,
            "kv_heads": 2,
            "query_length": 40,
            "window": Window(12, 5),
            "bias": "H1W",
            "cu_seqlens_q": (0, 7, 7, 8, 30, 38),
            "layout": "transposed",
            "softcap": 4.0,
            "sinks": (),
            "dropout_p": 0.2,
            "grad_log_sum_exp": True,
        },
        packed_softmax={
            "query_length": 40,
            "key_length": 50,
            "window": Window(9, 3),
            "cu_seqlens_q": (0, 7, 7, 20, 38),
            "cu_seqlens_q_dtype": torch.int32,
            "cu_seqlens_k": (0, 4, 9, 30, 48),
            "cu_seqlens_k_dtype": torch.int32,
            "sinks": (),
            "grad_log_sum_exp": True,
        },
    ),
    # Every way to broadcast a bias.
    *_over(
        "broadcast",
        quick=("bias_H1W", "bias_NH11", "bias_1", "bias_N1LW"),
        **{
            f"bias_{letters}": {"bias": letters, "query_length": 21, "window": Window(4, 2), "heads": 3}
            for letters in (
                *("NHLW", "NHL1", "NH1W", "NH11", "N1LW", "N1L1", "N11W", "N111"),
                *("1HLW", "1HL1", "1H1W", "1H11", "11LW", "11L1", "111W", "1111"),
                *("HLW", "H1W", "H11", "LW", "L1", "W", "1"),
            )
        },
    ),
    *_over(
        "layout",
        quick=LAYOUTS,
        **{layout: {"layout": layout, "heads": 3, "query_length": 21, "window": Window(5, 2)} for layout in LAYOUTS},
    ),
    *_over(
        "layout",
        quick=("expanded_bias", "transposed_bias"),
        **{
            f"{layout}_bias": {"layout": layout, "heads": 3, "query_length": 21, "window": Window(5, 2), "bias": "NHLW"}
            for layout in LAYOUTS[1:]
        },
    ),
    *_over(
        "layout",
        transposed_value_dim={"layout": "transposed", "heads": 3, "query_length": 21, "value_dim": 24},
        packed_lengths={"layout": "packed", "heads": 3, "query_length": 7, "key_length": 40},
    ),
    # Whatever can hide a row, a key or a slot.
    *_over(
        "hidden",
        quick=(
            "hidden_none",
            "hidden_by_lengths",
            "hidden_by_bias",
            "rows_before_the_keys",
            "hidden_around_packs",
            "hidden_in_softmax",
        ),
        hidden_none={"query_length": 20, "window": Window(5, 4)},
        one_row_before_the_keys={"batch": 1, "heads": 1, "query_length": 3, "key_length": 2, "window": Window(0, 0)},
        rows_before_the_keys={"query_length": 75, "key_length": 40, "window": Window(6, 2)},
        keys_before_the_windows={"query_length": 7, "key_length": 90, "window": Window(5, 0)},
        hidden_by_lengths={"query_length": 40, "window": Window(5, 4), "key_lengths": (20, 0)},
        nothing_but_hidden_keys={"query_length": 20, "key_lengths": (0, 0)},
        hidden_by_both_lengths={"query_length": 40, "key_length": 33, "window": Window(5, 4), "key_lengths": (20, 0)},
        hidden_by_bias={"bias": "NHLW", "hidden": 0.5, "query_length": 40, "window": Window(4, 2)},
        hidden_columns={"bias": "H1W", "hidden": 0.5, "query_length": 70, "window": Window(9, 3)},
        hidden_rows={"bias": "N1L1", "hidden": 0.5, "query_length": 40},
        all_hidden={"bias": "1", "hidden": 1.0, "query_length": 20},
        hidden_before_starts={
            "query_length": 40,
            "window": Window(5, 4),
            "key_starts": (9, 40),
            "key_lengths": (30, 40),
        },
        hidden_before_the_queries={
            "query_length": 12,
            "key_length": 40,
            "window": Window(5, 4),
            "query_starts": (-9, 35),
            "grad_log_sum_exp": True,
            "sinks": (),
        },
        hidden_around_packs={
            "cu_seqlens_q": (0, 3, 3, 20, 24, 24),
            "cu_seqlens_k": (0, 9, 12, 16, 16, 30),
            "query_length": 30,
            "key_length": 40,
            "window": Window(6, 2),
            "softcap": 3.0,
            "grad_log_sum_exp": True,
        },
        no_sequence={"cu_seqlens_q": (0,), "query_length": 9, "grad_log_sum_exp": True, "sinks": ()},
        hidden_in_softmax={
            "query_length": 40,
            "window": Window(5, 4),
            "key_lengths": (20, 0),
            "softcap": 3.0,
            "sinks": (),
            "dropout_p": 0.3,
            "grad_log_sum_exp": True,
        },
        hidden_by_all={
            "bias": "NHLW",
            "hidden": 0.6,
            "key_lengths": (30, 7),
            "query_length": 50,
            "key_length": 40,
            "window": Window(7, 3),
        },
    ),
    # All of one sign: the scores of a row are near each other and far from 0.
    *_over(
        "magnitude",
        quick=("magnitude_1000", "magnitude_1e+06"),
        **{
            f"magnitude_{size:g}": {
                "batch": 1,
                "query_length": 20,
                "window": Window(3, 0),
                "magnitude": size,
                "one_sign": True,
            }
            for size in (1e-3, 30.0, 1e3, 2e4, 1e6)
        },
    ),
    *_over(
        "magnitude",
        quick=("scores_of_64",),
        scores_of_4={"batch": 1, "query_length": 48, "head_dim": 32, "window": Window(9, 3), "magnitude": 4.0},
        scores_of_64={"batch": 1, "query_length": 48, "head_dim": 32, "window": Window(9, 3), "magnitude": 64.0},
    ),
    # The largest score is that of the most negative product, where the scale is negative.
    *_over(
        "magnitude",
        quick=("negative_scale_1000",),
        **{
            f"negative_scale_{size:g}": {
                "batch": 1,
                "query_length": 20,
                "window": Window(3, 0),
                "magnitude": size,
                "scale": -0.7,
            }
            for size in (30.0, 1e3)
        },
    ),
    # A bias has a part in the largest score; the lowest number is one, and rows of nothing else see their keys.
    *_over(
        "large_bias",
        quick=("bias_plus_100", "lowest_bias", "rows_of_the_lowest_bias"),
        bias_plus_100={"bias": "NHLW", "shift": 100.0, "query_length": 20},
        bias_plus_10000={"bias": "NHLW", "shift": 1e4, "query_length": 20},
        bias_minus_10000={"bias": "NHLW", "shift": -1e4, "query_length": 20},
        lowest_bias={"bias": "NHLW", "hidden": 0.4, "lowest": True, "query_length": 20},
        rows_of_the_lowest_bias={"bias": "N1L1", "hidden": 0.4, "lowest": True, "query_length": 20},
    ),
    # What leaves the range of float16 on the way to a result that does not.
    *_over(
        "past_float16",
        quick=("scores_past_float16", "products_past_float16", "large_values"),
        scores_past_float16={"batch": 1, "head_dim": 64, "magnitude": 2e4, "one_sign": True, "scale": 1.0},
        products_past_float16={"batch": 1, "head_dim": 64, "magnitude": 2e4, "one_sign": True, "scale": 1e-3},
        large_values={"batch": 1, "value_magnitude": 1e4, "window": Window(15, 0)},
    ),
    # Larger than a few tiles in every direction: for an accelerator, where such a case costs nothing.
    *_over(
        "large",
        large_causal_64={"heads": 4, "query_length": 1000, "head_dim": 64, "window": Window.causal(64)},
        large_causal_256={
            "batch": 1,
            "heads": 4,
            "kv_heads": 2,
            "query_length": 777,
            "key_length": 1500,
            "head_dim": 128,
            "window": Window.causal(256),
        },
        large_centered_512={
            "batch": 1,
            "query_length": 1025,
            "head_dim": 64,
            "value_dim": 96,
            "window": Window.centered(512),
            "bias": "H1W",
            "key_lengths": (900,),
        },
        large_head_dim_256={
            "batch": 1,
            "kv_heads": 1,
            "query_length": 300,
            "head_dim": 256,
            "window": Window(65, 65),
            "bias": "NHLW",
            "hidden": 0.2,
        },
        large_grouped_key_lengths={
            "batch": 3,
            "heads": 8,
            "kv_heads": 2,
            "query_length": 500,
            "key_length": 777,
            "head_dim": 64,
            "value_dim": 128,
            "window": Window(40, 25),
            "key_lengths": (777, 300, 0),
            "layout": "transposed",
        },
        large_head_dim_80={
            "heads": 3,
            "kv_heads": 1,
            "query_length": 333,
            "head_dim": 80,
            "value_dim": 48,
            "window": Window.causal(200),
        },
        large_narrow={
            "heads": 4,
            "query_length": 515,
            "head_dim": 128,
            "window": Window.centered(9),
            "key_lengths": (515, 130),
        },
        large_all_keys={
            "batch": 1,
            "query_length": 300,
            "key_length": 200,
            "head_dim": 32,
            "value_dim": 64,
            "window": Window(1000, 1000),
        },
        large_negative_scale={"batch": 1, "query_length": 200, "head_dim": 64, "window": Window(30, 3), "scale": -0.2},
        large_one_kv_head={
            "batch": 1,
            "heads": 64,
            "kv_heads": 1,
            "query_length": 300,
            "head_dim": 64,
            "window": Window(3, 3),
        },
        many_heads={
            "batch": 700,
            "heads": 100,
            "kv_heads": 50,
            "query_length": 3,
            "head_dim": 8,
            "window": Window(1, 1),
        },
    ),
)
# What every right backend is told of a call: neither large numbers nor sizes, nor what few take.
CASES: Sequence[Case] = tuple(
    row.case
    for row in TABLE
    if row.group
    in (
        *("window", "scale", "lengths", "value_dim", "grouped", "key_lengths", "bias", "bias_dtype", "everything"),
        "layout",
    )
)

SMALL_LENGTHS = ((1, 1), (1, 3), (3, 1), (2, 2), (3, 4), (4, 3), (5, 2), (5, 5))
QUICK_LENGTHS = ((3, 4), (4, 1), (5, 5))
MOST_OF_A_SMALL_WINDOW = 5


def rows_of(*groups: str, quick: bool = False) -> list[Case]:
    """The cases of these groups; those alone of a quick run where ``quick``."""
    return [row.case for row in TABLE if row.group in groups and (row.quick or not quick)]


def cases_named(*names: str) -> list[Case]:
    """The cases of these names."""
    return [row.case for row in TABLE if row.case.name in names]


def small_windows(lengths: Sequence[tuple[int, int]] = SMALL_LENGTHS) -> list[Case]:
    """Every window up to one wider than both sequences: an off-by-one has nowhere to hide."""
    return [
        make_case(
            f"{queries}x{keys}_{left}_{right}",
            batch=1,
            heads=1,
            query_length=queries,
            key_length=keys,
            head_dim=3,
            value_dim=2,
            window=Window(left, right),
        )
        for queries, keys in lengths
        for left in range(MOST_OF_A_SMALL_WINDOW + 1)
        for right in range(MOST_OF_A_SMALL_WINDOW + 1 - left)
    ]


def fitted(case: Case, capability: Capability) -> Case:
    """A case with the head dims and the window that are the nearest of those that a backend takes."""
    problem, window = case.problem, case.problem.window
    size = _nearest(window.size, capability.window_sizes)
    if size != window.size:
        left = round((size - 1) * window.left / max(window.size - 1, 1))
        window = Window(left, size - 1 - left)
    head_dim = problem.head_dim and _nearest(problem.head_dim, capability.head_dims)
    value_dim = problem.value_dim and _nearest(problem.value_dim, capability.head_dims)
    if (head_dim, value_dim, window) == (problem.head_dim, problem.value_dim, problem.window):
        return case
    return case.changed(head_dim=head_dim, value_dim=value_dim, window=window)


def without_name(case: Case) -> Case:
    """What makes a case the same as another one."""
    return replace(case, name="")


# So many of what a backend says that it takes are looked at.
_MOST_SIZES = 10_000


def _nearest(size: int, admitted: Collection[int] | None) -> int:
    if admitted is None or size in admitted:
        return size
    if isinstance(admitted, range) and admitted.step == 1 and len(admitted):
        return admitted[0] if size < admitted[0] else admitted[-1]
    return min(islice(admitted, _MOST_SIZES), key=lambda each: (abs(each - size), each), default=size)
