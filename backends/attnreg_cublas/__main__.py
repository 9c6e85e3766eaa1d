"""``python -m attnreg_cublas``: builds the CUDA library ahead of time; no GPU is needed."""

from __future__ import annotations

import argparse
import sys

from attnreg.extension import BuildError, folder
from attnreg.paths import NoCacheDir
from attnreg_cublas.build import LIBRARY, PORTABLE_ARCHS, target


def main() -> int:
    """Build; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnreg_cublas", description=__doc__)
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help=f"a GPU architecture such as 90, or 90+PTX; may be repeated (default: {' '.join(PORTABLE_ARCHS)})",
    )
    parser.add_argument(
        "--output",
        type=folder,
        metavar="DIR",
        help="build under DIR instead of the cache directory; ATTNREG_CACHE_DIR=DIR then finds it",
    )
    arguments = parser.parse_args()
    try:
        library = LIBRARY.build(target(arguments.arch or PORTABLE_ARCHS), arguments.output)
    except (BuildError, NoCacheDir, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
