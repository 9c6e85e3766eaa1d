"""``python -m attnreg_cpu``: builds the library ahead of time."""

from __future__ import annotations

import argparse
import sys

from attnreg.extension import BuildError, folder
from attnreg.paths import NoCacheDir
from attnreg_cpu.build import LIBRARY, TARGET


def main() -> int:
    """Build; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnreg_cpu", description=__doc__)
    parser.add_argument(
        "--output",
        type=folder,
        metavar="DIR",
        help="build under DIR instead of the cache directory; ATTNREG_CACHE_DIR=DIR then finds it",
    )
    arguments = parser.parse_args()
    try:
        library = LIBRARY.build(TARGET, arguments.output)
    except (BuildError, NoCacheDir, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
