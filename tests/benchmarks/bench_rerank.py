"""Re-ranking by the matching head: `ranking.match_candidates` against the published loop, one query at a time.

    python -m tests.benchmarks.bench_rerank                                              demo preset, small, on the CPU
    python -m tests.benchmarks.bench_rerank --preset swin --queries 6156 --gallery 3074 --k 512 --plain-queries 16

Random weights, images and captions of 8 to 52 word pieces (30 on average); one pass, without the mirror image;
encoding of the images included on both sides. The loop is timed on its first `--plain-queries` and extrapolated: it
pads captions to 56, computes keys and values again for each pair, and all tokens of every layer, in float32.
"""

import argparse
import dataclasses
import functools
import platform
import time

import torch
from torch import Tensor

from mra import ranking
from mra.config import PRESETS
from mra.retriever import Retriever

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
    for name, default in (("queries", 96), ("gallery", 96), ("k", 32), ("plain-queries", 96), ("pairs", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="demo", choices=PRESETS)
    parser.add_argument("--precision", default="bf16" if CUDA else "float32", choices=("float32", "bf16"))
    given = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    ranking.PAIRS[device.type] = given.pairs or ranking.PAIRS[device.type]
    torch.manual_seed(0)
    model = Retriever(dataclasses.replace(PRESETS[given.preset], vocab=1000)).to(device).eval()
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
    del encoded         # ours has the device's memory for itself
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
        our_time, ours = timed(lambda: ranking.match_candidates(
            model, images, [(started, keep, features)], candidates, ranking.Plan(given.k)))
    off = (ours[few] - plain).abs().max()
    related = torch.corrcoef(torch.stack([ours[few].flatten(), plain.flatten()]))[0, 1]
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if CUDA else ""
    print(f"{machine}; torch {torch.__version__}; {given.preset}, {given.queries} queries, {given.gallery} images, "
          f"first {given.k}\nplain loop, float32      {plain_time:9.2f} s (from {given.plain_queries} queries)\n"
          f"ours, {given.precision:18} {our_time:9.2f} s{memory}, {plain_time / our_time:.2f} times as fast; largest "
          f"difference of a logit {off:.1e}, correlation {related:.6f}")


if __name__ == "__main__":
    main()
