"""The one training loop: of the retriever, and of every network of DaD.

It resumes, accumulates, averages, logs and stops, and it shares a step out over processes and threads in one way: each
worker computes the loss and the gradients of its own samples, and the mean over workers is taken. All that is random in
a step depends on (seed, step, part, worker), so a run that was stopped goes on bit for bit on the CPU, and two threads
compute what two processes do. Read next: train.py, networks.py.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mra.config import Fit, UserError
from mra.run import checkpoint
from mra.run.kept import changes
from mra.run.machine import Machine, OwnRandomness, Threads, stoppable
from mra.workers import Workers


@dataclass
class Task:
    """A network to train, and all that must be known to go on with it later."""

    name: str                           # begins its lines of progress; empty: the retriever
    network: nn.Module
    fit: Fit
    seed: int
    state: Path | None = None           # file of the unfinished training; None: it is not saved
    log: Path | None = None             # file of a JSON line for each line of progress; None: nothing is told
    key: dict = field(default_factory=dict)             # all that must be the same to go on
    groups: list[dict] | None = None    # of the optimiser, each with its "peak" learning rate; None: a single one
    log_every: int = 0                  # steps between two lines of progress; 0: at saves alone
    save_after: frozenset[int] = frozenset()            # steps after which the state is saved
    evaluate: Callable[[int, dict], dict] = lambda step, results: {}    # after a save, with its results before
    after_step: Callable[[], None] = lambda: None
    advice: str = ""                    # what to do where the state has another key; empty: the training begins anew
    resume: bool = True                 # False: it begins anew


@dataclass(frozen=True)
class Share:
    """One worker's part of one batch of a step."""

    step: int
    batch: Any                  # its samples; None where the loss draws them itself ...
    count: int                  # ... so many
    draw: torch.Generator       # random numbers that depend on (seed, step, part, worker)
    workers: Workers


LossOf = Callable[[Share], tuple[Tensor, dict[str, Tensor]]]    # -> the loss, and the terms to tell


class Loop:
    """A task, ready to begin or to go on after `first` steps. `run` leaves the network with its averaged weights."""

    def __init__(self, task: Task, loss_of: LossOf, machine: Machine):
        """Raises UserError where the processes cannot share out the samples of a step evenly; see also `go_back`."""
        fit = task.fit
        if fit.batch % machine.world:
            raise UserError(f"{task.name}: {machine.world} processes cannot share out the {fit.batch} samples of a "
                            "step evenly; start another number of them.")
        self.task, self.loss_of, self.machine = task, loss_of, machine
        self.workers = machine.step_workers(fit.batch // machine.world, task.network)
        self.parameters = {name: p for name, p in task.network.named_parameters() if p.requires_grad}
        groups = task.groups or [dict(params=list(self.parameters.values()), peak=fit.lr,
                                      weight_decay=fit.weight_decay)]
        self.optimizer = torch.optim.AdamW(groups, fit.lr, betas=fit.betas, fused=True)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if fit.average else {}
        self.key = task.key | {"precision": machine.precision}
        self.results = {}                   # what `evaluate` returned last
        self.first, self.evaluated = self.go_back() if task.resume else (0, False)
        if not self.first and task.state:
            machine.first(lambda: task.state.unlink(missing_ok=True))       # after all processes have looked

    def run(self, make_batches: Callable[[], Iterator[list] | None] = lambda: None) -> None:
        """Train to the last step. `make_batches` gives batches, each as a list of what every worker here gets of it.

        It is called where signals are already heeded, so that loading processes, too, leave them to the loop.
        """
        task, fit, machine = self.task, self.task.fit, self.machine
        log = Log(task, fit.batch * fit.accumulate, machine, self.first + self.evaluated / 2)
        if self.first in task.save_after and not self.evaluated:
            self.save_and_evaluate(self.first)
        with stoppable() as asked:
            batches = make_batches()
            for step in range(self.first, fit.steps):
                rate = schedule(step, fit.steps, fit.warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
                task.network.train()
                # ----------------------------------------------------------------------------------------------------
                terms = self.backward(step, batches)
                terms["gradient"] = nn.utils.clip_grad_norm_(self.parameters.values(), fit.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                # ----------------------------------------------------------------------------------------------------
                task.after_step()
                self.update_average(step)
                log.terms.append(terms)
                done, stop = step + 1, machine.any(asked.is_set())
                saves = done in task.save_after
                if saves or stop or done == fit.steps or (task.log_every and done % task.log_every == 0):
                    log.flush(done, fit.lr * rate)
                if saves:
                    self.save_and_evaluate(done)
                    log.restart()
                elif stop:
                    self.save(done)
                if stop:
                    raise KeyboardInterrupt
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)

    def backward(self, step: int, batches: Iterator[list] | None) -> dict[str, Tensor]:
        """Set the gradients of a step, the mean over workers and batches; returns the loss terms, their mean here."""
        fit, seen, total = self.task.fit, {}, {}
        for part in range(fit.accumulate):
            samples = [None] * len(self.workers) if batches is None else next(batches)
            for terms, gradients in self.side_by_side(step, part, samples):
                if total:
                    torch._foreach_add_(list(total.values()), list(gradients.values()))
                else:
                    total = gradients
                seen = {name: seen.get(name, 0) + term for name, term in terms.items()}
        count = fit.accumulate * len(self.workers)
        torch._foreach_div_(list(total.values()), count)
        for name, gradient in total.items():
            self.parameters[name].grad = self.machine.workers.summed(gradient).div_(self.machine.world)
        return {name: term / count for name, term in seen.items()}

    def side_by_side(self, step: int, part: int, samples: list) -> list[tuple[dict, dict]]:
        """`gradients_of` for each worker of this process, in threads where there are several."""
        if len(self.workers) == 1:
            return [self.gradients_of(self.workers[0], step, part, samples[0])]
        errors = []

        def compute(worker: Threads):
            try:
                return self.gradients_of(worker, step, part, samples[worker.rank])
            except threading.BrokenBarrierError:        # another worker has failed, and says why
                return None
            except BaseException as error:
                errors.append(error)
                worker.barrier.abort()

        results = self.machine.map(compute, self.workers)
        if errors:
            raise errors[0]
        return results

    def gradients_of(self, worker: Workers, step: int, part: int,
                     samples: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss terms of one worker's samples, and the gradient of each parameter that they depend on."""
        device, count = self.machine.device, self.task.fit.batch // (self.machine.world * len(self.workers))
        seed = hash((self.task.seed, step, part, worker.rank)) % 2**62
        share = Share(step, samples, count, torch.Generator(device).manual_seed(seed), worker)
        if device.type == "cpu" and not self.machine.compiles:
            randomness = OwnRandomness(seed)
        else:
            randomness = nullcontext()
            torch.manual_seed(seed)
        with randomness, self.machine.autocast():
            loss, terms = self.loss_of(share)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        # a term that has not begun leaves some parameters without a gradient
        used = {name: gradient for name, gradient in zip(self.parameters, gradients) if gradient is not None}
        return {name: term.detach() for name, term in terms.items()}, used

    def update_average(self, step: int) -> None:
        """Move the average of the weights; its decay grows to that of `fit`."""
        if self.average:
            decay = min(self.task.fit.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    # ---- the saved state

    def save_and_evaluate(self, step: int) -> None:
        """Save first, so that nothing is lost in what follows; then call `evaluate`, and save its results."""
        self.save(step)
        results = self.task.evaluate(step, self.results)
        if results:
            self.results = results
            self.save(step, evaluated=True)

    def save(self, step: int, evaluated: bool = False) -> None:
        """Write weights, optimiser and average. `evaluated`: `evaluate` was called after this step."""
        if self.task.state is None:
            return
        if self.machine.world > 1:
            for buffer in self.task.network.buffers():      # batch norms have seen other samples in each process
                dist.broadcast(buffer, 0)
        if self.machine.rank == 0:
            averages = {f"average.{name}": value for name, value in self.average.items()}
            checkpoint.save(self.task.state, checkpoint.state(self.task.network, self.optimizer) | averages,
                            {"key": self.key, "step": step, "evaluated": evaluated, "results": self.results})

    def go_back(self) -> tuple[int, bool]:
        """Go back to the saved state, if there is one for this key: the steps done, and whether `evaluate` was called.

        Raises UserError where the state has another key and the task has advice.
        """
        task = self.task
        if task.state is None or not task.state.exists():
            return 0, False
        tensors, saved = checkpoint.load(task.state)
        with checkpoint.trusting(task.state):
            first = int(saved["step"])
            before, now = saved["key"], self.key
            if first == task.fit.steps:         # nothing is computed any more
                before = before | {"precision": now["precision"]}
            different = changes(before, now)
            if different and task.advice:
                raise UserError(f"{task.state} was trained otherwise: {different[0]}; {task.advice}.")
            if different:
                self.machine.say(f"{task.state} is begun anew: {'; '.join(different)}.")
                return 0, False
            checkpoint.restore(task.network, self.optimizer, tensors, task.state)
            for name, average in self.average.items():
                average.copy_(tensors[f"average.{name}"])
            evaluated, self.results = bool(saved["evaluated"]), dict(saved["results"])
        self.machine.say(f"Found {task.state}: going on after step {first} of {task.fit.steps}.")
        return first, evaluated


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: it rises over the first `warmup` of the steps, and then falls to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


class Log:
    """Loss terms of the steps since the last line; `flush` makes a line of progress of them, and one of the file.

    `images` are of one step, all processes. Where a run goes on after step `first`, the lines after it are removed.
    """

    def __init__(self, task: Task, images: int, machine: Machine, first: float):
        self.path, self.steps, self.images, self.machine = task.log, task.fit.steps, images, machine
        self.name = f"{task.name} " if task.name else ""
        if self.path and self.path.exists() and machine.rank == 0:
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if line.endswith("\n") and step_of(line) <= first))
        self.restart()

    def flush(self, step: int, rate: float) -> None:
        """Write the means of the steps up to `step`, if any. Raises UserError if a term of one is not finite."""
        if not self.terms:
            return
        self.check_finite(step)
        seconds = (time.perf_counter() - self.since) / len(self.terms)      # of one step
        means = {name: round(torch.stack([terms[name] for terms in self.terms if name in terms]).mean().item(), 4)
                 for name in self.terms[-1]}
        if self.path:
            write_line(self.path, {"step": step, **means, "lr": rate,
                                   "images_per_second": round(self.images / seconds, 1)}, self.machine)
            told = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            self.machine.say(f"{self.name}step {step}/{self.steps}  {told}  lr {rate:.1e}  "
                             f"{self.images / seconds:.0f} images/s  {seconds * (self.steps - step) / 60:.1f} min left")
        self.restart()

    def check_finite(self, step: int) -> None:
        for number, terms in enumerate(self.terms, step - len(self.terms) + 1):
            for name, term in terms.items():
                if not term.isfinite():
                    advice = "" if self.name else " Try a smaller --lr."
                    raise UserError(f"{self.name}{name} is {term.item()} at step {number}; what was saved before it is "
                                    f"kept.{advice}")

    def restart(self) -> None:
        """Forget the steps so far, and the time that something else took."""
        self.terms, self.since = [], time.perf_counter()


def write_line(path: Path, line: dict, machine: Machine) -> None:
    """Add a line to a log."""
    if machine.rank == 0:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def step_of(line: str) -> float:
    """The step of a line of a log, half a step later for its evaluation; infinite for a damaged line."""
    try:
        found = json.loads(line)
        step = float(found["step"])
        return step + 0.5 if "val" in found else step
    except (ValueError, TypeError, KeyError):
        return math.inf
