"""Fresh processes that start at once: each is forked from one that has imported all and computed nothing."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "adapt", "evaluate", "train",
                                   "tests.study.study"])


class Fresh:
    """A call of `function` in a process and session of its own, with as many threads; `logs` gets what it prints."""

    def __init__(self, logs: Path, folder: Path, function: Callable, *given: str, **environment: str):
        logs.mkdir(parents=True, exist_ok=True)
        self.said, self.told = logs / "stdout", logs / "stderr"
        places = str(folder), str(self.said), str(self.told)
        self.process = FORKSERVER.Process(target=_begin, args=(places, torch.get_num_threads(), environment, function,
                                                               *given))
        self.process.start()

    @property
    def out(self) -> str:
        return self.said.read_text() if self.said.exists() else ""

    @property
    def err(self) -> str:
        return self.told.read_text() if self.told.exists() else ""

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait until it is ready, or has ended."""
        while self.process.is_alive() and not ready():
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Ctrl-C, which reaches the processes that it has started, too."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it at once, with the processes that it has started."""
        with contextlib.suppress(ProcessLookupError):       # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def status(self, timeout: float = 100) -> int:
        """Its exit status; it is killed if it does not end in time."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
        return self.process.exitcode


def in_two(function: Callable, *given: str) -> None:
    """Call `function` of the rank and what is given in two processes."""
    torch.multiprocessing.start_processes(function, given, nprocs=2, start_method="forkserver")


def torchrun(*flags: str) -> None:
    """As the command of that name; its own processes start as slowly as they do for a user."""
    from torch.distributed.run import main
    main([f"--master-port={free_port()}", *flags])


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def script(name: str, *flags: str) -> None:
    """As `python <name> <flags>`; among several processes each has one thread, as torchrun would have it."""
    if "LOCAL_RANK" in os.environ:
        torch.set_num_threads(1)
    sys.argv = [name, *flags]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def _begin(places: tuple[str, str, str], threads: int, environment: dict[str, str], function: Callable,
           *given: str) -> None:
    folder, *logs = places
    torch.set_num_threads(threads)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background of a shell ignores it
    os.environ |= environment
    os.chdir(folder)
    for number, path in enumerate(logs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout.reconfigure(line_buffering=True)
    function(*given)
