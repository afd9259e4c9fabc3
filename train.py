"""Train a retriever: pretraining on pairs with boxes, or fine-tuning on a real set.

    python train.py --dataset icfg                     the demo: pretrain on the drawn source, fine-tune on drawn ICFG
    python train.py --dataset sda                      pretraining alone, with the region losses
    python train.py --dataset icfg --init none         fine-tuning from random weights
    python train.py --dataset cuhk --preset base --data-root DIR --init out/sda-base-s0/best.safetensors
    torchrun --nproc_per_node=2 train.py ...           data-parallel

Every field of mra.config.TrainConfig is a flag. The checkpoint that is best on val lies in `out` as best.safetensors.
"""

import dataclasses
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from mra import checkpoint, losses
from mra.config import PRESETS, PRETRAINING_SETS, TrainConfig, UserError, parse, recipe, run, show
from mra.data import records, town
from mra.data.batches import Order, PairDataset
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.retriever import Retriever
from mra.training import Log, Plan, choose_device, make_optimizer, schedule, start_processes, validate


def main() -> None:
    config = parse(TrainConfig, __doc__, recipe_of=lambda given: recipe(given.dataset, given.preset))
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset}: choose one of {', '.join(PRESETS)}.")
    pretraining = config.dataset in PRETRAINING_SETS
    if config.init or pretraining:
        train(config)
    elif config.data_root:
        raise UserError("--data-root needs --init: a checkpoint to fine-tune, or none to start from random weights.")
    else:
        train(dataclasses.replace(config, init=str(pretrain(config))))


def pretrain(config: TrainConfig) -> Path:
    """The checkpoint that a demo fine-tuning starts from; made first unless it is there already."""
    adapted = Path("out/sda") / config.dataset
    source = str(adapted) if (adapted / "report.json").exists() else "sda"
    print(f"No --init: pretraining on {f'the pairs adapted to {config.dataset}' if source != 'sda' else 'source pairs'} first.")
    stage = TrainConfig(**recipe("sda", config.preset) | dict(
        dataset=source, preset=config.preset, seed=config.seed, device=config.device, resume=config.resume,
        compile=config.compile, vocab=config.vocab))
    return train(stage)


def train(config: TrainConfig) -> Path:
    """One stage, from records to the best checkpoint, whose path is returned."""
    started = time.perf_counter()
    device = choose_device(config.device)
    rank, world = start_processes()
    name = Path(config.dataset).name if config.dataset in records.DATASETS else f"adapted-{Path(config.dataset).name}"
    config = dataclasses.replace(config, out=config.out or f"out/{name}-{config.preset}-s{config.seed}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        print(f"{show(config)}\nTraining on {device}, {world} process(es).")

    # ---- data
    root = town.ready(config, rank) if not config.data_root else Path(config.data_root)
    train_set = records.load(config.dataset, "train", root, config.allow_missing)
    val_set = records.load(config.dataset, "val", root, config.allow_missing)

    # ---- model, optimiser
    torch.manual_seed(config.seed)
    if config.init in ("", "none"):
        tokenizer = Tokenizer.read(Path(config.vocab) if config.vocab else VOCAB_FILE)
        model = Retriever(dataclasses.replace(PRESETS[config.preset], vocab=len(tokenizer))).to(device)
        print("Starting from random weights.")
    else:
        model, tokenizer, _ = checkpoint.load_retriever(Path(config.init), device)
    optimizer = make_optimizer(model, config)
    dataset = PairDataset(train_set, tokenizer, model.config, config)
    plan = Plan.of(config, len(dataset), world)
    first, best = 0, None
    facts = checkpoint.model_facts(model, tokenizer) | {"train": dataclasses.asdict(config)}
    if config.resume and (out / "last.safetensors").exists():
        tensors, saved = checkpoint.load(out / "last.safetensors")
        checkpoint.restore_weights(model, tensors, out / "last.safetensors")
        checkpoint.restore_optimizer(model, optimizer, tensors)
        first, best = saved["step"], saved["best"]
        print(f"Resuming after step {first}.")
    step_model = torch.compile(model) if config.compile else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, find_unused_parameters=plan.fusion_from > 0)

    # ---- loop
    order = Order(len(dataset), config.batch, config.seed, first * config.accumulate, plan.steps * config.accumulate,
                  rank, world)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate,
                                              num_workers=config.workers, pin_memory=device.type == "cuda"))
    log = Log(out / "log.jsonl", plan, config.batch * config.accumulate * world, quiet=rank > 0)
    for step in range(first, plan.steps):
        model.train()
        rate = schedule(step, plan.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        fuse = step >= plan.fusion_from
        torch.manual_seed(hash((config.seed, step, rank)) % 2**62)    # dropout and negatives: the same after a restart
        # --------------------------------------------------------------------------------------------------------
        for _ in range(config.accumulate):
            batch = next(loader).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                terms = step_model(batch, fuse, config.smoothing, config.eda)
                loss = losses.total(terms, config.beta)
            (loss / config.accumulate).backward()
            log.add(terms)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # --------------------------------------------------------------------------------------------------------
        if (step + 1) % config.log_every == 0 or step + 1 in plan.evals:
            log.flush(step + 1, config.lr * rate)
        # after some steps: val, and the checkpoints
        if step + 1 in plan.evals and rank == 0:
            result = validate(model, tokenizer, val_set, fuse)
            log.write({"step": step + 1, "val": result})
            print(f"val at step {step + 1}: " + describe(result))
            state = facts | {"step": step + 1, "val": result, "versions": checkpoint.VERSIONS,
                             "seconds": round(time.perf_counter() - started, 1)}
            if best is None or result["quality"] >= best["quality"]:
                best = result
                checkpoint.save(out / "best.safetensors", checkpoint.weights(model), state)
            checkpoint.save(out / "last.safetensors",
                            checkpoint.weights(model) | checkpoint.optimizer_tensors(model, optimizer),
                            state | {"best": best})
            log.restart()
    print(f"Best on val: {describe(best)}\nWrote {out / 'best.safetensors'} after {time.perf_counter() - started:.0f} s.")
    return out / "best.safetensors"


def describe(result: dict) -> str:
    """A validation result in one line."""
    stages = [stage for stage in ("embeddings", "reranked") if stage in result]
    return ", ".join(f"{stage} R@1 {result[stage]['R@1']:.2f} mAP {result[stage]['mAP']:.2f}" for stage in stages)


if __name__ == "__main__":
    run(main)
