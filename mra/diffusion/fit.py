"""The loop that trains each network of DaD: resumable, with an exponential moving average of the weights.

Before: autoencoder.py, denoiser.py. After: adapt.py.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mra import checkpoint
from mra.config import Fit, UserError
from mra.similarity import summed
from mra.training import SHARDS, Log, Machine, any_process, claimed, schedule, stoppable


def fit(name: str, model: nn.Module, loss_of: Callable[[torch.Generator, int], Tensor], plan: Fit, path: Path,
        facts: dict, seed: int, machine: Machine) -> None:
    """Train the parameters of `model` that require gradients and leave it with their moving average.

    `loss_of(generator, n)` gives the loss of n random samples. A finished `path` of the same facts is loaded in place
    of training; an unfinished one, beside it as .part, is gone on from in the same precision: bit for bit on the CPU,
    since all that is random comes from (seed, step, shard): two processes on the CPU do what one does. Raises UserError
    for a loss or gradient that is not finite, and where the processes cannot share out a step's samples.
    """
    facts = {"stage": name, **asdict(plan), "seed": seed, **facts}
    if path.exists():
        checkpoint.restore_weights(model, load_same(path, facts)[0], path)
        machine.say(f"{name}: {path} is there.")
        return
    facts["precision"] = machine.precision
    check_shares(name, plan, machine)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    part = path.with_suffix(".part")
    with claimed(path.parent, machine), stoppable() as asked:
        first = 0
        if part.exists():
            tensors, saved = load_same(part, facts)
            with checkpoint.trusting(part):
                checkpoint.restore(model, optimizer, tensors, part)
                for k, p in average.items():
                    p.copy_(tensors[f"average.{k}"])
                first = int(saved["step"])
        started = time.perf_counter()
        log = Log(path.with_suffix(".jsonl"), plan.steps, plan.batch, machine.rank > 0, first, f"{name} ")
        for step in range(first, plan.steps):
            optimizer.param_groups[0]["lr"] = plan.lr * schedule(step, plan.steps, 0.05)
            loss = backward(loss_of, list(parameters.values()), plan.batch, (seed, step), machine)
            norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            keep = min(plan.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - keep)
            log.terms.append({"loss": loss, "gradient": norm})
            done = step + 1
            stop = any_process(asked.is_set(), machine)
            if done % plan.save_every == 0 or done == plan.steps or stop:
                log.flush(done, optimizer.param_groups[0]["lr"])
                if machine.rank == 0 and done < plan.steps:
                    checkpoint.save(part, checkpoint.state(model, optimizer)
                                    | {f"average.{k}": v for k, v in average.items()}, facts | {"step": done})
                if stop and done < plan.steps:
                    raise KeyboardInterrupt
        with torch.no_grad():
            for k, p in parameters.items():
                p.copy_(average[k])
        if machine.rank == 0:
            checkpoint.save(path, checkpoint.weights(model), facts | {"seconds": round(time.perf_counter() - started)})
            part.unlink(missing_ok=True)
    if any_process(asked.is_set(), machine):
        raise KeyboardInterrupt


def load_same(path: Path, facts: dict) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's tensors and facts. Raises UserError where it was trained with other facts."""
    tensors, saved = checkpoint.load(path)
    if "precision" not in saved:        # an older file
        facts = {key: value for key, value in facts.items() if key != "precision"}
    wrong = [key for key, value in json.loads(json.dumps(facts)).items() if saved.get(key) != value]
    if wrong:
        raise UserError(f"{path} was made with another {wrong[0]}; remove it to train anew.")
    return tensors, saved


def check_shares(name: str, plan: Fit, machine: Machine) -> None:
    """Raise UserError where the processes cannot share out the samples of a step."""
    if plan.batch % (machine.world * shards_of(machine)):
        raise UserError(f"{name}: {machine.world} processes cannot share out the {plan.batch} images of a step; start "
                        "another number of them.")


def shards_of(machine: Machine) -> int:
    """Parts of a step that this process works on side by side."""
    return max(1, SHARDS // machine.world) if machine.device.type == "cpu" else 1


def backward(loss_of: Callable[[torch.Generator, int], Tensor], parameters: list[nn.Parameter], batch: int,
             seeds: tuple[int, int], machine: Machine) -> Tensor:
    """Set the gradients of one step of `batch` samples, the mean over shards and processes; returns the loss."""
    shards = shards_of(machine)

    def loss_and_gradients(shard: int) -> tuple[Tensor, ...]:
        draw = torch.Generator(machine.device).manual_seed(hash((*seeds, *divmod(shard, SHARDS))) % 2**62)
        with machine.autocast():
            loss = loss_of(draw, batch // (shards * machine.world))
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    total, *others = machine.map(loss_and_gradients, range(machine.rank * shards, (machine.rank + 1) * shards))
    for other in others:
        total = torch._foreach_add(total, other)
    loss, *gradients = torch._foreach_div(total, shards)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = summed(gradient).div_(machine.world)       # laid out in memory as the parameter is
    return loss
