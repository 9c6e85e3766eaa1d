"""``attnreg info``: what a report of a fault needs to know of a machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnreg.cli.shared import JsonOption, print_json, reason_of, say, whole, wrong_wish
from attnreg.cli.tables import TableInUse, devices, tables_in_use
from attnreg.inspection import backends
from attnreg.packages import own_version, package_version
from attnreg.paths import NoCacheDir, cache_dir
from attnreg.precision import reduced_precision
from attnreg.registry import registry
from attnreg.tables.environment import describe, driver

# What attnreg or one of its backends reads.
VARIABLES = (
    "ATTNREG_AUTOTUNE",
    "ATTNREG_BACKEND",
    "ATTNREG_CACHE_DIR",
    "ATTNREG_CPU_ISA",
    "ATTNREG_TABLE",
    "CUDACXX",
    "CUDA_HOME",
    "CXX",
    "HOME",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)
# What torch reads, where it decides which devices there are, and how fast and how exact they are.
VARIABLES_OF_TORCH = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# Extras that are for working on attnreg.
_TOOLS = re.compile(r"extra == .(dev|docs).")


def info(json: JsonOption = False) -> None:
    """Print what a bug report needs.

    Versions, devices, backends, the cache folder, the tables in use and their age, environment variables. What cannot be told
    says why, and costs only itself.
    """
    found = facts()
    if json:
        print_json(found)
        return
    for line in _lines(found):
        say(whole(line))


def facts() -> dict[str, Any]:
    """What ``attnreg info`` tells, as JSON has it."""
    problems: dict[str, str] = {}

    def tried(section: str, tell: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return tell()
        # Of whatever kind: a fault is reported where something is broken, and that must not cost the rest of the report.
        except Exception as error:
            kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            problems[section] = kind + reason_of(error)
            return otherwise

    used, table_problems = tried("tables", tables_in_use, ([], []))
    found = {
        "versions": tried("versions", _versions, {"attnreg": own_version()}),
        "location": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "driver": tried("driver", driver, None),
        "devices": tried("devices", lambda: [_device(device) for device in devices()], []),
        "cache": tried("cache", _cache, {"folder": None, "writable": False, "problem": None}),
        "tables": tried("tables", lambda: [_table(each) for each in used], []),
        "table_problems": table_problems,
        "autotune": tried("autotune", lambda: registry.autotunes, None),
        "backends": tried("backends", _backends, []),
        "environment": _environment(),
    }
    wrong = tried("ATTNREG_BACKEND", lambda: wrong_wish(None), None)
    if wrong is not None:
        problems["ATTNREG_BACKEND"] = wrong
    return {**found, "problems": problems}


def _backends() -> list[dict[str, Any]]:
    return [
        {"name": each.name, "distribution": each.distribution, "runs_here": each.runs_here, "reason": each.reason}
        for each in backends()
    ]


def _versions() -> dict[str, str]:
    """Of attnreg, of what it needs, and of those of its extras and of its backends' libraries that are installed."""
    try:
        required = [each for each in metadata.requires("attnreg") or () if not _TOOLS.search(each)]
    except metadata.PackageNotFoundError:
        required = []
    names = {"attnreg", *(re.split(r"[^\w.-]", each)[0] for each in required)}
    names |= {entry.backend.library for entry in registry.entries if entry.backend.library is not None}
    found = {name: package_version(name) for name in names}
    versions = {name: version for name, version in found.items() if version is not None}
    versions["attnreg"] = own_version()
    # A build of torch says more of itself than its metadata.
    versions[torch.__name__] = str(torch.__version__)
    return dict(sorted(versions.items(), key=lambda each: (each[0] != "attnreg", each[0])))


def _device(device: torch.device) -> dict[str, Any]:
    hardware = describe(device.type, device.index)
    found: dict[str, Any] = {
        "device": str(device),
        "name": hardware.name,
        "capability": hardware.capability,
        "float32_products": reduced_precision(device.type) or "float32",
    }
    if device.type == "cpu":
        return {**found, "threads": torch.get_num_threads()}
    return {**found, "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)}


def _cache() -> dict[str, Any]:
    try:
        folder = cache_dir()
    except NoCacheDir as error:
        return {"folder": None, "writable": False, "problem": str(error)}
    # What is not there yet is made in the nearest folder that is.
    try:
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:  # no folder can have that name
        return {"folder": str(folder), "writable": False, "problem": error.strerror or str(error)}
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    problem = None if writable else f"nothing can be written to {nearest}"
    return {"folder": str(folder), "writable": writable, "problem": problem}


def _table(used: TableInUse) -> dict[str, Any]:
    table = used.file.table
    return {
        "name": used.file.path.name,
        "path": str(used.file.path),
        "whose": used.file.whose,
        "device": str(used.device),
        "calls": 0 if table is None else len(table.rows),
        "measured": used.file.measured,
        "days": used.file.days,
        "remarks": used.remarks,
    }


def _environment() -> dict[str, str | None]:
    """The variables, None where not set; with those that are called like attnreg's own and are none of them."""
    names = {*VARIABLES, *VARIABLES_OF_TORCH, *(name for name in os.environ if name.startswith("ATTNREG_"))}
    return {name: os.environ.get(name) for name in sorted(names)}


def _lines(found: dict[str, Any]) -> list[str]:
    problems = found["problems"]

    def heading(section: str, title: str) -> list[str]:
        return ["", title, *([f"  cannot be told: {problems[section]}"] if section in problems else [])]

    lines = [f"{name} {version}" for name, version in found["versions"].items()]
    lines[0] += f", in {found['location']}"
    lines += [f"versions cannot be told: {problems['versions']}"] if "versions" in problems else []
    lines += [f"python {found['python']}", f"platform {found['platform']}"]
    driver = f"cannot be told: {problems['driver']}" if "driver" in problems else found["driver"] or "none"
    lines += [f"CUDA {found['cuda'] or 'none'}, driver {driver}", *heading("devices", "devices")]
    for device in found["devices"]:
        size = f"{device['memory_gib']} GiB" if "memory_gib" in device else f"{device['threads']} threads"
        products = f"float32 products in {device['float32_products']}"
        lines.append(f"  {device['device']}: {device['name']} ({device['capability']}), {size}, {products}")
    lines += heading("backends", "backends")
    for each in found["backends"]:
        lines.append(f"  {each['name']} ({each['distribution']}): {each['reason'] or 'runs here'}")
    cache = found["cache"]
    wrong = problems.get("cache") or cache["problem"]
    lines += ["", f"cache folder {cache['folder'] or 'none'}" + (f": {wrong}" if wrong else "")]
    autotune = "on" if found["autotune"] else "off"
    if "autotune" in problems:
        autotune = f"cannot be told: {problems['autotune']}"
    lines += [f"autotune {autotune}", *heading("tables", "tables in use")]
    for table in found["tables"]:
        days = table["days"]
        age = "" if days is None else f", {days} day{'' if days == 1 else 's'} old"
        told = f"  {table['name']}, {table['whose']}, for {table['device']}: {table['calls']} calls, {table['measured']}{age}"
        lines.append("; ".join((told, *table["remarks"])))
    lines += ["  none"] if not found["tables"] and "tables" not in problems else []
    lines += [f"  {problem}" for problem in found["table_problems"]]
    lines += ["", "environment variables"]
    variables = found["environment"]
    for name, value in variables.items():
        unknown = "" if name in (*VARIABLES, *VARIABLES_OF_TORCH) else "  (attnreg reads no such variable)"
        if value is not None:
            lines.append(f"  {name}={value}{unknown}")
    if "ATTNREG_BACKEND" in problems:
        lines.append(f"  ATTNREG_BACKEND is of no use: {problems['ATTNREG_BACKEND']}")
    lines.append(f"  not set: {', '.join(name for name, value in variables.items() if value is None)}")
    return lines
