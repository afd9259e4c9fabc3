"""Domain-aware diffusion: make pretraining images that look like the target (MRA section 2).

    python adapt.py                                  the demo: images in the look of drawn ICFG, from the shipped base
    python adapt.py --target cuhk --mode restyle     the source's own images in the target's look
    python adapt.py --train-base                     train the base anew, as the shipped one was
    python adapt.py --size base --source DIR --target cuhk --data-root DIR
    python adapt.py --size sd15 --weights DIR --target cuhk --data-root DIR     beside Stable Diffusion 1.5
    torchrun --nproc_per_node=2 adapt.py ...         data-parallel training, sampling shared out

Every field of mra.config.AdaptConfig is a flag. What is finished for the same configuration is not made again. The
set in `out` is in SDA format: `train.py --dataset out/sda/cuhk` pretrains on it, `train.py --dataset cuhk` finds it.
Thresholds of the filters can be changed without making the images again; --box-threshold is applied while making.
"""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, AdaptConfig, UserError
from mra.data.records import RecordSet, share_of
from mra.diffusion.base import Diffusion, encode
from mra.diffusion.boxes import usual_places
from mra.diffusion.making import Maker, make_plan
from mra.diffusion.sampling import Painter
from mra.formats.read import load
from mra.run import checkpoint, networks, parts
from mra.run.command import parse, run
from mra.run.kept import is_kept
from mra.run.machine import Machine, claimed, drawn
from mra.town import sets

BASE_PEOPLE = sets.TownSizes(source_train=(12_000, 2), source_test=(800, 3))    # whom the shipped base has seen
PLACED = 50_000        # records of the source whose boxes tell where in an image a noun usually is
THRESHOLDS = "grey_mean", "grey_variance", "malformed"
# flags that decide neither the images nor their scores; digests in the key stand for the files that flags name
NOT_IN_KEY = {"out", "resume", "base", "weights", "source", "data_root", "train_base", "workers", "device", "precision",
              "recompute", *THRESHOLDS}


def main() -> None:
    config = parse(AdaptConfig, __doc__, recipe_of=usual_flags)
    check(config)
    machine = Machine.of(config.device, config.precision, config.compile)
    machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                f"Running on {machine.device} in {machine.precision}, {machine.world} process(es).")
    if config.train_base:
        machine.say(f"{train_base(config, machine)} is ready.")
        return
    out = Path(config.out or default_out(config))
    with claimed(out, machine):
        adapt(config, machine, out)


def adapt(config: AdaptConfig, machine: Machine, out: Path) -> None:
    """The whole way: base, branch, decoder, samples, boxes, filters, set."""
    flags = {"flags": {name: value for name, value in asdict(config).items() if name not in NOT_IN_KEY},
             "precision": machine.precision}
    parts.refuse_others(out, flags, config.resume)      # before hours of training
    # ---- the frozen base, and the pairs of target and source
    base = load_base(config, machine)
    root = Path(config.data_root) if config.data_root else drawn(config.target, config.size == "tiny", machine)
    records = share_of(load(config.target, "train", root, say=machine.say), config.share)
    target = networks.Target.of(config, records, base)
    source = source_records(config, machine).records if config.source or not config.data_root else []
    # ---- what learns the target: branch, decoder, a judge of malformed people
    base = networks.with_scale(base, target.images)
    branch = networks.train_branch(config, base, target, machine)
    latents = None
    if not base.config.stable or config.mode == "restyle":
        latents = encode(base.autoencoder, target.images)                                # (N, C, h, w)
    if not base.config.stable:
        base = base.with_autoencoder(networks.train_decoder(config, base, target, latents, machine))
    judge = networks.train_judge(config, target, machine)
    # ---- what to make, from the captions or images of target or source
    places = usual_places(islice(source, PLACED), *base.config.shape[1:])
    plan = make_plan(config, base, source, records.records, places)
    key = flags | target.key | {
        "branch": checkpoint.digest(branch), "decoder": checkpoint.digest(base.autoencoder),
        "judge": checkpoint.digest(judge), "plan": plan.digest()}
    set_key = key | {name: getattr(config, name) for name in THRESHOLDS}
    if is_kept(out / "report.json", set_key, machine):
        return machine.say(f"{out} is complete.")
    # ---- samples, calibrated and decoded; each phrase with its box; scores for the filters
    machine.first(lambda: parts.begin(out, key, config.resume))
    fast = [torch.compile(network) if config.compile else network for network in (base.denoiser, branch)]
    painter = Painter(config, base, branch, *fast, latents, parts.source_latents(plan, base, config.workers))
    maker = Maker(config, painter, judge, plan, out)
    parts.make_parts(maker, machine)
    # ---- the set: what passes the filters
    machine.first(lambda: parts.finish(maker, target.images, set_key, machine))


# ---- base, source and target

def load_base(config: AdaptConfig, machine: Machine) -> Diffusion:
    """The frozen base. Sizes that none is shipped for have it trained first, which takes hours."""
    base = networks.load_base(config, source_root(config), machine)
    if base is None:
        train_base(replace(config, seed=0), machine)
        base = networks.load_base(config, source_root(config), machine)
    return base


def train_base(config: AdaptConfig, machine: Machine) -> Path:
    """Train the base on the source, which for the demo is a larger one of its own; returns its file."""
    if config.source or config.size == "tiny":
        records = source_records(config, machine)
    else:
        root = Path("data/base")
        machine.first(lambda: sets.build(root, "source", BASE_PEOPLE, 1, machine.cores, machine.say))
        records = load("sda", "train", root, say=machine.say)
    out = Path("out") / f"base-{config.size}"
    with claimed(out / "whole", machine):
        return networks.train_base(config, records, source_root(config), machine)


def source_root(config: AdaptConfig) -> str:
    """The folder of the source set; empty for the drawn one."""
    return str(Path(config.source).resolve()) if config.source else ""


def source_records(config: AdaptConfig, machine: Machine) -> RecordSet:
    """The source set's training pairs, without those of its val identities."""
    root = Path(config.source) if config.source else drawn("sda", config.size == "tiny", machine)
    name = next((name for name in ("sda", "mals") if (root / name.upper()).is_dir()), config.source)
    return load(name, "train", root, say=machine.say)


# ---- flags

def usual_flags(given: AdaptConfig) -> dict:
    """What the size sets before the flags given."""
    return dict(DAD_RECIPES[given.size].flags) if given.size in DAD_RECIPES else {}


def default_out(config: AdaptConfig) -> str:
    """out/sda/<target>, and the values that differ from the defaults."""
    usual = {"demo": config.size, "generate": config.mode, "target": config.captions, "s0": f"s{config.seed}",
             "1": f"{config.share:g}"}
    return "-".join([f"out/sda/{config.target}", *(own for value, own in usual.items() if own != value)])


def check(config: AdaptConfig) -> None:
    """Raise UserError for values that no run can use."""
    if config.guidance_from > config.guidance_to:
        raise UserError(f"--guidance-from {config.guidance_from} is above --guidance-to {config.guidance_to}.")
    stable = DIFFUSION_PRESETS[config.size].stable
    if bool(config.weights) != stable or stable and (config.base or config.train_base or not config.data_root):
        raise UserError("--size sd15 takes --weights and --data-root, neither --base nor --train-base; no other size "
                        "takes --weights.")
    if config.train_base:
        if config.base or config.out or config.data_root:
            raise UserError("--train-base writes to out/base-<size>, and takes neither --base, --out nor --data-root.")
    elif (config.from_source or not stable) and bool(config.source) != bool(config.data_root):
        raise UserError("Give --source and --data-root together: real and drawn sets do not mix.")


if __name__ == "__main__":
    run(main)
