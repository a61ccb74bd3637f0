"""Nested lists of digits and what they come to, as ListOps has them."""

import numba
import numpy as np

from longwave.tasks.lra import ARGUMENTS, CLOSE, DEPTH, LEAF, MAX, MIN, SHORTEST, SUM


@numba.njit(cache=True)
def evaluate(operator: int, values: np.ndarray) -> int:
    """What an operator makes of digits: the greatest, the median rounded down, the least, the sum modulo 10."""
    if operator == MAX:
        return values.max()
    if operator == MIN:
        return values.min()
    if operator == SUM:
        return values.sum() % 10
    ordered = np.sort(values)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


@numba.njit(cache=True, nogil=True)
def draw(random, symbols):
    """Draw trees until one is neither too short nor too long.

    Args:
        random: a NumPy generator.
        symbols: (LONGEST,) of a type of integers, overwritten from the front with numbers of SYMBOLS.
    Returns:
        How many symbols the tree has, and its value.
    """
    operators = np.zeros(DEPTH, dtype=np.int64)
    open_ = np.zeros(DEPTH, dtype=np.int64)  # arguments still to come, of every list that is open
    held = np.zeros(DEPTH, dtype=np.int64)
    values = np.zeros((DEPTH, ARGUMENTS), dtype=np.int64)
    while True:
        length, top, value = 0, -1, 0
        while length < len(symbols):
            if top + 1 < DEPTH - 1 and random.random() <= LEAF:
                top += 1
                operators[top], open_[top], held[top] = random.integers(MAX, SUM + 1), random.integers(2, 11), 0
                symbols[length] = operators[top]
                length += 1
                continue
            value = random.integers(0, 10)
            symbols[length] = value
            length += 1
            while top >= 0 and length < len(symbols):
                values[top, held[top]] = value
                held[top] += 1
                if held[top] < open_[top]:
                    break
                value = evaluate(operators[top], values[top, : held[top]])
                symbols[length] = CLOSE
                length += 1
                top -= 1
            if top < 0:
                break
        if top < 0 and length >= SHORTEST:
            return length, value
