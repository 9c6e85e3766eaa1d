"""Compiles a library of kernels where it is first needed: what backends written in C++ or CUDA share.

A library uses torch's stable ABI and links against nothing of torch but the name of ``libtorch.so``: a build serves every
torch from 2.11 on and every Python. Builds lie in the user's cache directory, or in ``ATTNREG_CACHE_DIR``, under a hash of
sources and flags, and say in their name for what and by which version of the compiler they were made. A wheel may carry
builds beside the sources.

A library is code: one in the cache directory is loaded only where nobody but this user and root can have put it there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from attnreg.memo import asked_once
from attnreg.paths import NoCacheDir, cache_dir, make_folder, why_not_trusted

_COMMON_FLAGS = (
    # Everything uses the stable ABI as it was in torch 2.11.
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-ltorch"),
    # Where the compiler links libstdc++.a, that copy shares no symbol with the process's own: with the facets of the one and
    # the code of the other, a number written into a message crashes.
    *("-Xlinker", "--exclude-libs=ALL"),
)

_SOURCES = (".cpp", ".cu", ".cuh", ".h")
_LINES_SHOWN = 20
# How the folder of a build begins that is not finished, and after how long it never will be.
_UNFINISHED = "unfinished-"
_LONGEST_BUILD_SECONDS = 24 * 3600
_BESIDE_ATTNREG = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message ends with the last lines of the compiler's output."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a build is for.

    Attributes:
        name: tells its file from those for other targets: no ``*`` or ``/`` in it.
        flags: what the compiler is told for this target alone.
        title: how it is called in a message.
    """

    name: str
    flags: tuple[str, ...]
    title: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A file that is compiled; all others are included by one.

    Attributes:
        file: its name among the sources.
        flags: what the compiler is told for this file alone.
    """

    file: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Extension:
    """A library of kernels: where its sources are, how it is compiled, and where its builds lie.

    Attributes:
        name: the backend's; its folder among the builds.
        package: the folder of the backend's package. A wheel has the sources in ``csrc`` there, and may have builds in ``lib``.
        checkout: the sources in a checkout.
        units: the files there that are compiled: side by side, and then linked; a single one in one go.
        flags: of every compilation and of linking, beside those that all have and torch's folders.
        find_compiler: the command of the compiler, as a shell takes it, or None where there is none.
        no_compiler: says so, and where it was looked for.
    """

    name: str
    package: Path
    checkout: Path
    units: tuple[Unit, ...]
    flags: tuple[str, ...]
    find_compiler: Callable[[], str | None]
    no_compiler: str

    def sources(self) -> Path:
        """The folder of the sources."""
        installed = self.package / "csrc"
        return installed if installed.is_dir() else self.checkout

    def unavailable(self) -> str | None:
        """Why there is no library and none can be built, or None. It looks for files alone."""
        if self.packaged() is not None:
            return None
        try:
            root = cache_dir()
        except NoCacheDir as error:
            return str(error)
        if self.find_compiler() is not None:
            return None
        builds = sorted(self._folder(root).glob("*.so"))
        refused = [why_not_trusted(library) for library in builds]
        if None in refused:
            return None
        found = f"the builds there are not used: {refused[0]}" if refused else f"there is no build in {root}"
        return f"{self.no_compiler}, and {found}"

    def find(self, targets: Sequence[Target]) -> Path | None:
        """A finished build for the first of these targets that has one: by this machine's compiler if it has one, else by any.

        Otherwise the one that a wheel carried. One that somebody else can have put there counts for none.
        """
        compiler = self.find_compiler()
        with suppress(NoCacheDir):
            folder = self._folder(cache_dir())
            for target in targets:
                # A compiler that cannot say its version is none to build with; what others have built serves all the same.
                try:
                    pattern = self._file_name(target, compiler)
                except BuildError:
                    pattern = self._file_name(target, None)
                for library in sorted(folder.glob(pattern)):
                    if library.is_file() and why_not_trusted(library) is None:
                        return library
        return self.packaged()

    def packaged(self) -> Path | None:
        """The build that a wheel carried, if it did."""
        return next(iter(sorted(self._folder(self.package / "lib").glob("*.so"))), None)

    def build(self, target: Target, root: Path | None = None) -> Path:
        """Compiles the library, unless that has been done. Returns where it lies.

        Args:
            target: what for.
            root: the folder that holds the backends' builds, for whoever may read it; None for attnreg's cache directory.

        Raises:
            BuildError: there is no compiler, or it failed; or what is built there would not be loaded.
            NoCacheDir: there is no folder for it.
        """
        from filelock import FileLock

        compiler = self.find_compiler()
        if compiler is None:
            raise BuildError(self.no_compiler)
        library = self._folder(root or cache_dir()) / self._file_name(target, compiler)
        # Never for a group to write, whatever the user's mask: such a library is not loaded.
        mode = 0o700 if root is None else 0o755
        make_folder(library.parent, mode)
        lock = Path(f"{library}.lock")
        with FileLock(lock, mode=0o600):
            reason = why_not_trusted(lock) if root is None else None
            if reason is not None:
                raise BuildError(
                    f"{self.name} is not built in {library.parent}, where it would not be loaded: {reason}"
                )
            _sweep(library.parent)
            if not library.exists():
                print(
                    f"attnreg: building {self.name} for {target.title} with {compiler} (once; cached in {library.parent})",
                    file=sys.stderr,
                )
                self._compile(compiler, target, library, mode)
        return library

    def _compile(self, compiler: str, target: Target, library: Path, mode: int) -> None:
        root, sources = Path(torch.__file__).parent, self.sources()
        torch_folders = ("-isystem", str(root / "include"), f"-L{root / 'lib'}")
        # Built under another name and renamed, so that no process ever loads half a library.
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=_UNFINISHED) as scratch:
            unfinished = Path(scratch) / library.name

            def run(unit: Unit, *files: Path | str) -> None:
                flags = (*self.flags, *_COMMON_FLAGS, *target.flags, *unit.flags, *torch_folders)
                self._run([*shlex.split(compiler), *flags, *map(str, files)])

            if len(self.units) == 1:
                run(self.units[0], sources / self.units[0].file, "-o", unfinished)
            else:
                objects = [unfinished.with_name(f"{unit.file}.o") for unit in self.units]
                with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                    compiled = [
                        pool.submit(run, unit, "-c", sources / unit.file, "-o", made)
                        for unit, made in zip(self.units, objects)
                    ]
                    for each in compiled:
                        each.result()
                run(Unit("linked"), *objects, "-o", unfinished)
            if not unfinished.is_file():
                raise BuildError(f"building {self.name} failed: {compiler} ended without an error and made no file")
            unfinished.chmod(mode)
            unfinished.replace(library)

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if result.returncode != 0:
            last_lines = "\n".join(result.stdout.splitlines()[-_LINES_SHOWN:])
            raise BuildError(f"building {self.name} failed: {shlex.join(command)}\n{last_lines}")

    def _folder(self, root: Path) -> Path:
        flags = (*self.flags, *_COMMON_FLAGS, *(word for unit in self.units for word in (unit.file, *unit.flags)))
        return root / self.name / _fingerprint(self.sources(), flags)

    def _file_name(self, target: Target, compiler: str | None) -> str:
        """The name of a build; a pattern where any compiler's will do."""
        if compiler is None:
            return f"*-{target.name}.so"
        words = [re.sub(r"[^\w.+-]", "_", Path(word).name) for word in shlex.split(compiler)]
        return f"{'-'.join(words)}-{_version(compiler)}-{target.name}.so"


def folder(given: str) -> Path:
    """The folder that somebody names to build into, whole, as ``ATTNREG_CACHE_DIR`` has it; ValueError where there is no name."""
    if not given:
        raise ValueError("a folder, not an empty name")
    return Path(given).absolute()


def load(library: Path) -> None:
    """Loads a built library: its ops are in ``torch.ops`` from then on.

    Raises:
        BuildError: it could not be loaded, or somebody else can have put it there.
    """
    # What is loaded is what is looked at here: a link may lead elsewhere a moment later.
    real = Path(os.path.realpath(library))
    # What lies beside attnreg's own code is as much to be trusted as that.
    if not real.is_relative_to(_BESIDE_ATTNREG):
        reason = why_not_trusted(library) or why_not_trusted(real)
        if reason is not None:
            raise BuildError(f"{library} is not loaded: {reason}")
    load_library: Callable[[str], None] = torch.ops.load_library
    anew = "without it, it is built anew"
    if _is_cut_short(real):
        raise BuildError(f"{library} is not loaded: it is cut short; {anew}")
    try:
        load_library(str(real))
    except OSError as error:
        raise BuildError(f"{library} could not be loaded: {error.__cause__ or error}; {anew}") from error


def _is_cut_short(library: Path) -> bool:
    """Whether an ELF file of 64 bits lacks some of what is mapped into memory: who loads it would be killed, without a word.

    The header and the table of segments: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html and ch5.pheader.html.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02":
            return False
        try:
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            entries = file.read(size * count)
            segments = [struct.unpack_from("<QQQQ", entries, size * i + 8) for i in range(count)]
        except struct.error:
            return True
    length = library.stat().st_size
    return any(offset + in_file > length for offset, _, _, in_file in segments)


def why_not(load_library: Callable[[], object]) -> str | None:
    """Calls what builds a library, if there is none, and loads it. Returns None, or the reason why that failed."""
    try:
        load_library()
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed left behind; to be called by who holds a lock there."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LONGEST_BUILD_SECONDS:
                shutil.rmtree(left)


def _command(given: str) -> str | None:
    """The command that somebody names: a program, or one with arguments, such as ``ccache g++``; None where there is none."""
    program = shutil.which(given)
    if program is not None:
        return shlex.quote(program)
    try:
        name, *arguments = shlex.split(given)
    except ValueError:  # a quotation that does not end, or nothing
        return None
    program = shutil.which(name)
    return None if program is None else shlex.join([program, *arguments])


def _first(*programs: str | None) -> str | None:
    return next((shlex.quote(each) for each in programs if each is not None), None)


@asked_once
def find_nvcc() -> str | None:
    """The command of the nvcc to build with, or None."""
    given = os.environ.get("CUDACXX")
    if given:
        return _command(given)
    home = os.environ.get("CUDA_HOME")
    at_home = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return _first(at_home, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin"))


NO_NVCC = "no nvcc found ($CUDACXX, $CUDA_HOME/bin, PATH, /usr/local/cuda/bin)"


@asked_once
def find_cxx() -> str | None:
    """The command of the C++ compiler to build with, or None."""
    given = os.environ.get("CXX")
    return _command(given) if given else _first(*map(shutil.which, ("g++", "clang++", "c++")))


NO_CXX = "no C++ compiler found ($CXX; g++, clang++ and c++ on PATH)"


@asked_once
def _fingerprint(sources: Path, flags: tuple[str, ...]) -> str:
    """A hash of everything of ours that a build depends on."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(sources.iterdir()):
        if path.suffix in _SOURCES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@asked_once
def _version(compiler: str) -> str:
    """The version of nvcc, g++ or clang++: the first number of three parts that it says of itself."""
    asked = subprocess.run(
        [*shlex.split(compiler), "--version"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    found = re.search(r"\d+\.\d+\.\d+", asked.stdout)
    if asked.returncode != 0 or found is None:
        said = "\n".join(asked.stdout.splitlines()[-_LINES_SHOWN:])
        raise BuildError(
            f"{compiler} --version, with exit status {asked.returncode}, names no version of a compiler: {said}"
        )
    return found.group()
