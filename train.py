"""Train a retriever: pretraining on pairs with boxes, or fine-tuning on a real set.

    python train.py --dataset icfg                     the demo: pretrain on the drawn source, fine-tune on drawn ICFG
    python train.py --dataset sda                      pretraining alone, with the region losses
    python train.py --dataset icfg --init none         fine-tuning from random weights
    python train.py --dataset cuhk --preset base --data-root DIR --init out/sda-base-s0/best.safetensors
    python train.py --dataset sda --preset base --data-root DIR --bert bert-base-uncased --vit vit_b_16.pth
    python train.py --dataset cuhk --preset swin --data-root DIR --init pretrain.pth        from the released model
    torchrun --nproc_per_node=2 train.py ...           data-parallel
    python train.py --check --dataset cuhk --data-root DIR     is the set whole? reads and decodes all of it

Every field of mra.config.TrainConfig is a flag; a recipe there sets some by dataset and preset. The checkpoint that is
best on val lies in `out` as best.safetensors.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mra import checkpoint, losses, released, training, weights
from mra.config import PRESETS, TrainConfig, UserError, check_values, harmless, parse, pretrains, recipe, run
from mra.data import town
from mra.data.batches import PairDataset, loader, order
from mra.data.check import check_set
from mra.data.records import DATASETS, RecordSet, load_splits, open_image, share_of
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever


def main() -> None:
    config = parse(TrainConfig, __doc__, recipe_of=lambda given: recipe(given.dataset, given.preset))
    check(config)
    if config.check:
        root = Path(config.data_root) if config.data_root else town.ready(config.dataset, config.preset == "tiny")
        sys.exit(0 if check_set(config.dataset, root, config.workers or os.cpu_count() or 1) else 1)
    machine = training.Machine.of(config.device, config.precision)
    if not config.init and not pretrains(config.dataset):
        out = config.out or default_out(config)
        training.make_folder(Path(out))       # before the long pretraining
        config = replace(config, out=out, init=str(pretrain(config, machine)), vocab="")      # it has its own now
    train(config, machine)


def pretrain(config: TrainConfig, machine: training.Machine) -> Path:
    """The checkpoint that a demo fine-tuning starts from; made first unless it is there already."""
    source = str(adapted_set(config) or "sda")
    machine.say(f"No --init given: pretraining on {'the demo source' if source == 'sda' else source} first.")
    shared = {name: getattr(config, name) for name in (
        "preset", "seed", "device", "resume", "compile", "precision", "bert", "vit", "vocab", "regions", "beta",
        "released_regions", "workers")}
    usual = recipe("sda", config.preset)
    joint = {"dataset": source, "batch": max(2, usual["batch"] // machine.world)}      # as many pairs in all processes
    return train(TrainConfig(**usual | shared | joint), machine)


def adapted_set(config: TrainConfig) -> Path | None:
    """The set that adapt.py made for this target, if there is one. Raises UserError for one that is unfinished."""
    made = Path("out/sda") / (config.dataset + f"-{config.preset}" * (config.preset != "demo"))
    if config.dataset not in DATASETS:
        return None
    check_whole(made)
    return made if (made / "report.json").exists() else None


def check_whole(folder: Path) -> None:
    """Raise UserError for a set that adapt.py has not finished."""
    if any((folder / "parts").glob("*.json")) and not (folder / "report.json").exists():
        raise UserError(f"{folder} is an adapted set that is not finished: run adapt.py again, or remove it.")


def train(config: TrainConfig, machine: training.Machine) -> Path:
    """One stage, from records to the best checkpoint, whose path is returned."""
    started, config = time.perf_counter(), replace(config, out=config.out or default_out(config))
    with training.claimed(Path(config.out), machine):
        machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                    f"Training on {machine.device} in {machine.precision}, {machine.world} process(es).")
        found, best = Path(config.out, "best.safetensors"), train_stage(config, machine)
    machine.say(f"Best on val: {describe(best)}\n{found} is ready after {time.perf_counter() - started:.0f} s.")
    return found


def train_stage(config: TrainConfig, machine: training.Machine) -> dict:
    """`train` in a folder of its own; returns the best result on val."""
    started, out = time.perf_counter(), Path(config.out)
    device, rank, world, say = machine.device, machine.rank, machine.world, machine.say
    # ---- data, model, optimiser
    root = machine.root(config.data_root, config.dataset, config.preset == "tiny")
    train_set, val_set = load_splits(config.dataset, ("train", "val"), root, config.allow_missing, say)
    model, tokenizer, pretrained_on = load_model(config, device, say)
    for record in val_set.records:          # a broken one is told now, not after an epoch
        open_image(record.path)
    dataset = PairDataset(share_of(train_set, config.share), tokenizer, model.config, config)
    plan = training.Plan.of(config, len(dataset), world)
    optimizer = training.make_optimizer(model, config)
    facts = checkpoint.model_facts(model, tokenizer) | {
        "train": asdict(config), "precision": machine.precision, "pretrained_on": pretrained_on,
        "pairs": len(dataset), "steps": plan.steps, "adapted": made_by(config.dataset), "processes": world,
        "versions": checkpoint.VERSIONS}
    first, best, judged = checkpoint.resume(out, model, optimizer, facts) if config.resume else (0, None, False)
    if first:
        say(f"Found {out / 'last.safetensors'}: going on after step {first} of {plan.steps}.")
    step_model = torch.compile(model) if config.compile else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, find_unused_parameters=plan.fusion_from > 0)
    if not first:               # here all processes have looked; another run's best stays until there is a new one
        machine.first(lambda: (out / "last.safetensors").unlink(missing_ok=True))
    log = training.Log(out / "log.jsonl", plan.steps, config.batch * config.accumulate * world, rank > 0,
                       first + judged / 2)
    keys = order(len(dataset), config.batch, config.seed, first * config.accumulate, plan.steps * config.accumulate,
                 rank, world)

    def judge(step: int) -> dict:
        return keep(machine, out, model, tokenizer, optimizer, val_set, step > plan.fusion_from, log, best, facts | {
            "step": step, "seconds": round(time.perf_counter() - started, 1)})

    if first in plan.evals and not judged:      # it ended in that evaluation
        best = judge(first)
    with training.stoppable() as asked:     # Ctrl-C spares the loading processes
        batches = iter(loader(dataset, config.workers, batch_sampler=keys, collate_fn=dataset.collate,
                              pin_memory=device.type == "cuda"))
        for step in range(first, plan.steps):
            model.train()
            rate = training.schedule(step, plan.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            fuse = step >= plan.fusion_from
            torch.manual_seed(hash((config.seed, step, rank)) % 2**62)    # dropout and negatives, as before a restart
            # --------------------------------------------------------------------------------------------------------
            seen = {}
            for part in range(1, config.accumulate + 1):
                waits = part < config.accumulate and world > 1      # gradients are exchanged once, when all are added
                with machine.autocast(), step_model.no_sync() if waits else nullcontext():
                    terms = step_model(next(batches).to(device), fuse, config.smoothing, config.eda)
                    loss = losses.total(terms, config.beta) / config.accumulate
                loss.backward()
                seen |= {name: seen.get(name, 0) + term.detach() / config.accumulate for name, term in terms.items()}
            seen["gradient"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.temperature.data.clamp_(0.001, 0.5)
            log.terms.append(seen)
            # --------------------------------------------------------------------------------------------------------
            done = step + 1
            if done % config.log_every == 0 or done in plan.evals:
                log.flush(done, config.lr * rate)
            if done in plan.evals:
                best = judge(done)
            if training.any_process(asked.is_set(), machine):
                log.flush(done, config.lr * rate)           # which refuses what is not finite
                if done not in plan.evals:
                    machine.first(lambda: checkpoint.save(out / "last.safetensors", checkpoint.state(model, optimizer),
                                                          facts | {"step": done, "best": best}))
                raise KeyboardInterrupt
    return best


def keep(machine: training.Machine, out: Path, model: Retriever, tokenizer: Tokenizer,
         optimizer: torch.optim.Optimizer, val_set: RecordSet, fused: bool, log: training.Log, best: dict | None,
         facts: dict) -> dict:
    """Write the last checkpoint, evaluate on val, and write the best one if this is it; returns the best result."""
    for buffer in model.buffers() if machine.world > 1 else ():
        dist.broadcast(buffer, 0)       # batch norms have seen other pairs in each process
    last = out / "last.safetensors"
    machine.first(lambda: checkpoint.save(last, checkpoint.state(model, optimizer), facts | {"best": best}))
    result = training.validate(model, tokenizer, val_set, fused, facts["train"]["workers"],
                               machine.autocast() if machine.device.type == "cuda" else nullcontext())  # as evaluate.py
    log.write({"step": facts["step"], "val": result})
    machine.say(f"val at step {facts['step']}: {describe(result)}")
    judged, better = facts | {"val": result}, best is None or result["quality"] >= best["quality"]
    if machine.rank == 0:
        if better:
            checkpoint.save(out / "best.safetensors", checkpoint.weights(model), judged)
        checkpoint.save(last, checkpoint.state(model, optimizer), judged | {"best": result if better else best})
    log.restart()
    return result if better else best


def default_out(config: TrainConfig) -> str:
    """out/<dataset>-<preset>-s<seed>, and what else sets this run apart: no regions, where it started from."""
    name = config.dataset if config.dataset in DATASETS else "-".join(Path(config.dataset).resolve().parts[-2:])
    parts = [name, config.preset, f"s{config.seed}"] + ["noregions"] * (not config.regions)
    parts += ["released"] * config.released_regions
    if config.init not in ("", "none"):
        parts += ["from", Path(config.init).resolve().parent.name]
    elif not pretrains(config.dataset):
        parts += ["scratch"] if config.init else ["adapted"] if adapted_set(config) else []
    return "out/" + re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


def made_by(dataset: str) -> str:
    """A short name for what adapt.py's report says of a set; empty where there is none."""
    report = Path(dataset) / "report.json"
    return hashlib.sha256(report.read_bytes()).hexdigest()[:16] if report.is_file() else ""


def load_model(config: TrainConfig, device: torch.device, say: Callable) -> tuple[Retriever, Tokenizer, str]:
    """The model to start from, its tokenizer, and what it was pretrained on."""
    torch.manual_seed(config.seed)
    if config.init in ("", "none"):
        say(f"Starting from {' and '.join(filter(None, (config.bert, config.vit))) or 'random weights'}.")
        size = replace(PRESETS[config.preset], released_regions=config.released_regions)
        model, tokenizer = weights.start(size, config.bert, config.vit, config.vocab)
        return model.to(device), tokenizer, "nothing"
    model, tokenizer, facts = released.load_retriever(Path(config.init), device, config.vocab)
    was = facts["train"]["preset"]
    if was != config.preset:
        if was not in PRESETS or released.with_size(PRESETS[was], PRESETS[config.preset]) != PRESETS[config.preset]:
            raise UserError(f"{config.init} was trained with --preset {was}; say so here too.")
        model = released.resized(model, PRESETS[config.preset]).to(device)
    trained_on = facts["train"]["dataset"] or "an unnamed set"
    say(f"Starting from {config.init}, trained on {harmless(trained_on)}.")
    return model, tokenizer, trained_on


def check(config: TrainConfig) -> None:
    """Raise UserError for values that no run can use."""
    check_values(config, preset=PRESETS)
    if PRESETS[config.preset].bins and config.batch < 2:
        raise UserError(f"--batch {config.batch}: the swin presets normalise over the batch; give 2 or more.")
    if config.dataset not in DATASETS and not Path(config.dataset).is_dir():
        raise UserError(f"--dataset {config.dataset}: choose one of {', '.join(DATASETS)}, or give a set's folder.")
    check_whole(Path(config.dataset))
    if config.init not in ("", "none") and not Path(config.init).is_file():
        raise UserError(f"--init {config.init}: no such checkpoint; give a file, or none to start from random weights.")
    if (config.bert or config.vit or config.released_regions) and config.init not in ("", "none"):
        raise UserError("--bert, --vit and --released-regions start a new model, --init goes on with one as it is.")
    if config.data_root and not (config.init or config.check or pretrains(config.dataset)):
        raise UserError("--data-root needs --init: a checkpoint to fine-tune, or none to start from random weights.")


def describe(result: dict) -> str:
    """A validation result in one line."""
    stages = [stage for stage in ("embeddings", "reranked") if stage in result]
    return ", ".join(f"{stage} R@1 {result[stage]['R@1']:.2f} mAP {result[stage]['mAP']:.2f}" for stage in stages)


if __name__ == "__main__":
    run(main)
