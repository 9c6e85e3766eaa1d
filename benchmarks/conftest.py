"""What a stored result says of the machine: enough to judge the figures by, and not whose it is."""

from __future__ import annotations

import torch

import attnreg


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release", "processor", "python_build", "python_compiler"):
        machine_info.pop(name, None)
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {name: cpu.get(name) for name in ("brand_raw", "arch", "count", "hz_advertised_friendly")}
    machine_info["torch"] = torch.__version__
    machine_info["attnreg"] = attnreg.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
