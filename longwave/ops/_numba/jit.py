"""Compilation of the kernels: lazily, once, and kept on disk under a key of all their sources and versions."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np


def _key() -> str:
    """Numba's own key sees one file only: a change in a callee elsewhere would leave stale code behind."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version} {np.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _folder() -> tuple[Path, bool]:
    """Where compiled kernels are kept, and whether there are any; a temporary folder where nothing can be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "longwave" / "kernels" / _key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="longwave-kernels-"))
    return folder, any(folder.iterdir())


_cache, _told = _folder()
vars(numba.config)["CACHE_DIR"] = str(_cache)


def kernel(function: Callable) -> Any:
    """Compile without the GIL and without bounds checks; fast maths is for single operations to choose, not for all."""
    compiled = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)
    compiled.targetoptions["_nrt"] = False  # arrays are counted otherwise, atomically, and at two counts a call
    return compiled


def tell_once() -> None:
    """Say, the first time a kernel is about to run and nothing is cached, that it is being compiled."""
    global _told
    if not _told:
        _told = True
        print("longwave: compiling CPU kernels, once for this version", file=sys.stderr, flush=True)
