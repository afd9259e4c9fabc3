"""The data sets: drawing, reading, augmenting, and making batches of them. Start with people.py."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image


def in_processes(function: Callable, items: Sequence, workers: int, chunk: int = 1, start: str = "spawn") -> Iterator:
    """`function` of each item, in their order; computed in `workers` processes where these are more than one."""
    if workers < 2:
        yield from map(function, items)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context(start)) as pool:
            yield from pool.map(function, items, chunksize=chunk)
