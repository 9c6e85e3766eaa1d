"""What every picture of latencies shares; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class MissingMatplotlib(RuntimeError):
    """matplotlib is not installed; the message says how to install it."""


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn into ``path``, whose suffix says the format, such as .png or .svg.

    Raises:
        MissingMatplotlib: matplotlib is not installed.
        ValueError: the suffix is no format that matplotlib can write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise MissingMatplotlib(f"plots need matplotlib ({error}); pip install 'attnreg[plot]'") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise ValueError(f"{path}: the suffix says the format; expected one of {', '.join(sorted(formats))}")


def latency_axes(axes: Any, sizes: Iterable[int], label: str) -> None:
    """Milliseconds over sizes, both logarithmic, with a tick at every size."""
    ticks = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(size) for size in ticks], fontsize=7)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.grid(alpha=0.3)
