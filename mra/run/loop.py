"""The one training loop: of the retriever, and of every network of DaD.

It resumes, accumulates, averages, logs and stops. Dropout, negatives and noise depend on (seed, step, batch, member),
views and masked words on (seed, epoch, index). So a run that was stopped goes on with the next batch, bit for bit on
the CPU, and two threads compute what two processes do. Steps after the last save are done and logged again.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mra.config import Fit, UserError
from mra.group import Group
from mra.run import checkpoint
from mra.run.machine import Machine, stoppable


@dataclass
class Task:
    """A network to train, and all that must be known to resume its training."""

    name: str                           # begins its lines of progress
    network: nn.Module
    fit: Fit
    seed: int
    state: Path | None = None           # file of the unfinished training; None: it is not saved
    log: Path | None = None             # file of a JSON line for each line of progress; None: nothing is told
    key: dict = field(default_factory=dict)             # all that must be the same to resume
    param_groups: list[dict] | None = None              # each with its "peak" learning rate; None: a single one
    log_every: int = 0                  # steps between two lines of progress; 0: at saves alone
    save_after: frozenset[int] = frozenset()            # steps to save the state after; train.py: evaluations
    evaluate: Callable[[int, dict], dict] | None = None     # called after a save: (steps done, its last results)
    after_step: Callable[[], None] = lambda: None
    advice: str = ""                    # what to do if the state has another key; empty: it begins anew
    resume: bool = True                 # False: it begins anew


@dataclass(frozen=True)
class Portion:
    """One member's portion of one batch of a step."""

    step: int
    batch: Any                  # its samples; None: the loss draws them itself
    count: int                  # of its samples
    generator: torch.Generator  # of all its random numbers
    group: Group


class Loop:
    """A task, ready to begin or to go on after `done` steps. `run` leaves the network with its averaged weights."""

    def __init__(self, task: Task, loss_of: Callable[[Portion], dict[str, Tensor]], machine: Machine):
        """`loss_of` returns "loss", and terms to tell with it. Raises UserError for a state that does not fit."""
        fit = task.fit
        if fit.batch % machine.group.count:
            raise UserError(f"{task.name}: {machine.group.count} processes cannot share out the {fit.batch} samples "
                            "of a step evenly; start another number of them.")
        self.task, self.loss_of, self.machine = task, loss_of, machine
        self.members = machine.step_members(fit.batch // machine.group.count, task.network)
        self.parameters = {name: p for name, p in task.network.named_parameters() if p.requires_grad}
        one = dict(params=list(self.parameters.values()), peak=fit.lr, weight_decay=fit.weight_decay)
        self.optimizer = torch.optim.AdamW(task.param_groups or [one], fit.lr, betas=fit.betas, fused=True)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if fit.average else {}
        self.key = task.key | {"precision": machine.precision}
        self.done, self.evaluated, self.results = 0, False, {}     # steps done; what `evaluate` returned last
        if task.resume and task.state and task.state.exists():
            self.restore()
        if not self.done:
            for file in filter(None, (task.log, task.state)):
                machine.on_rank_0(lambda: file.unlink(missing_ok=True))

    def run(self, batches: Iterable[list] | None = None) -> None:
        """Train to the last step. Each of the batches is a list of what every member here gets of it."""
        task, fit, machine = self.task, self.task.fit, self.machine
        with stoppable() as asked:
            # begun here, so that loading processes inherit the signal handlers of `stoppable`
            batches = iter(batches) if batches is not None else repeat([None] * len(self.members))
            if self.done in task.save_after and not self.evaluated:
                self.evaluate(self.done)
            terms, since = [], time.perf_counter()      # of the steps after the last line of progress
            for step in range(self.done, fit.steps):
                rate = schedule(step, fit.steps, fit.warmup)
                for one in self.optimizer.param_groups:
                    one["lr"] = one["peak"] * rate
                task.network.train()
                try:
                    terms.append(self.backward(step, batches))
                except (UserError, OSError):        # such as an image that is gone: the steps before it are kept
                    if machine.group.count == 1:
                        self.save(step)
                    raise
                terms[-1]["gradient"] = nn.utils.clip_grad_norm_(self.parameters.values(), fit.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                task.after_step()
                if self.average:        # its decay grows to `fit.average`
                    decay = min(fit.average, (1 + step) / (10 + step))
                    current = [p.detach() for p in self.parameters.values()]
                    torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
                done, stop = step + 1, machine.any(asked.is_set())
                saves = done in task.save_after
                tells = saves or stop or done == fit.steps or (task.log_every and done % task.log_every == 0)
                if tells:
                    self.tell(done, terms, time.perf_counter() - since)
                if saves or stop:
                    self.save(done)
                if saves:       # after the save, so that nothing is lost in what follows
                    self.evaluate(done)
                if tells:
                    terms, since = [], time.perf_counter()
                if stop:
                    raise KeyboardInterrupt
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)

    def backward(self, step: int, batches: Iterator[list]) -> dict[str, Tensor]:
        """Set the gradients of a step, the mean over members and batches; returns the mean of the terms here."""
        task, fit, told, sums = self.task, self.task.fit, {}, {}     # sums of terms, and of gradients
        size = fit.batch // (self.machine.group.count * len(self.members))
        for number in range(fit.accumulate):
            portions = []
            for member, samples in zip(self.members, next(batches), strict=True):
                generator = self.machine.generator(task.seed, step, number, member.rank)
                portions.append(Portion(step, samples, size, generator, member))
            for terms, gradients in self.side_by_side(portions):
                if sums:
                    torch._foreach_add_(list(sums.values()), list(gradients.values()))
                else:
                    sums = gradients
                told = {name: told.get(name, 0) + term for name, term in terms.items()}
        count = fit.accumulate * len(self.members)
        torch._foreach_div_(list(sums.values()), count * self.machine.group.count)
        for name, gradient in sums.items():
            parameter, gradient = self.parameters[name], self.machine.group.summed(gradient)
            if gradient.stride() != parameter.stride():     # the fused AdamW of a CPU would mix up their elements
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        return {name: term / count for name, term in told.items()}

    def side_by_side(self, portions: list[Portion]) -> list[tuple[dict, dict]]:
        """`gradients_of` each portion, in threads if there are several."""
        if len(portions) == 1:
            return [self.gradients_of(portions[0])]

        def compute(portion: Portion):
            try:
                return self.gradients_of(portion)
            except threading.BrokenBarrierError:        # the other thread has failed, and raises why
                return None
            except BaseException:
                portion.group.barrier.abort()         # the other thread waits for no tensors of this one
                raise

        return self.machine.map(compute, portions)

    def gradients_of(self, portion: Portion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of a portion, and the gradient of each parameter that its loss depends on."""
        with self.machine.randomness(portion.generator), self.machine.autocast():
            terms = self.loss_of(portion)
        gradients = torch.autograd.grad(terms["loss"], list(self.parameters.values()), allow_unused=True)
        # a term that has not begun leaves some parameters without a gradient
        used = {name: gradient for name, gradient in zip(self.parameters, gradients) if gradient is not None}
        return {name: term.detach() for name, term in terms.items()}, used

    def tell(self, step: int, terms: list[dict[str, Tensor]], seconds: float) -> None:
        """Write the mean of each term over these steps and all processes. Raises UserError if one is not finite."""
        task, fit, group = self.task, self.task.fit, self.machine.group
        own = [torch.stack([found[name] for found in terms if name in found]).mean() for name in terms[-1]]
        joint = group.summed(torch.stack(own)) / group.count
        means = {name: round(mean, 4) for name, mean in zip(terms[-1], joint.tolist())}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise UserError(f"{task.name} {name} is {mean} by step {step}; what was saved before it is kept. Try "
                                "train.py with a smaller --lr, or adapt.py with --precision float32.")
        if task.log:
            rate = fit.lr * schedule(step - 1, fit.steps, fit.warmup)
            speed = fit.batch * fit.accumulate * len(terms) / seconds       # images of all processes
            left = seconds / len(terms) * (fit.steps - step) / 60
            write_line(task.log, {"step": step, **means, "lr": rate, "images_per_second": round(speed, 1)},
                       self.machine)
            told = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            self.machine.say(f"{task.name} step {step}/{fit.steps}  {told}  lr {rate:.1e}  {speed:.0f} images/s  "
                             f"{left:.1f} min left")

    def evaluate(self, step: int) -> None:
        if self.task.evaluate:
            self.results = self.task.evaluate(step, self.results)
            self.save(step, evaluated=True)

    # ---- the saved state

    def save(self, step: int, evaluated: bool = False) -> None:
        """Write weights, optimiser and average. `evaluated`: `evaluate` was called after this step."""
        if self.task.state is None:
            return
        if self.machine.group.count > 1:
            for buffer in self.task.network.buffers():      # batch norms have seen other samples in each process
                dist.broadcast(buffer, 0)
        if self.machine.group.rank == 0:
            averages = {f"average.{name}": value for name, value in self.average.items()}
            checkpoint.save(self.task.state, checkpoint.state(self.task.network, self.optimizer) | averages,
                            {"key": self.key, "step": step, "evaluated": evaluated, "results": self.results})

    def restore(self) -> None:
        """Restore the saved state if it has this key. For another, raises UserError if the task has advice."""
        task = self.task
        tensors, saved = checkpoint.load(task.state)
        with checkpoint.trusting(task.state):
            if not checkpoint.same_key(task.state, saved["key"], self.key, self.machine.say, task.advice):
                return
            checkpoint.restore(task.network, self.optimizer, tensors, task.state)
            for name, average in self.average.items():
                average.copy_(tensors[f"average.{name}"])
            self.done, self.evaluated = int(saved["step"]), bool(saved["evaluated"])
            self.results = dict(saved["results"])
        self.machine.say(f"Found {task.state}: going on after step {self.done} of {task.fit.steps}.")


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: it rises over the first `warmup` of the steps, and then falls to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def write_line(path: Path, line: dict, machine: Machine) -> None:
    if machine.group.rank == 0:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
