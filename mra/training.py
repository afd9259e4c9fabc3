"""The parts of a training run that train.py puts together: processes, optimiser, schedule, log, validation.

Before: checkpoint.py. After: train.py, which reads from top to bottom.
"""

import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its defaults, made later, would keep the group and its threads
from torch import Tensor

from mra import ranking
from mra.config import TrainConfig, UserError
from mra.data import town
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.retriever import Retriever
from mra.similarity import summed

SHARDS = 2      # parts of a batch that the CPU works on side by side; a fixed number, so that it decides no result
NEW_HEADS = ("image_projection", "text_projection", "matching_head", "word_head")


def choose_device(name: str) -> torch.device:
    """The device that was asked for, or cuda where there is one, else the CPU."""
    if name not in ("", "cpu", "cuda"):
        raise UserError(f"--device {name}: give cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; leave the flag out to run on the CPU.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(f"Process {local + 1} of {torch.cuda.device_count()} CUDA devices; start one process a device.")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def make_folder(path: Path) -> None:
    """Make an output folder. Raises UserError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder ({error.strerror}).") from error


class Busy(UserError):
    """Another run is writing there."""


@contextmanager
def claimed(folder: Path, machine: "Machine") -> Iterator[None]:
    """Within it no other run writes to this folder. Raises Busy where one does already."""
    make_folder(folder)
    with open(folder / ".lock", "w") as lock:       # let go by the system, however this process ends
        try:
            if machine.rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{folder}: another run is writing there; wait for it to end.") from error
        yield


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Within it SIGINT and SIGTERM set the event, for a loop to stop after its step; a second SIGINT stops at once."""
    asked = threading.Event()

    def ask(number: int, _) -> None:
        if number == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(asked: bool, machine: "Machine") -> bool:
    """Whether it is true in any process, so that all of them stop after the same step."""
    return bool(summed(torch.tensor(float(asked), device=machine.device))) if machine.world > 1 else asked


def choose_precision(name: str, device: torch.device) -> str:
    """The precision that was asked for, or bf16 where the device has instructions for it, else float32."""
    if name not in ("", "float32", "bf16"):
        raise UserError(f"--precision {name}: give float32 or bf16.")
    able = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
            else torch.cpu.get_capabilities().get("avx512_bf16", False))
    return name or ("bf16" if able else "float32")


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, and whether this process may speak."""

    device: torch.device
    precision: str
    rank: int
    world: int
    say: Callable
    cores: int = os.cpu_count() or 1

    @staticmethod
    def of(device: str, precision: str) -> "Machine":
        place, rank, world = choose_device(device), 0, 1
        if "LOCAL_RANK" in os.environ:        # torchrun's
            if not dist.is_initialized():
                dist.init_process_group("nccl" if place.type == "cuda" else "gloo",
                                        timeout=timedelta(hours=2))    # the first draws sets while the others wait
            rank, world = dist.get_rank(), dist.get_world_size()
        return Machine(place, choose_precision(precision, place), rank, world,
                       print if rank == 0 else lambda *_: None)

    def map(self, function: Callable, items: Iterable) -> list:
        """`function` of each item. On the CPU in SHARDS threads at once: faster than sharing out every operation."""
        if self.device.type != "cpu":
            return [function(item) for item in items]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // SHARDS))
        try:
            with ThreadPoolExecutor(SHARDS) as pool:
                return list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)

    def first(self, make: Callable[[], object]) -> None:
        """Let the first process make something on disk while the others wait."""
        if self.rank == 0:
            make()
        if self.world > 1:
            dist.barrier()

    def root(self, data_root: str, dataset: str, tiny: bool) -> Path:
        """The folder of the sets: the one given, or the demo town's, where the first process draws what is missing."""
        if data_root:
            return Path(data_root)
        self.first(lambda: town.ready(dataset, tiny, self.say))
        return town.root(tiny)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def make_optimizer(model: Retriever, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over four groups: encoders and new heads, each with weight decay (matrices) and without (the rest)."""
    groups = {(head, decay): [] for head in (False, True) for decay in (False, True)}
    for name, parameter in model.named_parameters():
        groups[name.startswith(NEW_HEADS), parameter.ndim >= 2].append(parameter)
    return torch.optim.AdamW(
        [dict(params=parameters, peak=config.lr * (config.head_lr if head else 1),
              weight_decay=config.weight_decay if decay else 0.0) for (head, decay), parameters in groups.items()],
        lr=config.lr, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: a linear rise over the first `warmup` of the steps, then a linear fall."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


@dataclass(frozen=True)
class Plan:
    """The lengths of a run, from its configuration and the number of pairs."""

    steps: int
    fusion_from: int     # first step with ITM and MLM
    evals: frozenset[int]  # step counts after which val is evaluated; the last step is one

    @staticmethod
    def of(config: TrainConfig, pairs: int, world: int) -> "Plan":
        steps = config.steps or math.ceil(config.epochs * pairs / (config.batch * config.accumulate * world))
        evals = frozenset(round(steps * (i + 1) / config.evals) for i in range(config.evals)) - {0} | {steps}
        return Plan(steps, round(config.fusion_from * steps), evals)


class Log:
    """Loss terms of the steps since the last line; flushed to a line of progress, which `name` begins, and of `path`.

    `images` are of one step, all processes. In a run that goes on after step `first`, what was logged after it goes.
    """

    def __init__(self, path: Path, steps: int, images: int, quiet: bool, first: float = 0, name: str = ""):
        self.path, self.steps, self.images, self.quiet, self.name = path, steps, images, quiet, name
        if path.exists() and not quiet:
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if line.endswith("\n") and step_of(line) <= first))
        self.restart()

    def flush(self, step: int, rate: float) -> None:
        """Write the means of the steps up to `step`, if any. Raises UserError if a term of one is not finite."""
        if not self.terms:
            return
        for number, terms in enumerate(self.terms, step - len(self.terms) + 1):
            for name, term in terms.items():
                if not term.isfinite():
                    raise UserError(f"{self.name}{name} is {term.item()} at step {number}; what was saved before it is "
                                    f"kept.{'' if self.name else ' Try a smaller --lr.'}")
        seconds = (time.perf_counter() - self.since) / len(self.terms)      # of one step
        means = {name: round(torch.stack([t[name] for t in self.terms if name in t]).mean().item(), 4)
                 for name in self.terms[-1]}
        self.write({"step": step, **means, "lr": rate, "images_per_second": round(self.images / seconds, 1)})
        if not self.quiet:
            told = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            print(f"{self.name}step {step}/{self.steps}  {told}  lr {rate:.1e}  {self.images / seconds:.0f} images/s  "
                  f"{seconds * (self.steps - step) / 60:.1f} min left", flush=True)
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far, and the time that something else took."""
        self.terms, self.since = [], time.perf_counter()

    def write(self, line: dict) -> None:
        if not self.quiet:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def step_of(line: str) -> float:
    """The step of a line of log.jsonl, half a step later for its evaluation; beyond all for one a crash has spoilt."""
    try:
        found = json.loads(line)
        return float(found["step"]) + ("val" in found) / 2
    except (ValueError, TypeError, KeyError):
        return math.inf


def queries_of(source: RecordSet) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Captions and their identities (Q,), image paths and their identities (G,): every caption is a query."""
    captions = [clean(caption, source.name) for record in source.records for caption in record.captions]
    query_ids = torch.tensor([record.identity for record in source.records for _ in record.captions])
    return captions, query_ids, [record.path for record in source.records], torch.tensor(
        [record.identity for record in source.records])


def validate(model: Retriever, tokenizer: Tokenizer, val: RecordSet, fused: bool, workers: int = 0,
             autocast: AbstractContextManager = nullcontext()) -> dict:
    """R@1 and mAP on val by embeddings and, when the fusion encoder is trained, re-ranked with the best weight.

    `quality` is what checkpoints are compared by: whether the fusion encoder is trained, then how good
    the last stage is. No mirror images, to save time. What is ordered stays in float32 under `autocast`.
    """
    captions, query_ids, paths, gallery_ids = queries_of(val)
    model.eval()
    with autocast:
        found = ranking.search(model, tokenizer, captions, paths, model.config.rerank if fused else 0, mirror=False,
                               workers=workers)
    embedded, = found.metrics(query_ids, gallery_ids, found.candidates)
    result = {"embeddings": embedded, "quality": [fused, ranking.quality(embedded)]}
    if fused:
        weight, reranked = ranking.choose_weight(found, query_ids, gallery_ids)
        result |= {"reranked": reranked, "weight": weight, "quality": [fused, ranking.quality(reranked)]}
    return result
