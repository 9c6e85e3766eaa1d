"""The README's code runs and prints what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"```python\n(.*?)```.*?```\n(.*?)```", re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="the tests do not lie beside the README")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the README shows a machine without a GPU")
def test_every_python_block_prints_the_block_after_it(tmp_path):
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) == 3
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ATTNREG_BACKEND")
    }
    environment["ATTNREG_CACHE_DIR"] = str(tmp_path)
    for code, printed in blocks:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        # How this machine differs from the one that the shipped table is from is not the README's affair.
        assert re.sub(r"   \S+\.json is from elsewhere: .*\n", "", run.stdout) == printed


@pytest.mark.skipif(not CONTRIBUTING.exists(), reason="the tests do not lie beside CONTRIBUTING.md")
def test_the_plugin_that_contributing_shows_is_the_one_that_is_installed():
    (shown,) = re.findall(r"```python\n# attnreg_example.py\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    installed = (ROOT / "tests" / "example_plugin" / "attnreg_example.py").read_text()
    docstring, code = installed.split("\n\n", 1)
    assert docstring.startswith('"""')
    assert shown == code
