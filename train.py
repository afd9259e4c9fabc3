"""Train a retriever: pretraining on pairs with boxes, or fine-tuning on a target set.

    python train.py --dataset icfg                     the demo: fine-tune the shipped retriever on drawn ICFG
    python train.py --dataset icfg --init scratch      pretrain on the drawn source first
    python train.py --dataset out/sda/PHOTOS-real --blend 0.5      the shipped retriever on a set of adapt.py
    torchrun --nproc_per_node=2 train.py ...           data-parallel, as adapt.py and evaluate.py can be
    python train.py --check --dataset cuhk --data-root DIR     is the set whole? reads and decodes all of it

Every field of mra.config.TrainConfig is a flag; config.recipe sets some by dataset and preset. `out`/best.safetensors
has the highest (R@1 + mAP) / 2 on val, the later of equal ones, in --evals evaluations, evenly spaced. Once ITM is
trained, val is re-ranked, and a re-ranked result beats any that is not.
"""

import copy
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mra import losses, ranking
from mra.config import TrainConfig, UserError, recipe
from mra.data.batches import PairDataset, loader, order
from mra.data.files import open_image
from mra.data.records import RecordSet, share_of
from mra.data.tokenizer import Tokenizer
from mra.formats.check import check_set
from mra.formats.read import load
from mra.retriever import Objective, Retriever
from mra.run import checkpoint, contrastive, stages
from mra.run.command import parse, run
from mra.run.loop import Loop, Portion, Task, write_line
from mra.run.machine import Machine, locked
from mra.town import sets
from mra.weights.retrievers import load_retriever, model_facts


def main() -> None:
    config = parse(TrainConfig, __doc__, recipe_of=lambda given: recipe(given.dataset, given.preset))
    stages.check(config)
    machine = Machine.of(config.device, config.precision, config.compile)
    if config.check:
        model, tokenizer, _ = stages.load_model(config, machine)      # as in training: which captions would it cut?
        well = check_set(config.dataset, root_of(config), tokenizer, model.config.max_tokens,
                         max(config.workers, machine.cores), machine.say)
        sys.exit(0 if well else 1)
    queue, shipped = stages.stages_of(config, machine), checkpoint.shipped(config.preset)
    made = [shipped] if queue[0].init == str(shipped) else []     # checkpoints before and after each stage
    Path(queue[-1].out).mkdir(parents=True, exist_ok=True)        # a wrong --out fails before the first stage
    for number, stage in enumerate(queue, 1):
        if len(queue) > 1:
            machine.say(f"Stage {number} of {len(queue)}: training on {stage.dataset}.")
        if number > 1:      # it starts from a checkpoint, which has its own vocabulary
            stage = replace(stage, init=str(made[-1]), bert="", vit="", vocab="")
        made.append(train(stage, machine))
    if len(made) > 1:
        print_val_of_stages(config, made, machine)


def train(config: TrainConfig, machine: Machine) -> Path:
    """Train one stage in a folder of its own; returns the path of the best checkpoint."""
    started, path = time.perf_counter(), Path(config.out or stages.default_out(config)) / "best.safetensors"
    config = replace(config, out=str(path.parent))
    with locked(path.parent, machine):
        machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                    f"Training on {machine.device} in {machine.precision}, {machine.group.count} process(es).")
        best = train_stage(config, path, machine)
    machine.on_rank_0(path.touch)   # evaluate.py takes the newest checkpoint, also if this run had nothing left to do
    machine.say(f"Best on val: {stages.describe(best)}\n{path} is ready after {time.perf_counter() - started:.0f} s.")
    return path


def train_stage(config: TrainConfig, path: Path, machine: Machine) -> dict:
    """From records to the best checkpoint `path`; returns its result on val."""
    # ---- records and model
    root = root_of(config)
    train_set, val_set = (load(config.dataset, split, root, config.allow_missing, machine.say)
                          for split in ("train", "val"))
    model, tokenizer, pretrained_on = stages.load_model(config, machine)
    for record in val_set.records:          # a broken image is found now, not after an epoch
        if record.path:
            open_image(record.path)
    dataset = PairDataset(share_of(train_set, config.share), tokenizer, model.config, config)
    # ---- steps and loss
    fit, fused_from, evaluated = stages.timetable_of(config, len(dataset), machine.group.count)
    key = stages.key_of(config, machine, model, tokenizer, [train_set, val_set])
    log, first = path.with_name("log.jsonl"), copy.deepcopy(model) if config.blend else None
    step_model = torch.compile(model) if config.compile else model

    def loss_of(portion: Portion) -> dict[str, Tensor]:
        """L = L_ITC + L_ITM + L_MLM + beta (L_RPC + L_RPM): this member's share of it. All pairs are in ITC and RPC."""
        objective = Objective(portion.step >= fused_from, config.smoothing, config.eda,
                              partial(contrastive.CONTRASTIVE[config.contrastive], group=portion.group), portion.group)
        terms = step_model(portion.batch.to(machine.device), objective)
        return terms | {"loss": losses.total(terms, config.beta)}

    # ---- after each of the steps `evaluated`: val, and the best checkpoint
    def keep_best(done: int, before: dict) -> dict:
        """Evaluate after `done` steps, and save the weights if they are the best; returns this result and the best."""
        fused = done > fused_from
        judged = stages.blended(first, model, config.blend) if first else model
        result = validate(judged, tokenizer, val_set, fused, config, machine)
        write_line(log, {"step": done, "val": result}, machine)
        machine.say(f"val at step {done}: {stages.describe(result)}")
        best = before.get("best", result)
        if machine.any(machine.group.rank == 0 and result["selected_by"] >= best["selected_by"]):      # rank 0 decides
            best = result
            facts = model_facts(model, tokenizer) | {
                "train": asdict(config), "precision": machine.precision, "pretrained_on": pretrained_on,
                "pairs": len(dataset), "processes": machine.group.count, "versions": checkpoint.VERSIONS, "step": done,
                "val": result}
            weights = checkpoint.weights(judged, config.half)
            machine.on_rank_0(lambda: checkpoint.save(path, weights, facts))
        return {"val": result, "best": best}

    # ---- loop
    task = Task(name="retriever", network=model, fit=fit, seed=config.seed, state=path.with_name("last.safetensors"),
                log=log, key=key, param_groups=stages.param_groups(model, config), log_every=config.log_every,
                save_after=evaluated, evaluate=keep_best, after_step=model.limit_temperature, advice=stages.ADVICE,
                resume=config.resume)
    if path.exists() and not task.state.exists() and config.resume:
        raise UserError(f"{path} is of a run that cannot go on: give another --out, or --no-resume to overwrite it.")
    loop = Loop(task, loss_of, machine)
    if loop.results and not path.exists():
        raise UserError(f"{task.state} goes on from a {path.name} that is gone: put it back, or give --no-resume.")
    # each item is a list of one Batch for every thread
    keys = order(dataset.lengths, config.batch, config.seed, loop.done * config.accumulate,
                 fit.steps * config.accumulate, machine.group.rank, machine.group.count)
    loop.run(loader(dataset, config.workers, batch_sampler=keys, pin_memory=machine.device.type == "cuda",
                    collate_fn=partial(dataset.collate_parts, parts=len(loop.members))))
    return loop.results["best"]


def print_val_of_stages(config: TrainConfig, made: list[Path], machine: Machine) -> None:
    """Print the metrics on val of the last stage's set before and after each stage."""
    val_set = load(config.dataset, "val", root_of(config), config.allow_missing, lambda line: None)
    machine.say(f"On {val_set.name} val, before and after each stage:")
    for path in made:
        model, tokenizer, facts = load_retriever(path, machine.device)
        result = validate(model, tokenizer, val_set, "reranked" in facts["val"], config, machine)
        machine.say(f"{stages.describe(result)}  {path}")


def root_of(config: TrainConfig) -> Path:
    """The folder of the sets; the demo's sets are drawn if need be."""
    return Path(config.data_root or sets.ready(config.dataset, config.preset == "tiny"))


def validate(model: Retriever, tokenizer: Tokenizer, val_set: RecordSet, fused: bool, config: TrainConfig,
             machine: Machine) -> dict:
    """Metrics on val, on the CPU in float32; `fused`: re-ranked, too."""
    settings = ranking.Settings(model.config.rerank if fused else 0, workers=config.workers, group=machine.group)
    with machine.for_evaluation().autocast():
        return ranking.validate(model, tokenizer, val_set, fused, settings)


if __name__ == "__main__":
    run(main)
