"""The environment of the process, read at every call."""

from __future__ import annotations

import os
from typing import Any

# os.environ.get() encodes and decodes at every call, 0.7 us. The dictionary under it answers in 0.02 us and sees every
# change that is made through os.environ; on POSIX its keys and values are bytes.
variables: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
