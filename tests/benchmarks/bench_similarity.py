"""Time and memory of the contrastive loss, forward and backward, and of top-k search: plain, compiled and ours.

    python -m tests.benchmarks.bench_similarity                                                       small, on the CPU
    python -m tests.benchmarks.bench_similarity --size 8192x256 32768x256 32768x2048 65536x768        on a GPU
    python -m tests.benchmarks.bench_similarity --size --gallery 10000000x256 --queries 64 --sides ours --file

Every line is measured in a fresh process on random unit features and a third of the pairs sharing an identity. Memory
is the peak of what CUDA allocated, inputs included; on the CPU, of resident memory (anonymous alone with --file, which
searches a memory-mapped safetensors file) while it ran, beyond that between runs. The floor is the time that the
matrix products alone take at the rate measured for a large one; the side `products` runs those of the loss in its own
tiles and nothing else. `before` is the loss in chunks of 1,024 rows, as it was until November 2026. `linear_ce` is
torch's chunked linear_cross_entropy in both directions with hard labels, an easier loss.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from mra import losses, ranking
from mra.run import contrastive as tiled

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIDES = "plain", "compiled", "ours"
LOSSES = "before", "linear_ce", "products"      # further sides of the loss
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


def seconds(function: Callable, repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        synchronise()
        started = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def resident(name: str) -> float:
    """A line of this process's memory status, in GiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(name)) / 2**20


def measure(function: Callable, repeats: int) -> tuple[float, float]:
    """Seconds a call, and peak memory in GiB."""
    function()                                                      # compiles, warms up
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return seconds(function, repeats), torch.cuda.max_memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")                   # restarts the high-water mark
    before = resident("VmRSS")
    return seconds(function, repeats), resident("VmHWM") - before


def products(image: Tensor, text: Tensor) -> None:
    """The four matrix products of our loss, tile by tile."""
    height, width = tiled.TILES[image.device.type]
    to_image, to_text = torch.zeros_like(image, dtype=torch.float32), torch.zeros_like(text, dtype=torch.float32)
    for top in range(0, len(image), height):
        for left in range(0, len(text), width):
            r, c = slice(top, top + height), slice(left, left + width)
            for _ in range(2):
                logits = tiled.product(image[r], text[c].T, torch.float32).to(image.dtype)
            to_image[r] += tiled.product(logits, text[c], torch.float32)
            to_text[c] += tiled.product(logits.T, image[r], torch.float32)


def linear_cross_entropy(image: Tensor, text: Tensor, temperature: Tensor, ids: Tensor, smoothing: float) -> Tensor:
    """torch's own loss in chunks (2.14 and newer): each pair is its only positive."""
    own, options = torch.arange(len(ids), device=ids.device), torch.nn.LinearCrossEntropyOptions()
    directions = [F.linear_cross_entropy(a / temperature, b, own, label_smoothing=smoothing, options=options)
                  for a, b in ((image, text), (text, image))]
    return sum(directions) / 2


def before(image: Tensor, text: Tensor, temperature: Tensor, ids: Tensor, smoothing: float) -> Tensor:
    return Before.apply(image, text, 1 / temperature, ids, smoothing)


class Before(torch.autograd.Function):
    """The loss in chunks of 1,024 rows and all columns, in a group of one."""

    @staticmethod
    def forward(ctx, image, text, scale, ids, smoothing):
        lse_row, aligned, lse_column = [], [], scale.new_full((len(text),), -torch.inf)
        for rows, row_ids in zip(image.split(1024), ids.split(1024)):
            of_rows, of_columns, of_targets = tiled.compiled(sums_before)(rows, row_ids, text, ids, scale, smoothing)
            lse_row.append(of_rows)
            aligned.append(of_targets)
            torch.logaddexp(lse_column, of_columns, out=lse_column)
        lse_row = torch.cat(lse_row)
        ctx.smoothing = smoothing
        ctx.save_for_backward(image, text, scale, ids, lse_row, lse_column)
        return ((lse_row + lse_column) / 2 - torch.cat(aligned)).mean()

    @staticmethod
    def backward(ctx, upstream):
        image, text, scale, ids, lse_row, lse_column = ctx.saved_tensors
        to_image, to_text = [], scale.new_zeros(text.shape)
        for rows, row_ids, lse in zip(image.split(1024), ids.split(1024), lse_row.split(1024)):
            slope = tiled.compiled(slopes_before)((rows, row_ids, text, ids, scale, ctx.smoothing), lse, lse_column)
            to_image.append(tiled.product(slope, text, scale.dtype))
            to_text += tiled.product(slope.T, rows, scale.dtype)
        to_image, upstream = torch.cat(to_image), upstream / len(text)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None


def sums_before(*chunk):
    logits, targets = logits_and_targets_before(*chunk)
    return logits.logsumexp(1), logits.logsumexp(0), (targets * logits).sum(1)


def slopes_before(chunk, lse_row, lse_column):
    logits, targets = logits_and_targets_before(*chunk)
    chances = ((logits - lse_row[:, None]).exp() + (logits - lse_column).exp()) / 2
    return (chances - targets).to(chunk[0].dtype)


def logits_and_targets_before(image, row_ids, text, ids, scale, smoothing):
    same = row_ids[:, None] == ids
    weight = (1 - smoothing) / same.sum(1, keepdim=True).to(scale.dtype)
    return tiled.product(image, text.T, scale.dtype) * scale, same * weight + smoothing / len(text)


def contrastive(side: str, count: int, width: int, precision: torch.dtype) -> Callable:
    """One forward and backward pass."""
    image, text = (F.normalize(torch.randn(count, width, device=DEVICE), dim=1).to(precision).requires_grad_()
                   for _ in range(2))
    temperature, ids = torch.tensor(0.07, device=DEVICE, requires_grad=True), torch.arange(count, device=DEVICE)
    ids = ids.where(ids % 3 > 0, ids // 6)
    if side == "products":
        return lambda: products(image.detach(), text.detach())
    loss = {"plain": losses.contrastive, "compiled": torch.compile(losses.contrastive), "ours": tiled.contrastive,
            "before": before, "linear_ce": linear_cross_entropy}[side]
    return lambda: torch.autograd.grad(loss(image, text, temperature, ids, 0.1), (image, text, temperature))


def plain_top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (queries @ gallery.to(queries).T).topk(k)


def search(side: str, queries: int, gallery: Tensor, k: int) -> Callable:
    found = {"plain": plain_top_k, "compiled": torch.compile(plain_top_k), "ours": ranking.top_k}[side]
    asked = F.normalize(torch.randn(queries, gallery.shape[1], device=DEVICE), dim=1).to(
        gallery.dtype if CUDA else torch.float32)
    return lambda: found(asked, gallery, k)


def write_gallery(path: Path, count: int, width: int) -> None:
    """Random unit vectors in bf16 as a safetensors file, a stretch in memory: each is the first with other signs."""
    header = json.dumps({"gallery": {"dtype": "BF16", "shape": [count, width],
                                     "data_offsets": [0, 2 * count * width]}}).encode()
    stretch = F.normalize(torch.randn(min(2**16, count), width), dim=1).bfloat16()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, count, 2**16):
            rows = stretch[:count - start] * (2 * torch.randint(2, (width,)) - 1).bfloat16()
            file.write(rows.view(torch.uint8).numpy())


def peak_of_file(path: str, side: str, queries: int, k: int) -> tuple[float, float]:
    """Seconds of a search of a memory-mapped gallery, and the most anonymous memory after any of its products."""
    with safe_open(path, "pt") as file:
        run = search(side, queries, file.get_tensor("gallery"), k)
    peaks, topk = [], torch.Tensor.topk
    torch.Tensor.topk = lambda *inputs: peaks.append(resident("RssAnon")) or topk(*inputs)
    return seconds(run, 1), max(peaks)


def inner(given: argparse.Namespace) -> tuple[float, float]:
    """Measure one side of one comparison here."""
    torch.manual_seed(0)
    side, what, count, width = given.inner[0], given.inner[1], *map(int, given.inner[2:4])
    if what == "file":
        return peak_of_file(given.inner[4], side, given.queries, given.k)
    if what == "loss":
        return measure(contrastive(side, count, width, PRECISIONS[given.precision]), given.repeats)
    gallery = F.normalize(torch.randn(count, width, device=DEVICE), dim=1).to(PRECISIONS[given.precision])
    return measure(search(side, given.queries, gallery, given.k), given.repeats)


def ceilings(precision: torch.dtype) -> tuple[float, float]:
    """Additions and multiplications a second of a large product, and bytes a second of a copy."""
    size = 8192 if CUDA else 1024
    a = torch.randn(size, size, device=DEVICE, dtype=precision)
    source = torch.empty(2**30 if CUDA else 2**27, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    for function in (product := functools.partial(torch.mm, a, a), copy := functools.partial(target.copy_, source)):
        function()
    return 2 * size**3 / seconds(product, 10), 2 * len(source) / seconds(copy, 10)


def compare(title: str, floor: float, given: argparse.Namespace, *what: str) -> None:
    """A line for each side, in a process of its own."""
    first = None
    for side in given.sides:
        if side in LOSSES and what[0] != "loss":
            continue
        done = subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_similarity", *sys.argv[1:], "--inner",
                               side, *what], capture_output=True, text=True)
        if done.returncode:
            print(f"{title:28}{side:10}{(done.stderr.strip() or '?').splitlines()[-1][:70]}", flush=True)
            continue
        took, peak = map(float, done.stdout.split()[-2:])
        first = first or took
        print(f"{title:28}{side:10}{1000 * took:10.1f} ms{peak:9.3f} GiB{first / took:8.2f} x{1000 * floor:10.1f} ms"
              f"{100 * floor / took:7.0f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", default=["32768x256"] if CUDA else ["4096x128"], help="pairs x width")
    parser.add_argument("--gallery", nargs="*", default=["1000000x256"] if CUDA else ["100000x128"],
                        help="vectors x width")
    parser.add_argument("--queries", type=int, default=1024 if CUDA else 64)
    parser.add_argument("--k", type=int, default=512 if CUDA else 32)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16" if CUDA else "float32")
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 3)
    parser.add_argument("--sides", nargs="+", choices=SIDES + LOSSES, default=SIDES + LOSSES)
    parser.add_argument("--file", action="store_true", help="search a memory-mapped file of bf16 vectors")
    parser.add_argument("--inner", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        return print(*inner(given))
    rate, copy = ceilings(PRECISIONS[given.precision])
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; {given.precision}; large product {rate / 1e12:.3g} TFLOP/s, "
          f"copy {copy / 1e12:.3g} TB/s\n{'':38}{'time':>13}{'peak':>13}{'ratio':>10}{'floor':>13}{'share':>9}")
    for size in given.size:
        count, width = size.split("x")
        compare(f"loss {size}", 4 * 2 * int(count)**2 * int(width) / rate, given, "loss", count, width)
    for size in given.gallery:
        count, width = size.split("x")
        floor, title = 2 * given.queries * int(count) * int(width) / rate, f"top {given.k} of {size}"
        if not given.file:
            compare(title, floor, given, "search", count, width)
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_gallery(Path(folder) / "gallery.safetensors", int(count), int(width))
            compare(title, floor, given, "file", count, width, str(Path(folder) / "gallery.safetensors"))


if __name__ == "__main__":
    main()
