"""Where a run computes: its device and precision, the processes of torchrun, and the threads of one process.

If one process on the CPU has the whole step, two threads compute its two halves side by side. That is faster than
sharing out every single operation. The threads exchange tensors as two processes do, so results depend neither on the
number of cores nor, but for rounding, on whether the halves are threads or processes. Read next: loop.py.
"""

import fcntl
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its defaults, made later, would keep the group and its threads
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mra.config import UserError
from mra.town import sets
from mra.workers import Workers

THREADS = 2     # that compute a step on the CPU; a fixed number, so that results do not depend on the cores


# ---- workers

class Processes(Workers):
    """A process of torchrun's group."""

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def exchange(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def summed(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x


class Threads(Workers):
    """One of several threads that compute a step side by side; all share `slots` and `barrier`."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        self.rank, self.count = rank, len(slots)
        self.slots, self.barrier = slots, barrier

    def exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()             # nobody writes to the slots before all have read them
        return parts


class OwnRandomness(TorchFunctionMode):
    """Within it, PyTorch's dropout and multinomial draw from `draw` and not from PyTorch's own generator.

    Dropout masks are cut from one long mask at random places: drawing each anew takes a seventh of a training step on
    the CPU.
    """

    def __init__(self, draw: torch.Generator):
        super().__init__()
        self.draw, self.places = draw, random.Random(draw.initial_seed())
        self.masks: dict[float, Tensor] = {}        # for each rate a long mask

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return self.dropout(*args, **kwargs)
        if function is torch.multinomial:
            kwargs = kwargs | {"generator": self.draw}
        return function(*args, **kwargs)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """x with a share p of its elements set to 0 and the others divided by 1 - p."""
        if not training or p == 0:
            return x
        if p not in self.masks or len(self.masks[p]) < 2 * x.numel():
            draws = torch.empty(max(x.numel() // 2 + 1, 2**18), dtype=torch.int64)      # each for 4 elements
            bits = draws.random_(-2**63, None, generator=self.draw).view(torch.int16)
            self.masks[p] = (bits >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)
        start = self.places.randrange(len(self.masks[p]) - x.numel())
        return x * self.masks[p][start:start + x.numel()].view(x.shape)


# ---- device, precision, processes

@dataclass(frozen=True)
class Machine:
    """Where and how a run computes. Only the process of rank 0 says anything."""

    device: torch.device
    precision: str
    workers: Workers        # the processes
    compiles: bool = False  # networks are compiled: no threads, and random numbers are PyTorch's own
    cores: int = os.cpu_count() or 1

    @staticmethod
    def of(device: str, precision: str, compiles: bool = False) -> "Machine":
        """The machine that the flags --device and --precision ask for. Raises UserError if there is none."""
        place, workers = choose_device(device), Workers()
        if "LOCAL_RANK" in os.environ:        # started by torchrun
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=2))        # rank 0 draws sets while the others wait
            workers = Processes()
        return Machine(place, choose_precision(precision, place), workers, compiles)

    @property
    def rank(self) -> int:
        return self.workers.rank

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.workers.count

    def say(self, *words) -> None:
        """Print, in the process of rank 0 alone."""
        if self.rank == 0:
            print(*words)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def generator(self, *seeds: int) -> torch.Generator:
        """Random numbers on this device that depend on these seeds alone."""
        return torch.Generator(self.device).manual_seed(hash(seeds) % 2**62)

    def randomness(self, draw: torch.Generator) -> AbstractContextManager:
        """Within it, all that is random in a worker's step depends on `draw`, from which its loss draws.

        PyTorch's dropout and multinomial draw from one generator that threads share. On the CPU they draw from `draw`
        instead. On a GPU, and in a compiled network, since the compiler would trace `OwnRandomness`, there are no
        threads, and PyTorch's generator is seeded as `draw` was.
        """
        if self.device.type == "cpu" and not self.compiles:
            return OwnRandomness(draw)
        torch.manual_seed(draw.initial_seed())
        return nullcontext()

    def first(self, make: Callable[[], object]) -> None:
        """Let the process of rank 0 make something on disk while the others wait."""
        if self.rank == 0:
            make()
        self.any(False)         # returns once all processes have come here

    def any(self, asked: bool) -> bool:
        """Whether it is true in any process. So all of them stop after the same step."""
        if self.world == 1:
            return asked
        return bool(self.workers.summed(torch.tensor(float(asked), device=self.device)))

    def map(self, function: Callable, items: Iterable) -> list:
        """`function` of each item; on the CPU in THREADS threads at once."""
        if self.device.type != "cpu":
            return [function(item) for item in items]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // THREADS))
        try:
            return list(pool().map(function, items))
        finally:
            torch.set_num_threads(threads)

    def step_workers(self, batch: int, network: nn.Module) -> list[Workers]:
        """Who computes this process's share of a step, `batch` samples: threads on the CPU, else the process itself.

        There are threads if one process has the whole step, its samples can be halved, no batch norm has to see all of
        them, and the network is not compiled; see `randomness`.
        """
        halves = self.device.type == "cpu" and self.world == 1 and not self.compiles and batch % THREADS == 0
        if not halves or any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
            return [self.workers]
        slots, barrier = [None] * THREADS, threading.Barrier(THREADS)
        return [Threads(rank, slots, barrier) for rank in range(THREADS)]


@cache
def pool() -> ThreadPoolExecutor:
    """Threads for the whole run: new ones would begin each step without memory of their own, which costs a seventh."""
    return ThreadPoolExecutor(THREADS)


def choose_device(name: str) -> torch.device:
    """The device that was asked for; by default cuda if there is one, else the CPU."""
    if name not in ("", "cpu", "cuda"):
        raise UserError(f"--device {name}: give cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; leave the flag out to run on the CPU.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"Process {local + 1} of {count} CUDA devices; start one process a device.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def choose_precision(name: str, device: torch.device) -> str:
    """The precision that was asked for; by default bf16 if the device has instructions for it, else float32."""
    if name not in ("", "float32", "bf16"):
        raise UserError(f"--precision {name}: give float32 or bf16.")
    if name:
        return name
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if able else "float32"


# ---- folders and signals

def drawn(dataset: str, tiny: bool, machine: Machine) -> Path:
    """The folder of the demo town; rank 0 draws the set where it is missing."""
    machine.first(lambda: sets.ready(dataset, tiny, machine.say))
    return sets.root(tiny)


class Busy(UserError):
    """Another run writes to the folder: the study, of which several processes share out the runs, takes the next."""


@contextmanager
def claimed(folder: Path, machine: Machine) -> Iterator[None]:
    """Within it, no other run writes to this folder, which is made. Raises Busy if one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:       # the system releases it, however this process ends
        os.register_at_fork(after_in_child=lock.close)      # a loading process may outlive this one for some seconds
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

    def ask(*_) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
