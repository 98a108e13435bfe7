"""Finds the compiled C++ kernels, or compiles them the first time they are wanted.

The library lies in a per-user cache, under a name made of a hash of sources, compiler and processor, and of a hash of
its own content. So a machine with another processor compiles its own, a damaged file is noticed before it is loaded,
and processes that compile at once only replace a file by an equal one.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from visiontok.errors import MissingDependencyError
from visiontok.ops import dispatch

__all__ = ["Built", "Compiler", "build", "cache_folder", "compilers", "library"]

_log = logging.getLogger("visiontok.cpu")
_HERE = Path(__file__).parent
# Relaxed only where results stay the same bits whatever the number of threads: no -ffast-math.
_FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti",
          "-fvisibility=hidden", "-fPIC", "-c")  # fmt: skip
# Tried in turn: not every compiler knows every one. The first takes GCC half the time of -O3 for code that is as fast.
_TUNING = (
    ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native"),
    ("-O3", "-march=native"),
    ("-O3", "-mcpu=native"),
    ("-O3",),
)
# Without OpenMP the kernels run on one thread.
_THREADS = (("-fopenmp",), ())
_lock = threading.Lock()


class Compiler(NamedTuple):
    """How sources become a library.

    Attributes:
        compile: Command and leading arguments that compile C++.
        link: The same for linking.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.compile)


class Built(NamedTuple):
    """The kernels, or why there are none.

    Attributes:
        library: The loaded library or None.
        note: Where it lies, or the reason.
    """

    library: ctypes.CDLL | None
    note: str


def library() -> Built:
    """The kernels for this processor; compiled on the first call, remembered for the process.

    Raises:
        MissingDependencyError: There are none although `VISIONTOK_KERNELS=cpp` asks for them.
    """
    with _lock:
        built = _library()
    if built.library is None and dispatch.wanted() == "cpp":
        raise MissingDependencyError(
            f"VISIONTOK_KERNELS=cpp, but {built.note}. Install a C++ compiler (or set CXX to one, or"
            " `pip install 'visiontok[cpu]'`), or unset VISIONTOK_KERNELS."
        )
    return built


@functools.cache
def _library() -> Built:
    if dispatch.wanted() in ("reference", "triton"):
        return Built(None, f"VISIONTOK_KERNELS={dispatch.wanted()}")
    return build(cache_folder(), list(compilers()))


def build(folder: Path | None, candidates: Sequence[Compiler]) -> Built:
    """Loads the library from a folder, after compiling it there if needed. Never raises.

    Args:
        folder: Where libraries are kept, or None for a folder that ends with the process.
        candidates: Compilers, tried in turn.
    """
    reasons: list[str] = []
    for compiler in candidates:
        try:
            key = _key(_run([*compiler.compile, "--version"], 60))
            # Looked up before anything is compiled, so that a read-only cache can still serve.
            found = _stored(folder, key) if folder is not None else None
            if found is not None:
                return found
            return _compile(compiler, folder if folder and os.access(folder, os.W_OK) else _passing_folder(), key)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            reasons.append(f"{compiler}: {error}")
    return Built(None, "; ".join(reasons) or "no C++ compiler was found (CXX, c++, g++, clang++, ziglang)")


def compilers() -> Iterator[Compiler]:
    """What may compile C++: `$CXX`, the usual names, and Zig's wheel, which the extra `cpu` installs."""
    seen: set[str] = set()
    for words in (os.environ.get("CXX", "").split(), ["c++"], ["g++"], ["clang++"]):
        path = shutil.which(words[0]) if words else None
        if path is not None and (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield Compiler((path, *words[1:]), (path, *words[1:]))
    if importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        # Linked against nothing: Zig would first compile a C++ library for a minute, and the kernels call nothing in it
        # but C functions that every Python process has loaded.
        yield Compiler((*zig, "c++"), (*zig, "cc", *(["-nostdlib"] if sys.platform == "linux" else [])))


def cache_folder() -> Path | None:
    """The folder of this user's libraries, made if needed: `$VISIONTOK_CACHE` or the platform's cache, then `cpu`.

    Returns:
        None if it cannot be made, if nothing there can be executed, or if others could put files there.
    """
    try:
        folder = _cache_root() / "cpu"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        allowed = os.statvfs(folder).f_flag & os.ST_NOEXEC == 0 if hasattr(os, "ST_NOEXEC") else True
        return folder if allowed and _ours(folder) else None
    except (OSError, RuntimeError):
        return None


def _cache_root() -> Path:
    chosen = os.environ.get("VISIONTOK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "visiontok"


def _ours(path: Path) -> bool:
    # What others may write is never executed. On Windows a user's folders are private already.
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and status.st_mode & 0o022 == 0


@functools.cache
def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="visiontok-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def _key(compiler: str) -> str:
    digest = hashlib.sha256("\n".join((compiler, _processor(), *_FLAGS, repr(_TUNING))).encode())
    for path in (*_sources(), *sorted(_HERE.glob("*.hpp"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What code for this processor depends on: its architecture and its extensions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{sys.platform} {platform.machine()} {flags}"


def _stored(folder: Path, key: str) -> Built | None:
    for path in sorted(folder.glob(f"{key}-*.so")):
        if not _ours(path):
            continue
        if path.stem == f"{key}-{_content(path)}":
            try:
                return _load(path)
            except OSError as error:
                _log.info("%s does not load: %s", path, error)
        elif os.access(folder, os.W_OK):
            path.unlink(missing_ok=True)
    return None


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(compiler: Compiler, folder: Path, key: str) -> Built:
    _log.info("compiling the C++ kernels with %s, once for this processor", compiler)
    failure = ""
    for tuning in _TUNING:
        for threads in _THREADS:
            try:
                return _attempt(compiler, [*_FLAGS, *tuning, *threads], threads, folder, key)
            except (OSError, RuntimeError) as error:
                # The plainest attempt comes last, and what it lacks is what is really missing.
                failure = str(error)
    raise RuntimeError(failure)


def _attempt(compiler: Compiler, flags: Sequence[str], threads: Sequence[str], folder: Path, key: str) -> Built:
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as work:
        objects = [Path(work, source.name).with_suffix(".o") for source in _sources()]
        with ThreadPoolExecutor() as pool:
            jobs = [[*compiler.compile, *flags, str(source), "-o", str(made)]
                    for source, made in zip(_sources(), objects)]  # fmt: skip
            list(pool.map(_run, jobs))
        made = Path(work, "kernels.so")
        _run([*compiler.link, "-shared", *threads, *map(str, objects), "-o", str(made)])
        made.chmod(0o700)
        path = folder / f"{key}-{_content(made)}.so"
        made.replace(path)
    # Loading may still fail, for want of an OpenMP library.
    return _load(path)


def _load(path: Path) -> Built:
    return Built(ctypes.CDLL(str(path)), str(path))


def _run(command: Sequence[str], seconds: float = 300) -> str:
    done = subprocess.run([*command], capture_output=True, text=True, errors="replace", timeout=seconds)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(said[0].strip() if said else f"exit status {done.returncode}")
    return done.stdout
