"""Where a run computes: its device and precision, the processes of torchrun, and the threads of one process.

One process on the CPU computes the two halves of a step in two threads, which is faster than sharing out every single
operation. Threads exchange tensors as processes do, so only rounding differs between the two.
"""

import fcntl
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its functions' default arguments would keep the group alive
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mra.config import UserError
from mra.group import Group

THREADS = 2     # of a step on the CPU; a fixed number, so that results do not depend on the number of cores
# for the whole run: new threads in each step would allocate memory anew, which takes a seventh of the step's time
POOL = ThreadPoolExecutor(THREADS)


# ---- groups

class Processes(Group):
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


class Threads(Group):
    """One of several threads that compute a step side by side; all share `slots` and `barrier`."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        self.rank, self.count = rank, len(slots)
        self.slots, self.barrier = slots, barrier

    def exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()             # all threads read the slots before one writes to them again
        return parts


class OwnRandomness(TorchFunctionMode):
    """Within it, dropout and multinomial draw from `generator`, and not from the generator that all threads share."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator, self.places = generator, random.Random(generator.initial_seed())
        # for each rate one long mask, from which all are cut: drawing each anew takes a seventh of a step on the CPU
        self.masks: dict[float, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return self.dropout(*args, **kwargs)
        if function is torch.multinomial:
            kwargs = kwargs | {"generator": self.generator}
        return function(*args, **kwargs)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """x with a share p of its elements set to 0 and the others divided by 1 - p."""
        if not training or p == 0:
            return x
        if p not in self.masks or len(self.masks[p]) < 2 * x.numel():
            draws = torch.empty(max(x.numel() // 2 + 1, 2**18), dtype=torch.int64)      # each for 4 elements
            bits = draws.random_(-2**63, None, generator=self.generator).view(torch.int16)
            self.masks[p] = (bits >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)
        start = self.places.randrange(len(self.masks[p]) - x.numel())
        return x * self.masks[p][start:start + x.numel()].view(x.shape)


# ---- device, precision, processes

@dataclass(frozen=True)
class Machine:
    device: torch.device
    precision: str
    group: Group            # of the processes
    compiles: bool = False  # networks are compiled; this excludes threads and OwnRandomness
    cores: int = os.cpu_count() or 1

    @staticmethod
    def of(device: str, precision: str, compiles: bool = False) -> "Machine":
        """The machine for the flags --device and --precision. Raises UserError for a missing CUDA device."""
        chosen, group = choose_device(device), Group()
        if "LOCAL_RANK" in os.environ:        # started by torchrun
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=2))        # one may wait while others make images
            group = Processes()
        return Machine(chosen, choose_precision(precision, chosen), group, compiles)

    def say(self, *words) -> None:
        """Print, in rank 0 alone."""
        if self.group.rank == 0:
            print(*words)

    def for_evaluation(self) -> "Machine":
        """This machine, in float32 if it is a CPU: there bf16 is for training."""
        return replace(self, precision="float32") if self.device.type == "cpu" else self

    def autocast(self) -> torch.autocast:
        """Autocast. On the CPU without its cache: two threads would share it, and add gradients in any order."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16",
                              cache_enabled=self.device.type != "cpu")

    def generator(self, *seeds: int) -> torch.Generator:
        """A generator on this device, seeded by all these numbers."""
        return torch.Generator(self.device).manual_seed(hash(seeds) % 2**62)

    def randomness(self, generator: torch.Generator) -> AbstractContextManager:
        """Within it, all randomness of a member's step depends on the seed of `generator`."""
        if self.device.type == "cpu" and not self.compiles:     # the compiler would trace OwnRandomness
            return OwnRandomness(generator)
        torch.manual_seed(generator.initial_seed())
        return nullcontext()

    def on_rank_0(self, make: Callable[[], object]) -> None:
        """Let rank 0 make something on disk, after all processes have come here and before any goes on."""
        self.barrier()
        if self.group.rank == 0:
            make()
        self.barrier()

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.any(False)

    def any(self, asked: bool) -> bool:
        """Whether `asked` is true in any process."""
        if self.group.count == 1:
            return asked
        return bool(self.group.summed(torch.tensor(float(asked), device=self.device)))

    def map(self, function: Callable, items: Iterable) -> list:
        """`function` of each item; the CPU computes THREADS of them at a time."""
        if self.device.type != "cpu":
            return [function(item) for item in items]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // THREADS))
        try:
            return list(POOL.map(function, items))
        finally:
            torch.set_num_threads(threads)

    def step_members(self, batch: int, network: nn.Module) -> list[Group]:
        """The members, here, that compute `batch` samples of a step: two threads on the CPU, else this process."""
        halves = self.device.type == "cpu" and self.group.count == 1 and not self.compiles and batch % THREADS == 0
        # a batch norm must see all samples at once
        if not halves or any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
            return [self.group]
        slots, barrier = [None] * THREADS, threading.Barrier(THREADS)
        return [Threads(rank, slots, barrier) for rank in range(THREADS)]


def choose_device(name: str) -> torch.device:
    """The device of --device. Without the flag: cuda if there is one, else the CPU."""
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
    """The precision of --precision. Without the flag: bf16 if the device has instructions for it, else float32."""
    if name:
        return name
    able = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if able else "float32"


# ---- folders and signals

@contextmanager
def locked(folder: Path, machine: Machine) -> Iterator[None]:
    """Make the folder and lock it against other runs. Raises BlockingIOError if another run has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:       # the system releases the lock, however this process ends
        os.register_at_fork(after_in_child=lock.close)      # a loading process may live some seconds longer
        try:
            if machine.group.rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder}: another run is writing there; wait for it to end.") from error
        yield


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Within it, SIGINT and SIGTERM set the event, and the loop stops after its step. A second SIGINT stops at once."""
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
