"""Re-ranking by the matching head: `ranking.match_candidates` against the published loop and against gathering.

    python -m tests.benchmarks.bench_rerank                                              demo preset, small, on the CPU
    python -m tests.benchmarks.bench_rerank --preset swin --queries 6156 --gallery 3074 --k 512 --plain-queries 16

Random weights, images and captions of 8 to 52 word pieces (30 on average); one pass, without the mirror image;
encoding of the images included on all sides. The loop, one query at a time, is timed on its first `--plain-queries`
and extrapolated: it pads captions to 56, computes keys and values again for each pair, and all tokens of every layer,
in float32. Gathering copies an image's keys and values for each pair, as `match_candidates` did until November 2026.
The two take turns, `--repeats` times each; their best times count.
"""

import argparse
import dataclasses
import functools
import math
import platform
import time

import torch
from torch import Tensor

from mra import ranking
from mra.config import PRESETS
from mra.retriever import Retriever
from mra.weights.retrievers import make_retriever

CUDA = torch.cuda.is_available()


@torch.inference_mode()
def plain_encoding(model: Retriever, images: list[Tensor], device: torch.device) -> Tensor:
    """Tokens (G, 1+N, D) of the gallery."""
    return torch.cat([model.image_encoder(torch.stack(images[i:i + 64]).to(device)) for i in range(0, len(images), 64)])


@torch.inference_mode()
def plain_loop(model: Retriever, encoded: Tensor, tokens: Tensor, keep: Tensor, candidates: Tensor) -> Tensor:
    """Logits [matched] - [mismatched] (q, k) as in the published evaluation; encoded (G, 1+N, D), tokens (q, 56, D)."""
    rows = []
    for own, own_keep, chosen in zip(tokens, keep, candidates):
        x, its_keep = own.expand(len(chosen), -1, -1), own_keep.expand(len(chosen), -1)
        for block in model.fusion_encoder.blocks:
            x = block.attend_context(block.attend_self(x, its_keep), block.cross.keys_values(encoded[chosen]))
        logits = model.matching_head(x[:, 0])
        rows.append(logits[:, 1] - logits[:, 0])
    return torch.stack(rows)


@torch.inference_mode()
def gathering(model: Retriever, images: list[Tensor], texts: tuple[Tensor, Tensor], candidates: Tensor) -> Tensor:
    """Logits (Q, k): steps of pairs of similar length, padded to a multiple of 8, with copied keys and values."""
    (started, keep), k, places = texts, candidates.shape[1], candidates.flatten()
    match, lengths = torch.zeros(len(places), device=places.device), keep.sum(1)
    for start in range(0, len(images), 64):
        view = torch.stack(images[start:start + 64]).to(places.device)
        keys_values = model.fusion_encoder.keys_values(model.image_encoder(view))
        asked = ((places >= start) & (places < start + 64)).nonzero().squeeze(1)
        fitting = max(1, min(2048 if CUDA else 256, 4 * 2**30 // sum(one[0].nbytes for one in keys_values)))
        for pairs in asked[lengths[asked // k].argsort(stable=True)].split(fitting):
            query, column = pairs // k, places[pairs] - start
            longest = 8 * math.ceil(int(lengths[query].max()) / 8)
            logits = model.match(started[query, :longest], keep[query, :longest], [one[column] for one in keys_values])
            match[pairs] = (logits[:, 1] - logits[:, 0]).float()
    return match.view(candidates.shape)


def timed(function) -> tuple[float, Tensor]:
    """Seconds, and the result."""
    if CUDA:
        torch.cuda.synchronize()
    started, result = time.perf_counter(), function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 96), ("gallery", 96), ("k", 32), ("plain-queries", 96), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="demo", choices=PRESETS)
    parser.add_argument("--precision", default="bf16" if CUDA else "float32", choices=("float32", "bf16"))
    given = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    torch.manual_seed(0)
    model = make_retriever(dataclasses.replace(PRESETS[given.preset], vocab=1000)).to(device).eval()
    images = [torch.randn(3, model.config.height, model.config.width) for _ in range(given.gallery)]
    lengths = (8 + 22 * torch.rand(given.queries) + 22 * torch.rand(given.queries)).long().clamp(max=56)
    keep = (torch.arange(56) < lengths[:, None]).to(device)
    candidates = torch.stack([torch.randperm(given.gallery)[:given.k] for _ in range(given.queries)]).to(device)
    with torch.inference_mode():
        tokens, features = model.encode_text(torch.randint(5, 1000, keep.shape, device=device) * keep, keep)
        started = model.fusion_encoder.start(tokens, keep)
    few = slice(0, given.plain_queries)
    encoding_time, encoded = timed(lambda: plain_encoding(model, images, device))
    plain_loop(model, encoded, tokens[:1], keep[:1], candidates[:1])                            # warms up
    plain_time, plain = timed(functools.partial(plain_loop, model, encoded, tokens[few], keep[few], candidates[few]))
    plain_time = encoding_time + plain_time * given.queries / min(given.plain_queries, given.queries)
    del encoded, tokens         # the others have the device's memory for themselves
    ways = {"gathering": lambda: gathering(model, images, (started, keep), candidates),
            "ours": lambda: ranking.match_candidates(model, images, [(started, keep, features)], candidates,
                                                     ranking.Settings(given.k))}
    times, peaks, logits = {name: torch.inf for name in ways}, {}, {}
    with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
        for name in [*ways] * given.repeats:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            seconds, logits[name] = timed(ways[name])
            times[name] = min(times[name], seconds)
            peaks[name] = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if CUDA else ""
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; {given.preset}, {given.queries} queries, {given.gallery} images, "
          f"first {given.k}\nplain loop, float32      {plain_time:9.2f} s (from {given.plain_queries} queries)")
    for name, seconds in times.items():
        off = (logits[name][few] - plain).abs().max()
        related = torch.corrcoef(torch.stack([logits[name][few].flatten(), plain.flatten()]))[0, 1]
        print(f"{name + ', ' + given.precision:24} {seconds:9.2f} s{peaks[name]}, {candidates.numel() / seconds:.0f} "
              f"pairs/s, {plain_time / seconds:.2f} times as fast; largest difference of a logit {off:.1e}, "
              f"correlation {related:.6f}")
    print(f"ours beside gathering: {times['gathering'] / times['ours']:.2f} times as fast, largest difference "
          f"{(logits['ours'] - logits['gathering']).abs().max():.1e}")


if __name__ == "__main__":
    main()
