"""Domain-aware diffusion: make pretraining images that look like the target (MRA section 2).

    python adapt.py                                  the demo: images in the look of drawn ICFG, from the shipped base
    python adapt.py --target PHOTOS                  the look of a folder of photographs, the words of the source
    python adapt.py --target cuhk --mode restyle     the source's own images in the target's look
    python adapt.py --size sd15 --weights DIR --target cuhk --data-root DIR     beside Stable Diffusion 1.5

Every field of mra.config.AdaptConfig is a flag. What is finished for the same configuration is not made again. The set
is in SDA format. In the demo `train.py --dataset cuhk` finds the one in the usual folder, out/sda/cuhk.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, TARGETS, AdaptConfig, UserError
from mra.data.records import Record, RecordSet, share_of
from mra.diffusion.plan import SAMPLED, average_boxes, content_of, drafts_of
from mra.diffusion.sampling import Painter
from mra.formats.read import load
from mra.run import checkpoint, networks, parts
from mra.run.command import parse, run
from mra.run.machine import Machine, locked
from mra.show.gallery import photographs
from mra.town import sets

THRESHOLDS = "grey_mean", "grey_variance", "malformed"
# Flags left out of the key. Some change no image. For the precision and for named files the key has other entries.
NOT_IN_KEY = {"out", "resume", "base", "weights", "source", "data_root", "train_base", "workers", "device", "precision",
              "compile", *THRESHOLDS}


def main() -> None:
    config = parse(AdaptConfig, __doc__, recipe_of=lambda given: DAD_RECIPES[given.size].flags)
    check(config)
    if config.target not in TARGETS:
        config = replace(config, target=os.path.abspath(config.target))
    machine = Machine.of(config.device, config.precision, config.compile)
    machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                f"Running on {machine.device} in {machine.precision}, {machine.group.count} process(es).")
    if config.train_base:
        networks.train_base(config, source_records(config, machine), machine)
    else:
        out = Path(config.out or config.usual_out)
        with locked(out, machine):
            adapt(config, machine, out)


def adapt(config: AdaptConfig, machine: Machine, out: Path) -> None:
    """The whole way: base, plan, autoencoder, branch, samples, filters, set."""
    # ---- the frozen base, and the pairs of target and source
    if not (config.weights or config.base or networks.base_file(config).exists()):      # takes hours; serves all seeds
        networks.train_base(replace(config, seed=0), source_records(config, machine), machine)
    base = networks.load_base(config, machine)
    records = share_of(target_records(config, machine), config.share)
    target = networks.Target.of(config, records, base)
    source = source_records(config, machine).records if config.source or not config.data_root else []
    # ---- what to make, from the captions or images of target or source; each phrase with its box
    restyles = config.mode == "restyle"
    chosen = records.records if target.labelled and config.captions == "target" and not restyles else source
    if not chosen:
        raise UserError(f"{records.name} has no captions: give --source, whose captions describe the images to make.")
    drafts = drafts_of(config, chosen, average_boxes(source), base.tokenizer)
    source_sample = source[:SAMPLED] if restyles else []
    if not any(draft.boxes for draft in drafts):
        machine.say("All regions are whole images: no phrase has a box. A --source with boxes gives some.")
    key = {"flags": {name: value for name, value in asdict(config).items() if name not in NOT_IN_KEY},
           "precision": machine.precision, "recipe": asdict(DAD_RECIPES[config.size]), **target.key,
           "content of the plan": checkpoint.digest_of(content_of(drafts, source_sample))}
    set_key = key | {name: getattr(config, name) for name in THRESHOLDS}
    machine.on_rank_0(lambda: parts.begin(out, key, config.resume, machine))
    if parts.is_finished(out, set_key):
        return machine.say(f"{out} is complete.")
    # ---- what learns the target: autoencoder, branch, a judge of malformed people
    base = networks.adapt_autoencoder(config, base, target, machine)
    adapted = networks.train_branch(config, base, target, machine)
    judge = networks.train_judge(config, base, target, machine)
    # ---- samples, decoded, and their scores for the filters
    painter = Painter(config, base, adapted, target.labelled, target.images, source_sample)
    parts.make_parts(painter, judge, drafts, out, machine)
    # ---- the set: what passes the filters
    machine.on_rank_0(lambda: parts.finish(config, out, target.images, set_key, machine))


def target_records(config: AdaptConfig, machine: Machine) -> RecordSet:
    """The target's training pairs, or the photographs of a folder, each of a person of its own and without words."""
    if config.target in TARGETS:
        root = Path(config.data_root or sets.ready(config.target, config.size == "tiny"))
        return load(config.target, "train", root, say=machine.say)
    paths = photographs(Path(config.target), machine.say)
    return RecordSet(config.target, "train", [Record(path, ("",), i) for i, path in enumerate(paths)])


def source_records(config: AdaptConfig, machine: Machine) -> RecordSet:
    """The source set's training pairs, without those of its val identities."""
    root = Path(config.source or sets.ready("sda", config.size == "tiny"))
    name = next((name for name in ("sda", "mals") if (root / name.upper()).is_dir()), config.source)
    return load(name, "train", root, say=machine.say)


def check(config: AdaptConfig) -> None:
    """Raise UserError for values that no run can use."""
    stable, real = DIFFUSION_PRESETS[config.size].stable, config.data_root or config.target not in TARGETS
    if config.target not in TARGETS and (config.data_root or not config.target or not Path(config.target).is_dir()):
        raise UserError(f"--target {config.target}: give {', '.join(TARGETS)}, or a folder, without --data-root.")
    annotated = [path.name for path in Path(config.target).glob("*.json") if path.name != "query.json"]
    if config.target not in TARGETS and annotated:      # among its images may be those of val and test
        raise UserError(f"--target {config.target} holds {annotated[0]}: give photographs alone, or --data-root.")
    unused, mode = ("captions", "restyle") if config.mode == "restyle" else ("strength", "generate")
    if getattr(config, unused) != getattr(AdaptConfig, unused):
        raise UserError(f"--{unused} does nothing with --mode {mode}: leave it out.")
    if config.guidance_from > config.guidance_to:
        raise UserError(f"--guidance-from {config.guidance_from} is above --guidance-to {config.guidance_to}.")
    if stable != bool(config.weights) or (stable and (config.base or config.train_base or not real)):
        raise UserError("--size sd15 and --weights go together, with a real target, without --base and --train-base.")
    if config.train_base:
        if config.base or config.out or config.data_root:
            raise UserError("--train-base writes to out/base-<size>, and takes neither --base, --out nor --data-root.")
        return
    needs_source = config.mode == "restyle" or config.captions == "source" or not stable
    if config.source and not real:
        raise UserError("--source needs a real target, by --data-root or a folder: real and drawn sets do not mix.")
    if config.data_root and needs_source and not config.source:
        raise UserError("--data-root needs --source, too: a real source set for the base, its captions or its images.")


if __name__ == "__main__":
    run(main)
