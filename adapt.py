"""Domain-aware diffusion: make the pretraining images look like the target (MRA section 2).

    python adapt.py                                  the demo: images in the look of drawn ICFG, from the shipped base
    python adapt.py --target cuhk --mode restyle     the source's own images in the target's look
    python adapt.py --train-base                     train the base anew, as the shipped one was
    python adapt.py --size base --source DIR --target cuhk --data-root DIR
    python adapt.py --size sd15 --weights DIR --target cuhk --data-root DIR     beside Stable Diffusion 1.5
    torchrun --nproc_per_node=2 adapt.py ...         data-parallel training, sampling shared out

Every field of mra.config.AdaptConfig is a flag. What is finished for the same configuration is not made again. The
set in `out` is in SDA format: `train.py --dataset out/sda/cuhk` pretrains on it, `train.py --dataset cuhk` finds it.
"""

import hashlib
import json
import math
import random
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mra import checkpoint, released, training
from mra.config import DIFFUSION_PRESETS, FITS, AdaptConfig, UserError, check_values, harmless, parse, run
from mra.data import town
from mra.data.records import Record, RecordSet, load, share_of
from mra.data.tokenizer import Tokenizer
from mra.diffusion import gap
from mra.diffusion.autoencoder import random_light
from mra.diffusion.boxes import usual_places
from mra.diffusion.denoiser import DomainBranch, Stage, round_weights
from mra.diffusion.filters import SEEN, UNSEEN, Judge, distort, tell_apart
from mra.diffusion.fit import check_shares, fit, load_same
from mra.diffusion.making import PROBES, SAMPLERS, Looks, collect, make, name_of, unfinish, wishes
from mra.diffusion.sampling import CONDITIONS, Diffusion, LatentPairs, encode, read_base, read_images, stacked, to_float
from mra.diffusion.stable import read_stable
from mra.training import Machine

SHIPPED = Path(__file__).with_name("mra") / "diffusion"      # base-demo.safetensors and reader-demo.safetensors
BASE_PEOPLE = town.TownSizes(source_train=(12_000, 2), source_test=(800, 3))    # whom the shipped base has seen
PLACED = 50_000        # records of the source whose boxes tell where in an image a noun usually is


def main() -> None:
    config = parse(AdaptConfig, __doc__, recipe_of=lambda given: FITS.get(given.size, {}).get("flags", {}))
    check(config)
    machine = Machine.of(config.device, config.precision)
    machine.say(f"{json.dumps(asdict(config), indent=2)}\n"
                f"Running on {machine.device} in {machine.precision}, {machine.world} process(es).")
    if config.train_base:
        machine.say(f"{train_base(config, machine)} is ready.")
        return None if config.source else train_reader(config, machine)
    out = Path(config.out or default_out(config))
    with training.claimed(out, machine):
        make_set(config, machine, out)


def make_set(config: AdaptConfig, machine: Machine, out: Path) -> None:
    """The whole way from the base to the finished set in `out`.

    What is there already is kept if it is of the same making: a network by `learned_from` and its plan, the set by
    `made_with`, and where that differs its parts by what `make` says decides them, as `asked_for`: the wishes.
    """
    if any(out.glob("*.json")) and not (out / "parts").is_dir():
        raise UserError(f"--out {out} holds a set that adapt.py did not make; give another folder.")
    retriever = released.load_retriever(Path(config.checkpoint), machine.device) if config.checkpoint else None
    # ---- the model: a frozen base, and a branch that learns the target
    base = load_base(config, machine)
    stable, root = base.config.stable, machine.root(config.data_root, config.target, config.size == "tiny")
    target = share_of(load(config.target, "train", root, say=machine.say), config.share)
    source = source_records(config, machine) if config.source or not config.data_root else None
    images = read_images([record.path for record in target.records], base.config, config.workers)     # (N, 3, H, W)
    if len(images) < 2:
        raise UserError(f"{target.name} has a single training image, from which no look can be learned.")
    learned_from = {"target": target.name, "contents": contents(target, images), "base": checkpoint.digest(base)}
    if not stable:                  # its latents, too, get mean 0 and variance 1; pixels come back in its light
        base.autoencoder.learn_scale(encode(base.autoencoder, images))
    latents = None if stable and config.mode == "generate" else encode(base.autoencoder, images)     # (N, C, h, w)
    branch = adapt(config, machine, base, learned_from, target, images)
    if not stable:                  # Stable Diffusion's decoder stays as it is, as in the paper
        adapt_decoder(config, machine, base, learned_from, images, latents)
    places = usual_places(islice(source.records, PLACED), *base.config.shape[1:]) if source else {}
    wanted, probes, movers = what_to_make(config, base, source, target)
    asked_for = name_of(wanted + (probes if probes is not wanted else []) + movers, places, pixels=bool(movers))
    used = replace(config, out="", device="", workers=0, recompute=False, precision=machine.precision)
    made_with = {"config": asdict(used), **learned_from,
                 "branch": checkpoint.digest(branch), "decoder": checkpoint.digest(base.autoencoder),
                 "retriever": retriever and checkpoint.digest(retriever[0]), "asked for": asked_for}
    if (out / "report.json").exists() and made_with.items() <= checkpoint.read_json(out / "report.json").items():
        return machine.say(f"{out} is complete; remove its report.json to judge and measure it anew.")
    # ---- the images
    judge, skill = train_judge(config, machine, learned_from, images)
    looks = Looks(None, latents)
    if movers:
        plain = read_images([record.path for record in movers], base.config, config.workers)
        looks = Looks(encode(base.autoencoder, plain), latents)
    machine.say(f"Making {len(wanted)} images in {out}.")
    machine.first(lambda: unfinish(out))
    parts = make(config, machine, base, branch, judge, retriever, wanted, probes, looks, places, asked_for, out)
    # ---- the set and its report
    measured = config.measure and not config.data_root         # drawn people: the exact answer is known
    reader = train_reader(config, machine) if measured else None
    if machine.rank == 0:
        kept, dropped = collect(config, parts, out)
        machine.say(f"Kept {len(kept)} of {len(wanted)} images.")
        if not kept:
            raise UserError("The filters dropped every image: look at them in --out, and loosen the thresholds.")
        rows = random.Random(0).sample(kept, min(gap.ROWS, len(kept)))
        made = gap.images_of(rows, base.config, out)
        report = made_with | gap.set_report(base.config, kept, dropped, made, images, out)
        report["judge of malformed people"] = skill
        if measured and len(kept) < 2:
            machine.say("A single image has no distribution: the gap is not measured.")
        elif measured:
            report |= gap.town_report(config, machine, base, branch, reader, images, rows, made, source.records, places,
                                      out)
        told = {key: value for key, value in report.items() if key not in (*made_with, "gap")}
        machine.say(json.dumps(told, indent=1))
        checkpoint.write_json(out / "report.json", report)


def what_to_make(config: AdaptConfig, base: Diffusion, source: RecordSet | None,
                 target: RecordSet) -> tuple[list[Record], list[Record], list[Record]]:
    """The wishes, those that `calibrate` samples first, and the source images whose moments move all restyled ones."""
    restyles, many = config.mode == "restyle", replace(config, images=max(config.images, PROBES))
    wanted = wishes(config, base, (source if from_source(config) else target).records)
    probes = ([] if base.config.stable else wanted if many == config and restyles == from_source(config) else
              wishes(many, base, (source if restyles else target).records))
    return wanted, probes, list(islice(source.records, gap.ROWS)) if restyles else []


def train_base(config: AdaptConfig, machine: Machine) -> Path:
    """Autoencoder, then denoiser, on the source alone; returns the file that holds both.

    A second run at the same time is refused where the first is in one of them.
    """
    out, plans = Path("out") / f"base-{config.size}", FITS[config.size]
    for name in ("autoencoder", "denoiser", "branch"):      # told now, not after hours
        check_shares(name, plans[name], machine)
    records = base_records(config, machine)
    images = read_images([record.path for record in records.records], DIFFUSION_PRESETS[config.size], config.workers)
    captions = [(i, caption) for i, record in enumerate(records.records) for caption in record.captions]
    tokenizer = Tokenizer.read()
    torch.manual_seed(config.seed)
    base = Diffusion(replace(DIFFUSION_PRESETS[config.size], vocab=len(tokenizer)), tokenizer).to(machine.device)
    size = {name: value for name, value in asdict(base.config).items() if name != "stable"}     # as in older files
    facts = {"size": size, "source": records.name, "root": source_root(config), "images": len(images),
             "captions": len(captions), "contents": contents(records, images)}
    machine.say(f"Training the {config.size} base on {len(images)} images with {len(captions)} captions.")

    def autoencoder_loss(draw: torch.Generator, count: int) -> Tensor:
        some = images[torch.randint(len(images), (count,), generator=draw, device=machine.device).cpu()]
        lit = random_light(to_float(some.to(machine.device)), draw)
        noise = torch.randn(count, *base.config.shape, generator=draw, device=machine.device)
        return base.autoencoder.loss(lit, noise, kl_weight=1e-4)

    base.autoencoder.start(random_light(to_float(images[:2000]), torch.Generator().manual_seed(0)).to(machine.device))
    fit("autoencoder", base.autoencoder, autoencoder_loss, plans["autoencoder"], out / "autoencoder.safetensors",
        facts, config.seed, machine)
    base.autoencoder.learn_scale(encode(base.autoencoder, images[:2000]))
    pairs = LatentPairs(base, images, captions)
    denoiser = torch.compile(base.denoiser) if config.compile else base.denoiser
    fit("denoiser", base.denoiser, lambda draw, count: pairs.loss(denoiser, None, base.schedule, draw, count),
        plans["denoiser"], out / "denoiser.safetensors", facts, config.seed, machine)
    with training.claimed(out, machine):
        machine.first(lambda: checkpoint.save(
            out / "base.safetensors", {name: value.half() for name, value in checkpoint.weights(base).items()},
            facts | {"vocab": tokenizer.pieces, "seed": config.seed, "versions": checkpoint.VERSIONS}))
    return out / "base.safetensors"


def load_base(config: AdaptConfig, machine: Machine) -> Diffusion:
    """The pretrained base, frozen; trained first where there is none for this size."""
    if config.weights:
        base = read_stable(Path(config.weights), DIFFUSION_PRESETS[config.size], config.zero_snr)
        machine.say(f"Base: {config.weights}, Stable Diffusion.")
        return base.to(machine.device).eval().requires_grad_(False)
    shipped, trained = SHIPPED / f"base-{config.size}.safetensors", Path("out") / f"base-{config.size}/base.safetensors"
    own = not config.base and not shipped.exists()
    if own and not trained.exists():
        train_base(replace(config, seed=0), machine)
    path = trained if own else Path(config.base or shipped)
    base, facts = read_base(path)
    if base.config.shape != DIFFUSION_PRESETS[config.size].shape:
        raise UserError(f"{path} was trained with another --size than {config.size}; say so here too.")
    if own and facts.get("root") != source_root(config):
        raise UserError(f"{path} was trained on another --source, {facts.get('root')!r}; remove its folder, or give it "
                        "as --base.")
    machine.say(f"Base: {path}, trained on {harmless(facts['images'])} images of {harmless(facts['source'])}.")
    return base.to(machine.device).eval().requires_grad_(False)


def adapt(config: AdaptConfig, machine: Machine, base: Diffusion, learned_from: dict, target: RecordSet,
          images: Tensor) -> DomainBranch:
    """The domain branch, trained on the target's training pairs beside the frozen base."""
    captions = [(i, caption) for i, record in enumerate(target.records) for caption in record.captions]
    path = dad_folder(config) / "branch.safetensors"
    if not path.exists():
        check_shares("branch", FITS[config.size]["branch"], machine)        # before it is prepared
        pairs = LatentPairs(base, images, captions, config.condition)
        with machine.autocast():
            pairs.read(base.denoiser, torch.bfloat16 if machine.precision == "bf16" else torch.float32)
    machine.say(f"Adapting to {target.name}: {len(images)} images, {len(captions)} captions.")
    torch.manual_seed(config.seed)
    branch = DomainBranch(base.denoiser).to(machine.device)
    rounds = base.config.stable and machine.precision == "bf16"
    if rounds:
        round_weights(base.denoiser)
    for stage in [*base.denoiser.modules(), *branch.modules()]:
        if isinstance(stage, Stage):
            stage.recompute = config.recompute
    denoiser, step_branch = (torch.compile(x) if config.compile else x for x in (base.denoiser, branch))
    plans = FITS[config.size]
    plan = plans["branch"]
    steps = config.steps or plan.steps or math.ceil(plans["epochs"] * len(captions) / plan.batch)
    fit("branch", branch,
        lambda draw, count: pairs.loss(denoiser, step_branch, base.schedule, draw, count, middle=plan.middle),
        replace(plan, steps=steps), path, learned_from | {"pairs": len(captions)}, config.seed, machine)
    if rounds:
        round_weights(branch)
    return branch.eval().requires_grad_(False)


def adapt_decoder(config: AdaptConfig, machine: Machine, base: Diffusion, learned_from: dict, images: Tensor,
                  latents: Tensor) -> None:
    """Let the base's decoder learn the target's blur and grain from its training images; latents stay what they are.

    Not in the paper. Without it half of what tells made images from the target's is the decoder's work.
    """
    autoencoder = base.autoencoder

    def loss_of(draw: torch.Generator, count: int) -> Tensor:
        some = torch.randint(len(images), (count,), generator=draw, device=machine.device)
        own = to_float(images[some.cpu()].to(machine.device))
        return autoencoder.decoder_loss(own, autoencoder.unscaled(latents[some]))

    for part in (autoencoder.decoder, autoencoder.linear_out):
        part.requires_grad_(True)
    fit("decoder", autoencoder, loss_of, FITS[config.size]["decoder"], dad_folder(config) / "decoder.safetensors",
        learned_from, config.seed, machine)
    autoencoder.requires_grad_(False)


def dad_folder(config: AdaptConfig) -> Path:
    """Where what is trained on the target lies."""
    return Path("out/dad") / (f"{config.target}-{config.size}-{config.condition}-s{config.seed}"
                              + f"-{config.share:g}" * (config.share < 1) + "-zero-snr" * config.zero_snr)


def contents(records: RecordSet, images: Tensor) -> str:
    """A short name for these captions and images."""
    found = hashlib.sha256(images.numpy())
    for record in records.records:
        found.update("\n".join(record.captions).encode() + b"\0")
    return found.hexdigest()[:16]


def train_judge(config: AdaptConfig, machine: Machine, learned_from: dict,
                images: Tensor) -> tuple[Judge, dict[str, float]]:
    """A judge of malformed people, from the target's images against what cutting and pasting makes of them.

    Beside it what it does on images and kinds of damage that it has not seen.
    """
    half, path, steps = len(images) // 2, dad_folder(config) / "judge.safetensors", FITS[config.size]["judge"]
    facts = {"stage": "judge", "steps": steps, "seed": config.seed, **learned_from}

    def train() -> None:
        if not path.exists():
            checkpoint.save(path, checkpoint.weights(tell_apart(
                images[:half], distort(images[:half], SEEN, 0), steps, config.seed, machine.device)), facts)

    with training.claimed(dad_folder(config), machine):
        machine.first(train)
    judge = Judge(1)
    checkpoint.restore_weights(judge, load_same(path, facts)[0], path)
    judge.to(machine.device, memory_format=torch.channels_last).eval()
    good, bad = judge.score(images[half:])[:, 0], judge.score(distort(images[half:], UNSEEN, 1))[:, 0]
    skill = {"good images kept": round(float((good <= config.malformed).float().mean()), 4),
             "damaged images dropped": round(float((bad > config.malformed).float().mean()), 4)}
    machine.say(f"Judge of malformed people, on unseen images and kinds of damage: {json.dumps(skill)}")
    return judge, skill


def train_reader(config: AdaptConfig, machine: Machine) -> Judge:
    """The reader of attributes that the report measures with; for demo it ships, with the base."""
    torch.manual_seed(0)        # the same in every process, whatever it has done before
    reader, plan = Judge(sum(gap.SIZES)).to(machine.device), FITS[config.size]["reader"]
    shipped, path = SHIPPED / f"reader-{config.size}.safetensors", Path(f"out/base-{config.size}/reader.safetensors")
    if shipped.exists() and not config.train_base:
        checkpoint.restore_weights(reader, checkpoint.load(shipped)[0], shipped)
        return reader.eval()
    people, size = gap.strangers(20 if config.size == "tiny" else 6000, seed=0), DIFFUSION_PRESETS[config.size]
    if not path.exists():
        drawn = {domain: town.portraits(domain, people, 0, (size.height, size.width), machine.cores)
                 for domain in gap.TARGETS}
        images = stacked([one.pixels for some in drawn.values() for one in some])
        cameras = [gap.CAMERAS.index((domain, one.camera)) for domain, some in drawn.items() for one in some]
        labels = torch.cat([gap.labels_of(people).repeat(len(drawn), 1), torch.tensor(cameras)[:, None]], 1)

    def loss_of(draw: torch.Generator, count: int) -> Tensor:
        some = torch.randint(len(images), (count,), generator=draw, device=machine.device).cpu()
        return gap.reading_loss(reader, images[some].to(machine.device), labels[some].to(machine.device))

    fit("reader", reader, loss_of, plan, path, {"people": len(people)}, 0, machine)
    return reader.eval()


def base_records(config: AdaptConfig, machine: Machine) -> RecordSet:
    """The pairs that the base is pretrained on: a source of its own for the demo."""
    if config.source or config.size == "tiny":
        return source_records(config, machine)
    root = Path("data/base")
    machine.first(lambda: town.build(root, "source", BASE_PEOPLE, 1, machine.cores, machine.say))
    return load("sda", "train", root, say=machine.say)


def source_root(config: AdaptConfig) -> str:
    """The folder of the source set; empty for the drawn one."""
    return str(Path(config.source).resolve()) if config.source else ""


def source_records(config: AdaptConfig, machine: Machine) -> RecordSet:
    """The source set's training pairs, without those of its val identities."""
    root = machine.root(config.source, "sda", config.size == "tiny")
    name = next((name for name in ("sda", "mals") if (root / name.upper()).is_dir()), config.source)
    return load(name, "train", root, say=machine.say)


def from_source(config: AdaptConfig) -> bool:
    """Whether what is made is made of the source's images or captions."""
    return config.mode == "restyle" or config.captions == "source"


def default_out(config: AdaptConfig) -> str:
    """out/sda/<target>, and what sets this run apart from the default one."""
    usual = {"demo": config.size, "generate": config.mode, "white": config.condition, "target": config.captions,
             "s0": f"s{config.seed}", "1": f"{config.share:g}"}
    return "-".join([f"out/sda/{config.target}", *(own for value, own in usual.items() if own != value)])


def check(config: AdaptConfig) -> None:
    """Raise UserError for values that no run can use."""
    check_values(config, target=gap.TARGETS, mode=("generate", "restyle"), condition=CONDITIONS,
                 captions=("target", "source"), size=DIFFUSION_PRESETS, sampler=SAMPLERS)
    if config.mode == "generate" and config.condition == "structure":
        raise UserError("--condition structure needs --mode restyle: what is made from nothing has no edges to follow.")
    if config.guidance_from > config.guidance_to:
        raise UserError(f"--guidance-from {config.guidance_from} is above --guidance-to {config.guidance_to}.")
    stable = DIFFUSION_PRESETS[config.size].stable
    if bool(config.weights) != stable or stable and (config.base or config.train_base or not config.data_root):
        raise UserError("--size sd15 takes --weights and --data-root, neither --base nor --train-base; no other size "
                        "takes --weights.")
    if config.zero_snr and (not stable or config.domain_guidance != 1):
        raise UserError("--zero-snr is for --size sd15, without --domain-guidance: the base alone cannot predict v.")
    if config.train_base:
        if config.base or config.out or config.data_root:
            raise UserError("--train-base writes to out/base-<size>, and takes neither --base, --out nor --data-root.")
    elif (from_source(config) or not stable) and bool(config.source) != bool(config.data_root):
        raise UserError("Give --source and --data-root together: real and drawn sets do not mix.")


if __name__ == "__main__":
    run(main)
