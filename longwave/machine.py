"""What this machine has, and what does not fit."""

import os


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
    """A number of bytes in words, such as 1.6 GB."""
    return f"{count / 1e9:,.1f} GB" if count < 1e15 else f"{count / 1e9:.1e} GB"
