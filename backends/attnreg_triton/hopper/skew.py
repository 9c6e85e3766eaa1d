"""How a tile changes between its straight form, by row and key, and its skewed one, by row and slot, on Hopper.

Key q of a tile, counted from the key of slot 0 of its first row, is slot c = q - r of row r. Products need the straight
form. Memory wants the skewed one: there the slots of a row are neighbours, so that whole rows can be read and written.

Both are views of one piece of shared memory, in which row r begins at b(r): the straight element (r, q) lies at b(r) + q
and the skewed element (r, c) at b(r) + r + c. A view pads its rows by powers of two only, after every 2^k rows. So row
r = 8 u + v is put in place p = u + 8 v, and the skewed view pads 8 more after each row and 63 less after each eighth:
8 p - 63 v = 8 u + v = r. Eight rows of one u, which a warp accesses at once in the units' register layout, begin 1096
elements apart, in different banks.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Rows, keys and slots to a tile; a row's keys reach twice as far as its slots.
BLOCK = gl.constexpr(64)

_ACCESS_BYTES = 16

# Triton 3.6 sees one piece of memory in two padded ways; 3.9, where this has a public name, refuses to.
AVAILABLE = hasattr(gl.shared_memory_descriptor, "_reinterpret")
_PLACES = ([8, 0], [16, 0], [32, 0], [1, 0], [2, 0], [4, 0])


def vector_width(band: Tensor) -> int:
    """How many slots of a band an access may take at once: as many as 16 bytes hold, if every row begins aligned."""
    size = band.element_size()
    steps = (*band.stride()[:3], band.shape[3], band.data_ptr() // size, _ACCESS_BYTES // size)
    return math.gcd(*steps)


def in_vectors(band: Tensor, vector: int) -> tuple[int, int, int, int]:
    """The strides of a band and its width, counted in vectors, so that a kernel knows them to be multiples."""
    batch, head, row, _ = band.stride()
    return batch // vector, head // vector, row // vector, band.shape[3] // vector


@gluon.constexpr_function
def _straight_view():
    columns = [[0, 1 << k] for k in range(7)]
    return gl.PaddedSharedLayout([[256, 2], [1024, 64]], [*columns, *_PLACES], [], [64, 128])


@gluon.constexpr_function
def _skewed_view(vector):
    within = vector.bit_length() - 1
    columns = [[0, 0, 1 << k] for k in range(within)] + [[0, 1 << k, 0] for k in range(7 - within)]
    places = [[*place, 0] for place in _PLACES]
    return gl.PaddedSharedLayout([[128, 8], [256, 2], [1024, 1]], [*columns, *places], [], [64, 128 // vector, vector])


@gluon.constexpr_function
def _chunk_bases(vector):
    """(registers, lanes, warps) of a chunk of 64 rows by 64 slots: vectors along a row, then whole rows.

    Where lanes fill several rows these are 16 apart, as such rows begin in banks that the vectors of one row leave free.
    """
    slots = [[0, 1 << k] for k in range(6)]
    within = vector.bit_length() - 1
    across = slots[within : within + 5]
    lanes = across + [[16, 0], [32, 0]][: 5 - len(across)]
    rows = [[1 << k, 0] for k in range(6) if [1 << k, 0] not in lanes]
    return slots[:within] + slots[within + 5 :] + rows[:-2], lanes, rows[-2:]


@gluon.constexpr_function
def chunk_layout(vector):
    """64 slots of each of 64 rows on 4 warps, ``vector`` neighbours to a thread, neighbouring threads along a row."""
    registers, lanes, warps = _chunk_bases(vector)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, 64])


@gluon.constexpr_function
def _piece_layout(vector):
    """One element of each vector of ``chunk_layout``."""
    registers, lanes, warps = _chunk_bases(vector)
    within = vector.bit_length() - 1
    registers, lanes, warps = (
        [[row, slot // vector, 0] for row, slot in bases] for bases in (registers[within:], lanes, warps)
    )
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, 64 // vector, 1])


@gluon.jit
def allocate_views(dtype: gl.constexpr, VECTOR: gl.constexpr):
    """The two views: straight, rows by 128 keys, and skewed, rows by vectors of slots."""
    skewed = gl.allocate_shared_memory(dtype, [64, 128 // VECTOR, VECTOR], _skewed_view(VECTOR))
    return skewed._reinterpret(dtype, [64, 128], _straight_view()), skewed


@gluon.jit
def reuse(view, tile):
    """The memory of a view as one more buffer like ``tile``, which is no larger."""
    return view._reinterpret(tile.dtype, tile.shape, tile.layout)


@gluon.jit
def reuse_for_factors(view, DIM: gl.constexpr):
    """The memory of a view of fp32 as two tiles of 64 rows by DIM in fp16, at most 128."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], gl.float16)
    tiles = view._reinterpret(gl.float16, [2, 64, DIM], layout)
    return tiles.index(0), tiles.index(1)


@gluon.jit
def _load_piece(skewed, INDEX: gl.constexpr):
    # Rows of the skewed view begin anywhere, so elements are read one by one.
    VECTOR: gl.constexpr = skewed.shape[2]
    piece = skewed.slice(0, 64 // VECTOR, 1).slice(INDEX, 1, 2)
    return piece.load(_piece_layout(VECTOR)).reshape([64, 64 // VECTOR])


@gluon.jit
def load_chunk(skewed):
    """The first 64 slots of each row, in ``chunk_layout``."""
    VECTOR: gl.constexpr = skewed.shape[2]
    if VECTOR == 1:
        chunk = _load_piece(skewed, 0)
    elif VECTOR == 2:
        chunk = gl.join(_load_piece(skewed, 0), _load_piece(skewed, 1))
    elif VECTOR == 4:
        even = gl.join(_load_piece(skewed, 0), _load_piece(skewed, 2))
        odd = gl.join(_load_piece(skewed, 1), _load_piece(skewed, 3))
        chunk = gl.join(even, odd)
    else:
        even = gl.join(
            gl.join(_load_piece(skewed, 0), _load_piece(skewed, 4)),
            gl.join(_load_piece(skewed, 2), _load_piece(skewed, 6)),
        )
        odd = gl.join(
            gl.join(_load_piece(skewed, 1), _load_piece(skewed, 5)),
            gl.join(_load_piece(skewed, 3), _load_piece(skewed, 7)),
        )
        chunk = gl.join(even, odd)
    return gl.convert_layout(chunk.reshape([64, 64]), chunk_layout(VECTOR), assert_trivial=True)


@gluon.jit
def store_chunk(skewed, chunk):
    """Write ``chunk`` to the first 64 slots of each row; both by single elements, as ``chunk_layout(1)`` has them."""
    gl.static_assert(skewed.shape[2] == 1)
    skewed.slice(0, 64, 1).store(chunk.reshape([64, 64, 1]))
