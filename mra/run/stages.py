"""The stages of train.py: where one starts from, how long it is, and what must stay the same to go on with it."""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mra.config import PRESETS, Fit, TrainConfig, UserError, pretrains, recipe
from mra.data.files import harmless
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.formats.read import DATASETS
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.loop import Loop
from mra.run.machine import Machine
from mra.weights import retrievers

# flags that are not compared as they are when a run goes on. In place of --batch the key has the pairs of a step, in
# place of paths the content of weights, vocabulary and records; the loop adds the precision that was chosen.
NOT_AS_GIVEN = {"resume", "out", "device", "workers", "log_every", "compile", "batch", "precision", "allow_missing",
              "dataset", "data_root", "init", "bert", "vit", "vocab"}
ADVICE = "give another --out (a pretraining: --dataset sda --out, then --init), or --no-resume to overwrite it"
SHIPPED = Path(__file__).parents[1] / "weights/shipped"
OF_PRETRAINING = "bert", "vit", "vocab", "regions", "beta"       # flags that only matter before
PRETRAINED = "", "scratch"                  # values of --init with stages before the fine-tuning
FROM_NOTHING = "", "none", "scratch"        # values of --init that name no checkpoint
ADAPTED_LR = 4 / 7      # learning rate on the adapted set, as a share of that on the source


# ---- where a stage starts from

def shipped(config: TrainConfig) -> Path | None:
    """The shipped retriever, pretrained on the drawn source, where a fine-tuning may start from it.

    --init scratch, a flag that shapes the pretraining, and a preset that none is shipped for ask for another one.
    """
    path = Path(os.path.relpath(SHIPPED / f"{config.preset}.safetensors"))
    shaped = any(getattr(config, name) != getattr(TrainConfig(), name) for name in OF_PRETRAINING)
    return None if config.init or shaped or not path.exists() else path


def pretrainings(config: TrainConfig, machine: Machine, on_source: bool) -> list[TrainConfig]:
    """The stages before a fine-tuning on the demo town: on the source, then on the adapted set where there is one."""
    shared = {name: getattr(config, name) for name in (
        "preset", "seed", "device", "resume", "compile", "precision", "workers", *OF_PRETRAINING)}
    usual = recipe("sda", config.preset)
    batch = max(2, usual["batch"] // machine.world)         # as many pairs in all processes together
    source = TrainConfig(**usual | shared | {"dataset": "sda", "batch": batch})
    found, adapted = [], adapted_set(config)
    if on_source:
        found.append(source)
    if adapted is not None:
        found.append(replace(source, dataset=str(adapted), lr=ADAPTED_LR * source.lr, fusion_from=0.0, light=0.0))
    return found


def going_on(config: TrainConfig, best: Path) -> TrainConfig:
    """The configuration of a stage that starts from another one's checkpoint, which has its own vocabulary."""
    return replace(config, init=str(best), bert="", vit="", vocab="")


def adapted_set(config: TrainConfig) -> Path | None:
    """The set that adapt.py made for this target, if there is one. Raises UserError for one that is unfinished."""
    if config.dataset not in DATASETS:
        return None
    made = Path("out/sda") / (config.dataset if config.preset == "demo" else f"{config.dataset}-{config.preset}")
    check_whole(made)
    return made if (made / "report.json").exists() else None


def check_whole(folder: Path) -> None:
    """Raise UserError for a set that adapt.py has not finished."""
    if any((folder / "parts").glob("*.json")) and not (folder / "report.json").exists():
        raise UserError(f"{folder} is an adapted set that is not finished: run adapt.py again, or remove it.")


def load_model(config: TrainConfig, machine: Machine) -> tuple[Retriever, Tokenizer, str]:
    """The model to start from, its tokenizer, and what it was pretrained on."""
    torch.manual_seed(config.seed)
    if config.init in FROM_NOTHING:
        machine.say(f"Starting from {' and '.join(filter(None, (config.bert, config.vit))) or 'random weights'}.")
        model, tokenizer = retrievers.start(PRESETS[config.preset], config.bert, config.vit, config.vocab)
        return model.to(machine.device), tokenizer, "nothing"
    model, tokenizer, facts = retrievers.load_retriever(Path(config.init), machine.device, config.vocab)
    was = facts["train"]["preset"]
    if was != config.preset:
        if was not in PRESETS or retrievers.with_size(PRESETS[was], PRESETS[config.preset]) != PRESETS[config.preset]:
            raise UserError(f"{config.init} was trained with --preset {was}; say so here too.")
        model = retrievers.resized(model, PRESETS[config.preset]).to(machine.device)
    trained_on = facts["train"]["dataset"] or "an unnamed set"
    machine.say(f"Starting from {config.init}, trained on {harmless(trained_on)}.")
    return model, tokenizer, trained_on


def default_out(config: TrainConfig) -> str:
    """out/<dataset>-<preset>-s<seed>, and what else sets this run apart: no regions, where it started from."""
    name = config.dataset
    if name not in DATASETS:
        name = "-".join(Path(name).resolve().parts[-2:])
    parts = [name, config.preset, f"s{config.seed}"]
    if not config.regions:
        parts.append("noregions")
    if config.init not in FROM_NOTHING:
        parts += ["from", Path(config.init).resolve().parent.name]
    elif config.init and not pretrains(config.dataset):
        parts.append(config.init)
    if config.init in PRETRAINED and not pretrains(config.dataset) and adapted_set(config):
        parts.append("adapted")
    return "out/" + re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


# ---- how long a stage is, and how it is trained

@dataclass(frozen=True)
class Lengths:
    """The lengths of a stage, from its configuration and the number of pairs."""

    steps: int
    fusion_from: int        # first step with ITM and MLM
    evals: frozenset[int]   # steps after which val is evaluated; the last step is one

    @staticmethod
    def of(config: TrainConfig, pairs: int, world: int) -> "Lengths":
        steps = config.steps or math.ceil(config.epochs * pairs / (config.batch * config.accumulate * world))
        evals = {round(steps * (i + 1) / config.evals) for i in range(config.evals)} - {0}
        return Lengths(steps, round(config.fusion_from * steps), frozenset(evals | {steps}))


def fit_of(config: TrainConfig, steps: int, world: int) -> Fit:
    """How the loop trains the retriever: AdamW with the paper's betas, no average of the weights."""
    return Fit(steps, config.batch * world, config.lr, config.warmup, (0.9, 0.98), config.weight_decay, config.clip,
               average=0.0, accumulate=config.accumulate)


def groups(model: Retriever, config: TrainConfig) -> list[dict]:
    """Four groups of parameters: encoders and new heads, each with weight decay (matrices) and without (the rest)."""
    members = {(head, decay): [] for head in (False, True) for decay in (False, True)}
    for name, parameter in model.named_parameters():
        members[name.startswith(model.new_parts), parameter.ndim >= 2].append(parameter)
    found = []
    for (head, decay), parameters in members.items():
        found.append({"params": parameters, "peak": config.lr * (config.head_lr if head else 1),
                      "weight_decay": config.weight_decay if decay else 0.0})
    return found


# ---- what is said of a run

def key_of(config: TrainConfig, machine: Machine, model: Retriever, tokenizer: Tokenizer,
           sets_used: list[RecordSet]) -> dict:
    """All that must be the same for a run to go on, by the name to tell the user."""
    key = {"--" + name.replace("_", "-"): value for name, value in asdict(config).items() if name not in NOT_AS_GIVEN}
    key["--dataset"] = config.dataset if config.dataset in DATASETS else "a folder"
    key["--batch x processes"] = config.batch * machine.world
    key["content of the first weights (--init, --bert, --vit)"] = checkpoint.digest(model)
    key["content of the vocabulary"] = short(json.dumps(tokenizer.pieces).encode())
    key["content of the adapted set"] = made_by(config.dataset)
    for one in sets_used:
        key[f"content of the {one.split} records"] = digest_of(one)
    return key


def digest_of(used: RecordSet) -> str:
    """A short name for what the records say, wherever the folder of their images lies."""
    inside = len(os.path.commonprefix([record.path for record in used.records]))
    found = hashlib.sha256()
    for record in used.records:
        found.update(repr((record.path[inside:], record.captions, record.identity, record.boxes,
                           record.phrases)).encode())
    return found.hexdigest()[:16]


def facts_of(config: TrainConfig, machine: Machine, pretrained_on: str, pairs: int) -> dict:
    """What a checkpoint says of its run."""
    return {"train": asdict(config), "precision": machine.precision, "pretrained_on": pretrained_on, "pairs": pairs,
            "adapted": made_by(config.dataset), "processes": machine.world, "versions": checkpoint.VERSIONS}


def made_by(dataset: str) -> str:
    """A short name for what adapt.py's report says of a set; empty where there is none."""
    report = Path(dataset) / "report.json"
    return short(report.read_bytes()) if report.is_file() else ""


def short(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.sha256(content).hexdigest()[:16]


def describe(result: dict) -> str:
    """A validation result in one line."""
    stages = [stage for stage in ("embeddings", "reranked") if stage in result]
    return ", ".join(f"{stage} R@1 {result[stage]['R@1']:.2f} mAP {result[stage]['mAP']:.2f}" for stage in stages)


# ---- checks

def check(config: TrainConfig) -> None:
    """Raise UserError for flags that do not go together, or files that are not there."""
    fresh = config.init in FROM_NOTHING
    if PRESETS[config.preset].bins and config.batch < 2:
        raise UserError(f"--batch {config.batch}: the swin presets normalise over the batch; give 2 or more.")
    if config.dataset not in DATASETS and not Path(config.dataset).is_dir():
        raise UserError(f"--dataset {config.dataset}: choose one of {', '.join(DATASETS)}, or give a set's folder.")
    check_whole(Path(config.dataset))
    if not fresh and not Path(config.init).is_file():
        raise UserError(f"--init {config.init}: no such checkpoint; give a file, or none to start from random weights.")
    if (config.bert or config.vit) and not fresh:
        raise UserError("--bert and --vit start a new model, --init goes on with one as it is.")
    if config.data_root and config.init in PRETRAINED and not (config.check or pretrains(config.dataset)):
        raise UserError("--data-root needs --init: a checkpoint to fine-tune, or none to start from random weights.")


def check_best(loop: Loop, best: Path) -> None:
    """Raise UserError where a run would go on without its best checkpoint, or its quality is damaged."""
    if not loop.results:
        return
    with checkpoint.trusting(loop.task.state):
        if not all(isinstance(part, bool | float) for part in loop.results["best"]["quality"]):
            raise ValueError(f"quality is {loop.results['best']['quality']!r}")
    if not best.exists():
        raise UserError(f"{loop.task.state} goes on from a {best.name} that is gone: put it back, or give --no-resume "
                        "to start over.")
