"""What the Hopper kernels share: descriptors of tensors, and how tiles are copied, masked and written.

As in ``attnreg_triton.band``, key j is in slot c = j - i - origin of row i, with origin = Lk - Lq - left.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnreg_triton.launch import padded

_ACCESS_BITS = 128
_LARGEST_SINK = gl.constexpr(2.0**127)

# The names of Triton 3.9, and those of 3.6, which later ones have in part but refuse.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_write_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def describe(tensor: Tensor, positions: int, columns: int = 0) -> Any:
    """A descriptor by which the copy engine fetches and writes tiles of ``positions`` rows of (N, H, L, DIM).

    A tile holds ``columns`` elements of each row, or all of them padded to a power of two.
    """
    dim = columns or padded(tensor.shape[3])
    # A row of the tile is swizzled by its own width, up to the 128 bytes that are the engine's most.
    size = tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(dim * size, 128), element_bitwidth=size * 8, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, positions, dim], layout)


@gluon.jit
def locate_program(kv_heads, group, tiles, INTERLEAVED: gl.constexpr):
    """(n, h, h_kv, tile) of this program in a grid of N * H * tiles, in the order of ``attnreg_triton.band.locate_program``."""
    program = gl.program_id(0)
    kv_program = program // group
    if INTERLEAVED:
        n_tile = kv_program // kv_heads
        h_kv = kv_program - n_tile * kv_heads
        n = n_tile // tiles
        tile = n_tile - n * tiles
    else:
        kv_head = kv_program // tiles
        tile = kv_program - kv_head * tiles
        n = kv_head // kv_heads
        h_kv = kv_head - n * kv_heads
    return n, h_kv * group + (program - kv_program * group), h_kv, tile


@gluon.jit
def load_sink(sinks, h):
    """The sink of head h in fp32, so that log2(e) times it is finite. As of a score, only -inf means that there is none."""
    sink = gl.load(sinks + h).to(gl.float32)
    return gl.where(sink > _LARGEST_SINK, _LARGEST_SINK, sink)


@gluon.jit
def fetch(descriptor, n, h, start, barrier, buffer, wanted=True, column=0):
    """Start copying the tile of rows from ``start`` on; ``barrier`` has been told how many bytes to expect."""
    _load_tile(descriptor, [n, h, start, column], barrier, buffer, pred=wanted)


@gluon.jit
def matrix(buffer):
    """A fetched tile (1, 1, rows, DIM) as rows by DIM."""
    return buffer.reshape([buffer.shape[2], buffer.shape[3]])


@gluon.constexpr_function
def rows_layout(dim, warps, dtype):
    """16 bytes a thread along rows of ``dim`` elements."""
    access = _ACCESS_BITS // dtype.primitive_bitwidth
    lanes = dim // access
    return gl.BlockedLayout([1, access], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(columns, warps, dtype):
    """How the matrix units leave a product of this many columns of ``dtype`` in registers: 16 rows to a warp."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 256 // dtype.primitive_bitwidth])


@gluon.jit
def clear_rows_from(end, buffer, layout: gl.constexpr):
    """Set the rows of a fetched tile from ``end`` on to zero: 0 * NaN, of a key past key_lengths, would be NaN."""
    if end < buffer.shape[2]:
        keep_rows(gl.arange(0, buffer.shape[2], gl.SliceLayout(1, layout)) < end, buffer, layout)


@gluon.jit
def clear_rows_without(table, length, start, buffer, layout: gl.constexpr):
    """Set those rows of a tile fetched from ``start`` on to zero of which ``table`` (2, length) has an empty interval."""
    position = start + gl.arange(0, buffer.shape[2], gl.SliceLayout(1, layout))
    first = gl.load(table + position, mask=position < length, other=0)
    last = gl.load(table + length + position, mask=position < length, other=0)
    keep_rows(first < last, buffer, layout)


@gluon.jit
def keep_rows(wanted, buffer, layout: gl.constexpr):
    """Set all other rows of a fetched tile to zero."""
    tile = matrix(buffer)
    values = gl.where(wanted[:, None], tile.load(layout), 0.0)
    synchronize()
    tile.store(values.to(buffer.dtype))
    fence_async_shared()
    synchronize()


@gluon.jit
def hide(x, start, first, last, all_from, all_to, FILL: gl.constexpr, layout: gl.constexpr):
    """``x`` with FILL in columns outside [first, last) of each row, the columns counting from ``start``.

    In [all_from, all_to) no row hides anything: most tiles lie inside, and those of an edge need one comparison.
    """
    BLOCK: gl.constexpr = x.shape[1]
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    if start < all_from:
        x = gl.where(column >= (first - start)[:, None], x, FILL)
    if start + BLOCK > all_to:
        x = gl.where(column < (last - start)[:, None], x, FILL)
    return x


@gluon.jit
def store_tile(descriptor, n, h, start, values, buffer):
    """Write a tile of rows from ``start`` on, those that exist, by way of ``buffer``, which nobody reads any more."""
    synchronize()
    matrix(buffer).store(values.to(buffer.dtype))
    fence_async_shared()
    _write_tile(descriptor, [n, h, start, 0], buffer)


@gluon.jit
def finish_stores():
    """Wait until the buffers of all stores have been read: a program must not end before."""
    tma.store_wait(0)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The buffer after this one in a ring of STAGES, and the phase in which its barrier completes next."""
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    return gl.where(stage == STAGES, 0, stage), phase


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """COUNT barriers, each completed by the bytes that it was told to expect."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(bars.index(index), count=1)
    return bars
