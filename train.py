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
from mra.training import Log, Plan, choose_device, choose_precision, make_optimizer, schedule, start_processes, validate


def main() -> None:
    config = parse(TrainConfig, __doc__, recipe_of=lambda given: recipe(given.dataset, given.preset))
    check(config)
    if config.init or config.dataset in PRETRAINING_SETS:
        train(config)
    elif config.data_root:
        raise UserError("--data-root needs --init: a checkpoint to fine-tune, or none to start from random weights.")
    else:
        train(dataclasses.replace(config, init=str(pretrain(config))))


def pretrain(config: TrainConfig) -> Path:
    """The checkpoint that a demo fine-tuning starts from; made first unless it is there already."""
    adapted = Path("out/sda") / config.dataset
    source = str(adapted) if (adapted / "report.json").exists() else "sda"
    print(f"No --init given: pretraining on {'the demo source' if source == 'sda' else source} first.")
    shared = {name: getattr(config, name) for name in
              ("preset", "seed", "device", "resume", "compile", "precision", "vocab", "regions", "workers")}
    return train(TrainConfig(**recipe("sda", config.preset) | shared | {"dataset": source}))


def train(config: TrainConfig) -> Path:
    """One stage, from records to the best checkpoint, whose path is returned."""
    started = time.perf_counter()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    rank, world = start_processes()
    config = dataclasses.replace(config, out=config.out or f"out/{config.dataset.replace('out/', '').replace('/', '-')}"
                                 f"-{config.preset}-s{config.seed}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    say = print if rank == 0 else (lambda *_: None)
    say(f"{show(config)}\nTraining on {device} in {precision}, {world} process(es).")

    # ---- data
    root = Path(config.data_root) if config.data_root else demo_town(config, rank, say)
    train_set = records.load(config.dataset, "train", root, config.allow_missing, say)
    val_set = records.load(config.dataset, "val", root, config.allow_missing, say)

    # ---- model, optimiser
    torch.manual_seed(config.seed)
    pretrained_on = "nothing"
    if config.init in ("", "none"):
        tokenizer = Tokenizer.read(Path(config.vocab or VOCAB_FILE))
        model = Retriever(dataclasses.replace(PRESETS[config.preset], vocab=len(tokenizer))).to(device)
        say("Starting from random weights.")
    else:
        model, tokenizer, earlier = checkpoint.load_retriever(Path(config.init), device)
        pretrained_on = earlier["train"]["dataset"]
        say(f"Starting from {config.init}, trained on {pretrained_on}.")
    optimizer = make_optimizer(model, config)
    dataset = PairDataset(train_set, tokenizer, model.config, config)
    plan = Plan.of(config, len(dataset), world)
    facts = checkpoint.model_facts(model, tokenizer) | {
        "train": dataclasses.asdict(config), "precision": precision, "pretrained_on": pretrained_on,
        "processes": world, "versions": checkpoint.VERSIONS}
    first, best = checkpoint.resume(out, model, optimizer, facts) if config.resume else (0, None)
    if first:
        say(f"Found {out / 'last.safetensors'}: going on after step {first} of {plan.steps}.")
    step_model = torch.compile(model) if config.compile else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, find_unused_parameters=plan.fusion_from > 0)

    # ---- loop
    order = Order(len(dataset), config.batch, config.seed, first * config.accumulate, plan.steps * config.accumulate,
                  rank, world)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate,
                                              num_workers=config.workers, pin_memory=device.type == "cuda"))
    log = Log(out / "log.jsonl", plan, config.accumulate, config.batch * world, quiet=rank > 0)
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
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                terms = step_model(batch, fuse, config.smoothing, config.eda)
                loss = losses.total(terms, config.beta)
            (loss / config.accumulate).backward()
            log.add(terms)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        # --------------------------------------------------------------------------------------------------------
        if (step + 1) % config.log_every == 0 or step + 1 in plan.evals:
            log.flush(step + 1, config.lr * rate)
        # after some steps: val, and the checkpoints
        if step + 1 in plan.evals and rank == 0:
            result = validate(model, tokenizer, val_set, fuse)
            log.write({"step": step + 1, "val": result})
            print(f"val at step {step + 1}: " + describe(result))
            state = facts | {"step": step + 1, "val": result,
                             "seconds": round(time.perf_counter() - started, 1)}
            if best is None or result["quality"] >= best["quality"]:
                best = result
                checkpoint.save(out / "best.safetensors", checkpoint.weights(model), state)
            checkpoint.save(out / "last.safetensors",
                            checkpoint.weights(model) | checkpoint.optimizer_tensors(model, optimizer),
                            state | {"best": best})
            log.restart()
    if rank == 0:
        print(f"Best on val: {describe(best)}\n{out / 'best.safetensors'} is ready after {time.perf_counter() - started:.0f} s.")
    return out / "best.safetensors"


def demo_town(config: TrainConfig, rank: int, say) -> Path:
    """The demo town's folder; the first process draws what is missing while the others wait."""
    if rank == 0:
        town.ready(config.dataset, config.preset == "tiny", say)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return town.root(config.preset == "tiny")


def check(config: TrainConfig) -> None:
    """Raise UserError for values that no run can use."""
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset}: choose one of {', '.join(PRESETS)}.")
    for name, low, high in (("batch", 1, 1e6), ("accumulate", 1, 1e6), ("steps", 0, 1e9), ("evals", 1, 1e6), ("lr", 0, 10),
                            ("log_every", 1, 1e9), ("workers", 0, 256), ("warmup", 0, 1), ("fusion_from", 0, 1),
                            ("smoothing", 0, 1), ("erase", 0, 1), ("eda", 0, 1e3), ("beta", 0, 1e3), ("clip", 1e-9, 1e9)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: give a value from {low} to {high:g}.")
    if config.epochs <= 0 and not config.steps:
        raise UserError(f"--epochs {config.epochs}: give a number above 0.")


def describe(result: dict) -> str:
    """A validation result in one line."""
    stages = [stage for stage in ("embeddings", "reranked") if stage in result]
    return ", ".join(f"{stage} R@1 {result[stage]['R@1']:.2f} mAP {result[stage]['mAP']:.2f}" for stage in stages)


if __name__ == "__main__":
    run(main)
