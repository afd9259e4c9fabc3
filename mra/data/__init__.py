"""The data pipeline: from annotation files and images to batches.

Read files.py, records.py, augment.py, words.py, tokenizer.py and batches.py.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image


def in_processes(function: Callable, items: Sequence, workers: int, chunk: int = 1, start: str = "spawn") -> Iterator:
    """`function` of each item, in their order, computed in `workers` processes; less than two: in this one."""
    if workers < 2:
        yield from map(function, items)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context(start)) as pool:
            yield from pool.map(function, items, chunksize=chunk)
