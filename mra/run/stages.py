"""The stages of train.py: which model each starts from, how long it is, and what must stay the same to resume it."""

import copy
import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mra.config import PRESETS, AdaptConfig, Fit, TrainConfig, UserError, made_by_adapt, pretrains, recipe
from mra.data.files import printable
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.formats.read import DATASETS
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.machine import Machine
from mra.weights import retrievers
from mra.weights.files import folder_of

# Flags that are not in a run's key. The key has pairs a step in place of --batch, and digests in place of paths.
NOT_IN_KEY = {"resume", "out", "device", "workers", "log_every", "compile", "batch", "precision", "allow_missing",
              "dataset", "data_root", "init", "bert", "vit", "clip", "vocab"}
ADVICE = "give another --out (a pretraining: --dataset sda --out, then --init), or --no-resume to overwrite it"
OF_PRETRAINING = "bert", "vit", "clip", "vocab", "regions", "beta", "contrastive"    # shipped: the defaults
SHARED = "preset", "seed", "device", "resume", "compile", "precision", "workers", *OF_PRETRAINING    # by all stages
PRETRAINS_FIRST = "", "scratch"             # values of --init with stages before the fine-tuning
NO_CHECKPOINT = "", "none", "scratch"       # values of --init that name no checkpoint


def stages_of(config: TrainConfig, machine: Machine) -> list[TrainConfig]:
    """The stages of a call: each starts from the best weights of the one before, with a new optimiser and schedule.

    Before a fine-tuning without --data-root stand the source and, if there is one, the adapted set. The shipped
    retriever replaces the source unless a flag asks for another pretraining. An adapted set also starts from it.
    """
    shipped = checkpoint.shipped(config.preset)
    usual = all(getattr(config, name) == getattr(TrainConfig(), name) for name in ("init", *OF_PRETRAINING))
    if config.init not in PRETRAINS_FIRST or pretrains(config.dataset):
        starts = not any((config.init, config.bert, config.vit, config.clip, config.vocab)) and shipped.exists()
        return [replace(config, init=str(shipped)) if starts and made_by_adapt(config.dataset) else config]
    config = replace(config, out=config.out or default_out(config))

    def earlier(dataset: str) -> TrainConfig:
        flags = recipe(dataset, config.preset) | {name: getattr(config, name) for name in SHARED}
        batch = max(2, flags["batch"] // machine.group.count)       # as many pairs a step in any number of processes
        return TrainConfig(**flags | {"dataset": dataset, "batch": batch})

    queue, adapted = [earlier("sda"), config], adapted_set(config)
    if adapted:
        queue.insert(1, earlier(str(adapted)))
    if usual and shipped.exists():
        queue = [replace(queue[1], init=str(shipped)), *queue[2:]]     # the file replaces the source
    return queue


def adapted_set(config: TrainConfig) -> Path | None:
    """The set that adapt.py made for this target, if there is one. Raises UserError for an unfinished one."""
    if config.dataset not in DATASETS:
        return None
    # the same share of the target: a set made from all labels would leak those beyond the share
    made = Path(AdaptConfig(target=config.dataset, size=config.preset, share=config.share).usual_out)
    check_whole(made)
    return made if made_by_adapt(made) else None


def check_whole(folder: Path) -> None:
    """Raise UserError for a set that adapt.py has not finished."""
    if checkpoint.key_file(folder / "parts").exists() and not made_by_adapt(folder):
        raise UserError(f"{folder} is an adapted set that is not finished: run adapt.py again, or remove it.")


def load_model(config: TrainConfig, machine: Machine) -> tuple[Retriever, Tokenizer, str]:
    """The model to start from, its tokenizer, and the set that it was pretrained on."""
    torch.manual_seed(config.seed)
    if config.init in NO_CHECKPOINT:
        if config.blend:
            raise UserError("--blend is a share of first weights that are trained: give --init, or leave it out.")
        given = " and ".join(filter(None, (config.bert, config.vit, config.clip)))
        machine.say(f"Starting from {given or 'random weights'}.")
        model, tokenizer = retrievers.start(PRESETS[config.preset], config.bert, config.vit, config.vocab, config.clip)
        return model.to(machine.device), tokenizer, "nothing"
    model, tokenizer, facts = retrievers.load_retriever(Path(config.init), machine.device, config.vocab)
    was = facts["train"]["preset"]
    if {was, config.preset} == {"swin-224", "swin"}:        # they differ in the size of the images alone
        model = retrievers.resized(model, PRESETS[config.preset]).to(machine.device)
    elif was != config.preset:
        raise UserError(f"{config.init} was trained with --preset {was}; give the same here.")
    trained_on = facts["train"]["dataset"] or "an unnamed set"
    machine.say(f"Starting from {config.init}, trained on {printable(trained_on)}.")
    return model, tokenizer, trained_on


def default_out(config: TrainConfig) -> str:
    """out/<dataset>-<preset>-s<seed>, then `noregions`, what the run starts from, and `adapted`, where they apply."""
    name, fine_tunes = config.dataset, not pretrains(config.dataset)
    if name not in DATASETS:
        name = "-".join(Path(name).resolve().parts[-2:])
    regions = "" if config.regions else "noregions"
    start = config.init if fine_tunes else ""
    if config.init not in NO_CHECKPOINT:
        start = f"from-{folder_of(Path(config.init).resolve()).name}"
    adapted = "adapted" if config.init in PRETRAINS_FIRST and fine_tunes and adapted_set(config) else ""
    parts = name, config.preset, f"s{config.seed}", regions, start, adapted
    return "out/" + re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


def timetable_of(config: TrainConfig, pairs: int, processes: int) -> tuple[Fit, int, frozenset[int]]:
    """How the loop trains, the first step with ITM and MLM, and the steps after which val is evaluated."""
    steps = config.steps or math.ceil(config.epochs * pairs / (config.batch * config.accumulate * processes))
    fit = Fit(steps, config.batch * processes, config.lr, config.warmup, betas=(0.9, 0.98),      # the paper's
              weight_decay=config.weight_decay, max_norm=config.max_norm, average=0.0, accumulate=config.accumulate)
    evals = {round(steps * (i + 1) / config.evals) for i in range(config.evals)} - {0}
    return fit, round(config.fusion_from * steps), frozenset(evals)


def param_groups(model: Retriever, config: TrainConfig) -> list[dict]:
    """Parameter groups: the model's `new_parts` and the others; in each, matrices alone have weight decay."""
    groups = []
    for new, rate in ((False, config.lr), (True, config.lr * config.head_lr)):
        for matrices, decay in ((False, 0.0), (True, config.weight_decay)):
            chosen = [parameter for name, parameter in model.named_parameters()
                      if name.startswith(model.new_parts) == new and (parameter.ndim >= 2) == matrices]
            groups.append({"params": chosen, "peak": rate, "weight_decay": decay})
    return groups


def key_of(config: TrainConfig, machine: Machine, model: Retriever, tokenizer: Tokenizer,
           sets_used: list[RecordSet]) -> dict:
    """All that must stay the same to resume a run, by the names that the user reads."""
    key = {"--" + name.replace("_", "-"): value for name, value in asdict(config).items() if name not in NOT_IN_KEY}
    key["--dataset"] = config.dataset if config.dataset in DATASETS else "a folder"
    key["--batch x processes"] = config.batch * machine.group.count
    key["content of the first weights (--init, --bert, --vit, --clip)"] = checkpoint.digest(model)
    key["content of the vocabulary"] = checkpoint.digest_of([json.dumps(tokenizer.pieces).encode()])
    report = Path(config.dataset) / "report.json"           # adapt.py wrote it
    key["content of the adapted set"] = checkpoint.digest_of([report.read_bytes()]) if report.is_file() else ""
    for one in sets_used:
        inside = len(os.path.commonprefix([record.path for record in one.records if record.path]))    # it may be moved
        key[f"content of the {one.split} records"] = checkpoint.digest_of(
            repr((record.path[inside:], record.captions, record.identity, record.boxes, record.phrases)).encode()
            for record in one.records)
    return key


def blended(first: Retriever, last: Retriever, share: float) -> Retriever:
    """A model of the weights share x first + (1 - share) x last (WiSE-FT, Wortsman et al. 2022)."""
    mean = copy.deepcopy(last)
    torch._foreach_lerp_([own.data for own in mean.parameters()], [own.data for own in first.parameters()], share)
    return mean


def describe(result: dict) -> str:
    """A validation result in one line."""
    rankings = {name: result[name] for name in ("embeddings", "reranked") if name in result}
    return ", ".join(f"{name} R@1 {ranked['R@1']:.2f} mAP {ranked['mAP']:.2f}" for name, ranked in rankings.items())


def check(config: TrainConfig) -> None:
    """Raise UserError for flags that exclude each other, or missing files."""
    fresh = config.init in NO_CHECKPOINT
    if PRESETS[config.preset].bins and config.batch < 2:
        raise UserError(f"--batch {config.batch}: the swin presets normalise over the batch; give 2 or more.")
    if config.dataset not in DATASETS and not Path(config.dataset).is_dir():
        raise UserError(f"--dataset {config.dataset}: choose one of {', '.join(DATASETS)}, or give a set's folder.")
    check_whole(Path(config.dataset))
    if not fresh and not Path(config.init).exists():
        raise UserError(f"--init {config.init}: no such checkpoint; give a file, or none to start from random weights.")
    if (config.bert or config.vit or config.clip) and not fresh:
        raise UserError("--bert, --vit and --clip start a new model, --init continues one: give one or the other.")
    if config.clip and (config.bert or config.vit):
        raise UserError("--clip brings both encoders: leave out --bert and --vit.")
    if config.vit and PRESETS[config.preset].window:
        raise UserError(f"--vit: --preset {config.preset} has a Swin, which no ViT fits; leave one of them out.")
    if fresh and (config.preset == "clip") != bool(config.clip):
        raise UserError("--preset clip starts from --clip or --init, and no other preset takes --clip.")
    fine_tunes = not (config.check or pretrains(config.dataset))
    if fine_tunes and config.data_root and config.init in PRETRAINS_FIRST:
        raise UserError("--data-root needs --init: a checkpoint to fine-tune, or none to start from random weights.")
    if fine_tunes and config.dataset not in DATASETS and not config.init and config.preset not in ("tiny", "demo"):
        raise UserError(f"--dataset {config.dataset} needs --init at --preset {config.preset}: a checkpoint; none to "
                        "start from random weights or --bert, --vit, --clip; scratch to pretrain on drawn people.")
