"""How time and memory grow with size: the contrastive loss, search, re-ranking, drawing the town; and fitted exponents.

    python -m tests.benchmarks.bench_growth                                      what two cores do in some minutes
    python -m tests.benchmarks.bench_growth --loss 1024 8192 32768 131072 --search 1000 100000 10000000 \\
        --rerank 1000 10000 100000 --town 1000 10000 100000                      on a GPU, and with an hour for the town

Every size n is measured in a fresh process. Memory is the peak of what CUDA allocated, or on the CPU of resident memory
beyond what the process had before. Loss: n pairs of width 256, forward and backward. Search: 64 queries, first 32, n
bf16 vectors of width 256 in a memory-mapped file, written beforehand; its memory is what is not backed by the file.
Re-ranking: n images, n queries, the first 8 of each, `tiny` preset. Town: n images of the source set, all cores.

t = a n^b is fitted to the larger half of the sizes. What 100 million crops would cost, from such figures: their
256-wide vectors in bf16 are 51 GB, which one machine's disk holds and `top_k` streams. The products of one query with
all of them are 51 GFLOP, so reading takes the time: at 3 GB/s, 17 seconds for at most 512 queries. Encoding costs
more: a ViT-B/16 at 384x256 takes about 140 GFLOP with its mirror image, 14 EFLOP in all, 18 hours of one H100 at 30 %
of the 744 TFLOP/s of a large product; it is shared out by files. Re-ranking does not grow with the gallery, only with
the number of candidates. Beyond that an index (inverted lists, product quantisation) reads less and is not exact; that
is the business of a vector database.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mra import ranking
from mra.config import PRESETS
from mra.retriever import Retriever
from mra.town import sets
from tests.benchmarks.bench_similarity import CUDA, DEVICE, contrastive, measure, peak_of_file, write_gallery

KINDS = {"loss": [1024, 2048, 4096], "search": [1000, 10_000, 100_000], "rerank": [100, 200, 400],
         "town": [50, 100, 200]}


def one(kind: str, count: int, folder: Path) -> tuple[float, float]:
    """Seconds and GiB of one size."""
    torch.manual_seed(0)
    if kind == "loss":
        return measure(contrastive("ours", count, 256, torch.bfloat16 if CUDA else torch.float32), 3)
    if kind == "search":
        write_gallery(folder / "gallery.safetensors", count, 256)
        return peak_of_file(str(folder / "gallery.safetensors"), "ours", 64, 32)
    if kind == "town":
        size = [("train", max(2, count // 2), 2), ("test", 2, 2)]
        return measure(lambda: sets.build(folder / str(time.time()), "source", size, 0, os.cpu_count() or 1, str), 1)
    return measure(reranking(count), 1)


def reranking(count: int) -> Callable:
    """Matching of `count` queries with 8 candidates each of as many images."""
    model = Retriever(dataclasses.replace(PRESETS["tiny"], vocab=1000)).to(DEVICE).eval()
    shape = 3, model.config.height, model.config.width
    images = [torch.randn(shape)] * count
    keep = torch.ones(count, 32, dtype=torch.bool, device=DEVICE)
    with torch.inference_mode():
        tokens, features = model.encode_text(torch.randint(5, 1000, (count, 32), device=DEVICE), keep)
        queries = model.fusion_encoder.start(tokens, keep), keep, features
    candidates = torch.randint(count, (count, 8), device=DEVICE)
    return lambda: ranking.match_candidates(model, images, [queries], candidates, ranking.Settings(8))


def exponent(counts: list[int], values: list[float]) -> float:
    """b of value = a count^b, by least squares of logarithms over the larger half of the sizes."""
    first = min(len(counts) // 2, len(counts) - 2)
    x, y = ([math.log(value) for value in some[first:]] for some in (counts, values))
    middle = sum(x) / len(x), sum(y) / len(y)
    return (sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y)) / sum((a - middle[0]) ** 2 for a in x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, sizes in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=sizes, help="sizes")
    parser.add_argument("--inner", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.inner:
            return print(json.dumps(one(given.inner[0], int(given.inner[1]), Path(folder))))
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}\n{'':10}{'size':>12}{'seconds':>12}{'GiB':>10}")
    for kind in KINDS:
        sizes, times = getattr(given, kind), []
        for size in sizes:
            ran = subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_growth", "--inner", kind, str(size)],
                                 capture_output=True, text=True)
            if ran.returncode:
                print(f"{kind:10}{size:12}  {(ran.stderr.strip() or '?').splitlines()[-1][:80]}", flush=True)
                break
            seconds, peak = json.loads(ran.stdout.splitlines()[-1])
            times.append(seconds)
            print(f"{kind:10}{size:12}{seconds:12.3f}{peak:10.3f}", flush=True)
        if len(times) > 1:
            print(f"{'':10}time grows with the power {exponent(sizes[:len(times)], times):.2f}", flush=True)


if __name__ == "__main__":
    main()
