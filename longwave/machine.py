"""What this machine has, and what does not fit."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def memory() -> int:
    """Bytes of memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(count: int, what: str, instead: str) -> None:
    """Refuse what takes ``count`` bytes where the machine has not as many.

    Args:
        what: needs them, such as "a model of d_model = 64".
        instead: what to do, such as "set length lower".
    Raises:
        ValueError: with both numbers.
    """
    if count > memory():
        raise ValueError(f"{what} takes {gigabytes(count)}, and this machine has {gigabytes(memory())}; {instead}")


def gigabytes(count: int) -> str:
    """A number of bytes in words, such as 1.6 GB or 3.1 MB."""
    if count < 1e8:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e9:,.1f} GB" if count < 1e15 else f"{count / 1e9:.1e} GB"


def facts() -> Iterator[str]:
    """Lines on the versions, the processor and the accelerators."""
    version = importlib.metadata.version
    yield (
        f"longwave {version('longwave')}, python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning-fabric {version('lightning-fabric')}, {platform.platform()}"
    )
    yield (
        f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; {gigabytes(memory())} of memory"
    )
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}: {torch.cuda.get_device_name(i)}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"torch {built} finds no device or driver"
        yield f"cuda: none ({why})"


def setting() -> dict[str, Any]:
    """What a number was measured with: commit (or version), date, machine, python, torch."""
    root = Path(__file__).parent.parent
    commit = f"v{importlib.metadata.version('longwave')}"
    if (root / ".git").exists():  # a checkout of longwave itself
        git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True)
        commit = git.stdout.decode().strip() or commit
    return {
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def required(package: str, extra: str) -> Any:
    """A package that only some tasks need.

    Raises:
        ValueError: where it is not installed, with the extra that has it.
    """
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise ValueError(f"this needs the package {package}: pip install -c constraints.txt -e '.[{extra}]'")
    return importlib.import_module(package)
