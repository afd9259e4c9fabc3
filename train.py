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
best on val lies in `out` as best.safetensors. mra/run/loop.py has the loop.
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mra import losses, ranking
from mra.config import PRESETS, TrainConfig, pretrains, recipe
from mra.data.batches import PairDataset, loader, order
from mra.data.files import open_image
from mra.data.records import share_of
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.formats.check import check_set
from mra.formats.read import load
from mra.retriever import Objective
from mra.run import checkpoint, contrastive, stages
from mra.run.command import parse, run
from mra.run.loop import Loop, Share, Task, write_line
from mra.run.machine import Machine, claimed, drawn
from mra.weights.retrievers import model_facts


def main() -> None:
    config = parse(TrainConfig, __doc__, recipe_of=lambda given: recipe(given.dataset, given.preset))
    stages.check(config)
    machine = Machine.of(config.device, config.precision, config.compile)
    if config.check:
        tokenizer = Tokenizer.read(Path(config.vocab or VOCAB_FILE))
        well = check_set(config.dataset, root_of(config, machine), tokenizer, PRESETS[config.preset].max_tokens,
                         config.workers or machine.cores, machine.say)
        sys.exit(0 if well else 1)
    best, plan = None, [config]
    if config.init in stages.PRETRAINED and not pretrains(config.dataset):
        config = replace(config, out=config.out or stages.default_out(config))
        Path(config.out).mkdir(parents=True, exist_ok=True)     # before the long pretraining
        best = stages.shipped(config)
        plan = [*stages.pretrainings(config, machine, on_source=best is None), config]
    for number, stage in enumerate(plan, 1):
        if len(plan) > 1:
            machine.say(f"Stage {number} of {len(plan)}: training on {stage.dataset}.")
        best = train(stage if best is None else stages.going_on(stage, best), machine)


def root_of(config: TrainConfig, machine: Machine) -> Path:
    """The folder of the sets: --data-root, or the demo town's."""
    return Path(config.data_root) if config.data_root else drawn(config.dataset, config.preset == "tiny", machine)


def train(config: TrainConfig, machine: Machine) -> Path:
    """One stage, in a folder of its own; returns the path of the best checkpoint."""
    started, out = time.perf_counter(), Path(config.out or stages.default_out(config))
    config = replace(config, out=str(out))
    with claimed(out, machine):
        machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                    f"Training on {machine.device} in {machine.precision}, {machine.world} process(es).")
        best = train_stage(config, out, machine)
    machine.first((out / "best.safetensors").touch)        # evaluate.py takes the newest: of what was asked for last
    machine.say(f"Best on val: {stages.describe(best)}\n{out / 'best.safetensors'} is ready after "
                f"{time.perf_counter() - started:.0f} s.")
    return out / "best.safetensors"


def train_stage(config: TrainConfig, out: Path, machine: Machine) -> dict:
    """From records to the best checkpoint; returns its result on val."""
    # ---- data and model
    root = root_of(config, machine)
    train_set, val_set = (load(config.dataset, split, root, config.allow_missing, machine.say)
                          for split in ("train", "val"))
    model, tokenizer, pretrained_on = stages.load_model(config, machine)
    for record in val_set.records:          # a broken image is told now, not after an epoch
        open_image(record.path)
    dataset = PairDataset(share_of(train_set, config.share), tokenizer, model.config, config)
    # ---- optimiser and plan
    lengths = stages.Lengths.of(config, len(dataset), machine.world)
    fit = stages.fit_of(config, lengths.steps, machine.world)
    step_model = torch.compile(model) if config.compile else model

    def loss_of(share: Share) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_ITC + L_ITM + L_MLM + beta (L_RPC + L_RPM) of one worker's pairs."""
        objective = Objective(share.step >= lengths.fusion_from, config.smoothing, config.eda,
                              partial(contrastive.contrastive, workers=share.workers),
                              partial(contrastive.mean_where, workers=share.workers))
        terms = step_model(share.batch.to(machine.device), objective)
        return losses.total(terms, config.beta), terms

    def keep_best(done: int, found: dict) -> dict:
        """Evaluate on val after `done` steps, and write the best checkpoint; returns this result and the best one."""
        fused = done > lengths.fusion_from
        plan = ranking.Plan(model.config.rerank if fused else 0, loading=config.workers, workers=machine.workers)
        autocast = machine.autocast() if machine.device.type == "cuda" else nullcontext()       # as evaluate.py
        result = ranking.validate(model, tokenizer, val_set, fused, plan, autocast)
        write_line(out / "log.jsonl", {"step": done, "val": result}, machine)
        machine.say(f"val at step {done}: {stages.describe(result)}")
        best = found.get("best")
        if best is None or result["quality"] >= best["quality"]:
            best = result
            facts = model_facts(model, tokenizer) | stages.facts_of(config, machine, pretrained_on, len(dataset))
            weights = checkpoint.halves(model) if config.half else checkpoint.weights(model)
            machine.first(lambda: checkpoint.save(out / "best.safetensors", weights,
                                                  facts | {"step": done, "val": result}))
        return {"val": result, "best": best}

    task = Task("", model, fit, config.seed, out / "last.safetensors", out / "log.jsonl",
                stages.key_of(config, machine, model, tokenizer, [train_set, val_set]), stages.groups(model, config),
                config.log_every, lengths.evals, keep_best, model.limit_temperature,
                stages.ADVICE, config.resume)
    loop = Loop(task, loss_of, machine)
    stages.check_best(loop, out / "best.safetensors")
    # ---- batches, in an order that depends on the seed alone; each a list of one Batch for each thread of this process
    keys = order(len(dataset), config.batch, config.seed, loop.first * config.accumulate,
                 lengths.steps * config.accumulate, machine.rank, machine.world)
    collate = partial(dataset.collate_parts, parts=len(loop.workers))
    batches = loader(dataset, config.workers, batch_sampler=keys, collate_fn=collate,
                     pin_memory=machine.device.type == "cuda")
    loop.run(batches)
    return loop.results["best"]


if __name__ == "__main__":
    run(main)
