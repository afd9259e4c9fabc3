"""Making a set of images: what is wished for, sampled, judged, annotated, and written as an SDA set.

Before: sampling.py, prompts.py, filters.py, boxes.py, transfers.py. After: gap.py, adapt.py.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from mra import checkpoint
from mra.config import AdaptConfig
from mra.data.records import Record, save_image
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean, noun_phrases
from mra.diffusion.boxes import phrase_box, word_maps
from mra.diffusion.denoiser import DomainBranch, Prompt, structure
from mra.diffusion.filters import Judge, agreement, colourfulness
from mra.diffusion.noising import ddim, dpm_solver, q_sample
from mra.diffusion.prompts import prompts_of
from mra.diffusion.sampling import Diffusion, decode, encode, guide, read_images, to_float
from mra.diffusion.transfers import match_moments
from mra.retriever import Retriever
from mra.training import Machine, any_process, stoppable

SAMPLERS = {"ddim": ddim, "dpm": dpm_solver}
PART = 64           # images that are made, judged and written together
PROBES = 256        # images that are sampled first, to see what the branch leaves wrong on average
FILE = 5000         # records of an annotation file
FILTERS = ("greyscale", "malformed", "mismatch")


class Looks(NamedTuple):
    """Latents (N, C, h, w) of images of the source, when they are restyled, and (M, C, h, w) of the target's."""

    source: Tensor | None
    target: Tensor | None


def wishes(config: AdaptConfig, base: Diffusion, records: Sequence[Record]) -> list[Record]:
    """What to make: some of these records anew, or one for each prompt, with its phrases but no boxes yet.

    `path` is the image that it, or its caption, comes from. The prompts of a caption speak of one person, an identity.
    Prompts are sorted by length, so that few need padding.
    """
    if config.mode == "restyle":
        chosen = random.Random(config.seed).sample(range(len(records)), min(config.images, len(records)))
        return [records[i] for i in chosen]
    pairs = [(caption, record.path) for record in records for caption in record.captions]
    made = prompts_of([caption for caption, _ in pairs], config.images, config.seed)
    found = [Record(pairs[i][1], (prompt,), i, (), tuple(dict.fromkeys(noun_phrases(prompt)))) for i, prompt in made]
    return sorted(found, key=lambda wish: len(base.tokenizer.encode(wish.captions[0])))


def name_of(wished: list[Record], places: dict[str, Tensor], pixels: bool) -> str:
    """A short name for what is wished for and where its phrases are looked for; with the images' files if `pixels`."""
    found = hashlib.sha256()
    for wish in wished:
        found.update(str(wish).encode() + (Path(wish.path).read_bytes() if pixels else b""))
    for noun, place in places.items():
        found.update(noun.encode() + place.numpy().tobytes())
    return found.hexdigest()[:16]


def make(config: AdaptConfig, machine: Machine, base: Diffusion, branch: DomainBranch, judge: Judge,
         retriever: tuple[Retriever, Tokenizer, dict] | None, wanted: list[Record], probes: list[Record], looks: Looks,
         places: dict[str, Tensor], asked_for: str, out: Path) -> list[Path]:
    """Sample, judge and annotate, part by part; a part that is on disk for the same configuration is kept.

    Returns the parts' files. See `calibrate` for the probes, boxes.py for the places, `name_of` for asked_for.
    """
    parts = [wanted[i:i + PART] for i in range(0, len(wanted), PART)]
    files = [out / "parts" / f"{number:06d}.json" for number in range(len(parts))]
    # what decides the images and what is said of each: not the thresholds, not the machine
    used = replace(config, workers=0, out="", device="", measure=True, checkpoint="", recompute=False, grey_mean=0,
                   grey_variance=0, malformed=0, mismatch=0, precision=machine.precision)
    weights = " ".join(checkpoint.digest(network) for network in (base, branch, judge, *(retriever or ())[:1]))
    settings = hashlib.sha256(f"{used} {weights} {asked_for}".encode()).hexdigest()[:16]
    networks = [torch.compile(network) if config.compile else network for network in (base.denoiser, branch)]
    missing = [number for number in range(machine.rank, len(parts), machine.world)
               if not files[number].exists() or checkpoint.read_json(files[number]).get("settings") != settings]
    done = []
    with stoppable() as asked:
        scale, shift = (calibrate(config, machine, base, networks, probes, looks) if missing and probes
                        else (1.0, 0.0))
        started = time.perf_counter()

        def make_part(number: int) -> None:
            if asked.is_set():
                return
            draw = torch.Generator(machine.device).manual_seed(hash((config.seed, number)) % 2**62)
            with torch.no_grad(), machine.autocast():
                latents, condition, prompt = sample(config, base, networks, parts[number], looks, draw)
                latents = scale * latents + shift
                images = decode(base.autoencoder, latents, draw)
                maps = (word_maps(base.denoiser, branch, latents, prompt, condition, base.schedule, draw).float().cpu()
                        if config.mode == "generate" else [None] * len(latents))
                rows = [describe(config, base, wish, own, places) for wish, own in zip(parts[number], maps)]
            mean, variance = colourfulness(images)
            judged = {"colour_mean": mean, "colour_variance": variance, "malformed": judge.score(images)[:, 0]}
            if retriever:
                model, tokenizer, facts = retriever
                captions = [clean(wish.captions[0], facts["train"]["dataset"]) for wish in parts[number]]
                judged["match"] = agreement(model, tokenizer, images, captions)
            write_part(files[number], images, rows, judged, settings)
            done.append(number)
            seconds = (time.perf_counter() - started) / len(done)
            machine.say(f"{len(done)} of {len(missing)} parts made  {PART / seconds:.1f} images/s  "
                        f"{seconds * (len(missing) - len(done)) / 60:.1f} min left")

        machine.map(make_part, missing)
        if any_process(asked.is_set(), machine):        # which also waits for all
            raise KeyboardInterrupt
    return files


def calibrate(config: AdaptConfig, machine: Machine, base: Diffusion, networks: list[nn.Module], probes: list[Record],
              looks: Looks) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, h, w): what gives samples the mean and variance of the target's latents at each place.

    Not in the paper. A branch of few steps gets the commonest pose and background a little wrong on average; that is
    measured on samples of some of the probes, and undone. These must be many, and wishes for a set as a whole: the
    target's own captions, or the images to restyle.
    """
    chosen = sorted(random.Random(config.seed).choices(range(len(probes)), k=PROBES))

    def probe(number: int) -> Tensor:
        draw = torch.Generator(machine.device).manual_seed(hash((config.seed, 2**32 + number)) % 2**62)
        some = [probes[i] for i in chosen[number * PART:(number + 1) * PART]]
        with torch.no_grad(), machine.autocast():
            return sample(config, base, networks, some, looks, draw)[0]

    std, mean = torch.std_mean(torch.cat(machine.map(probe, range(PROBES // PART))), 0)
    target_std, target_mean = torch.std_mean(looks.target, 0)
    scale = target_std / std.clamp(min=1e-3)        # a single image without diffusion has none
    return scale, target_mean - scale * mean


def sample(config: AdaptConfig, base: Diffusion, networks: list[nn.Module], some: list[Record],
           looks: Looks, draw: torch.Generator) -> tuple[Tensor, Tensor, Prompt]:
    """Latents (B, C, h, w) of the wishes, the condition (B, 1, H, W) and the prompt they were made with."""
    device, schedule = draw.device, base.schedule
    noise = torch.randn(len(some), *base.config.shape, generator=draw, device=device)
    condition = torch.ones(len(some), 1, base.config.height, base.config.width, device=device)
    strength = 1.0
    if config.mode == "restyle":
        images = read_images([wish.path for wish in some], base.config).to(device)
        if config.condition == "structure":
            condition = structure(to_float(images))
        strength, moved = config.strength, match_moments(encode(base.autoencoder, images), *looks)
        visited = schedule.trailing(config.sampling_steps, strength)
        noise = (q_sample(moved, noise, torch.full((len(some),), visited[0], device=device), schedule) if visited
                 else moved)
    both = base.read([wish.captions[0] for wish in some] + [""] * len(some))
    span = config.guidance_from * len(schedule.alpha), config.guidance_to * len(schedule.alpha)
    denoiser, branch = networks
    denoise = guide(denoiser, both, branch, condition, config.guidance, config.domain_guidance, config.rescale, span)
    latents = SAMPLERS[config.sampler](denoise, noise, schedule, config.sampling_steps, strength)
    return latents, condition, both[:len(some)]


def describe(config: AdaptConfig, base: Diffusion, wish: Record, maps: Tensor | None,
             places: dict[str, Tensor]) -> dict:
    """An SDA record without its image: a box for each phrase that the `maps` show, else the boxes that it came with."""
    caption = wish.captions[0]
    found = [(phrase, (box, 1.0)) for phrase, box in zip(wish.phrases, wish.boxes)]
    if maps is not None:
        boxes = [(phrase, phrase_box(maps, caption, phrase, base.tokenizer, places)) for phrase in wish.phrases]
        found = [(phrase, box) for phrase, box in boxes if box and box[1] >= config.box_threshold]
    found = found or [(caption, ((0.5, 0.5, 1.0, 1.0), 1.0))]       # no phrase: the whole image (MRA section 2)
    return {"boxes": [[round(x, 4) for x in box] for _, (box, _) in found],
            "logits": [round(sure, 4) for _, (_, sure) in found],
            "phrases": [phrase for phrase, _ in found], "caption": caption, "image_id": wish.identity,
            "origin": wish.path}


def write_part(file: Path, images: Tensor, rows: list[dict], judged: dict[str, Tensor], settings: str) -> None:
    """The images of a part, and then, last, its records with all judgements."""
    folder = file.parent.parent / "imgs" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)            # of another configuration: it would vouch for images that are not its own
    suffix = "png" if images.shape[2] < 128 else "jpg"      # compression would show on small ones
    for i, (row, image) in enumerate(zip(rows, images.cpu())):
        path = folder / f"{i:02d}.{suffix}"
        row |= {"image": f"{file.stem}/{path.name}"} | {k: round(float(v[i]), 5) for k, v in judged.items()}
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), path, quality=95, subsampling=0)
    checkpoint.write_json(file, {"settings": settings, "records": rows}, indent=None)


def filters_of(config: AdaptConfig, row: dict) -> list[str]:
    """Names of the filters that drop a record."""
    grey = row["colour_mean"] < config.grey_mean and row["colour_variance"] < config.grey_variance
    drops = (grey, row["malformed"] > config.malformed, "match" in row and row["match"] < config.mismatch)
    return [name for name, drop in zip(FILTERS, drops) if drop]


def collect(config: AdaptConfig, parts: list[Path], out: Path) -> tuple[list[dict], list[dict]]:
    """Write the annotation files of what passes the filters; returns the records kept and those dropped."""
    rows = [row for part in parts for row in checkpoint.read_json(part)["records"]]
    kept, dropped = [], []
    for row in rows:
        row["dropped_by"] = filters_of(config, row)
        (dropped if row["dropped_by"] else kept).append(row)
    for start in range(0, len(kept), FILE):
        checkpoint.write_json(out / f"sda_{start}_{start + FILE}.json", kept[start:start + FILE], indent=None)
    return kept, dropped


def unfinish(out: Path) -> None:
    """Take away what says that the images in `out` are a whole set: first the report, then the annotation files."""
    for file in (out / "report.json", *out.glob("sda_*.json")):
        file.unlink(missing_ok=True)
