"""The passes compiled for the CPU: builds `cpu.cpp` with the system's compiler, once per machine, and calls it.

The library is cached under $XDG_CACHE_HOME/celo2_pretrain (default ~/.cache), named by a hash of the source, the
compiler and the processor, so that a home shared by different machines is safe.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
SIGNATURES = {
    "accumulate": [_POINTER] * 5 + [_LONG] * 3 + [_POINTER] * 2 + [ctypes.c_int64, _POINTER],
    "norms": [_POINTER] * 6 + [_LONG] * 3 + [_POINTER] * 5,
    "direction": [_POINTER] * 7 + [_LONG] * 3 + [_POINTER] * 10 + [ctypes.c_float],
}


class Unavailable(RuntimeError):
    """The kernels can't be built here, and why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; builds them where this machine hasn't yet. Raises Unavailable, saying why."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("no C++ compiler found (g++, c++, clang++ or $CXX)")
    path = _cache() / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {error}") from None
    for name, arguments in SIGNATURES.items():
        for accumulators in ("f32", "bf16", "packed"):
            function = getattr(found, f"celo2_{name}_{accumulators}")
            function.argtypes, function.restype = arguments, None
    found.celo2_repack.argtypes = [_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 4 + [ctypes.c_int64, _POINTER]
    found.celo2_repack.restype = None
    return found


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celo2_pretrain"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"can't make the cache folder {base} ({error}); set XDG_CACHE_HOME to a writable one") from None
    return base


def _fingerprint(compiler: str) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{compiler} --version failed: {error}") from None
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    parts = (SOURCE.read_text(), version, processor, " ".join(FLAGS))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    logger.warning("compiling the CPU kernels with %s (a few seconds, once on this machine)", compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{compiler} could not compile {SOURCE.name}: {done.stderr.strip()[:500]}")
        os.replace(made, path)  # several ranks may build at the same time; each puts a whole file in place
