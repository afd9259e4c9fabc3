"""Making a set of images: what is wished for, sampled, judged, annotated, and written as an SDA set.

Before: sampling.py, prompts.py, filters.py, boxes.py. After: gap.py, adapt.py.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mra import checkpoint
from mra.config import AdaptConfig
from mra.data import Box
from mra.data.records import Record, save_image
from mra.data.words import noun_phrases
from mra.diffusion.boxes import phrase_box, word_maps
from mra.diffusion.denoiser import DomainBranch, Prompt, structure
from mra.diffusion.filters import Judge, agreement, colourfulness
from mra.diffusion.noising import ddim, dpm_solver, q_sample
from mra.diffusion.prompts import prompts_of
from mra.diffusion.sampling import Crops, Diffusion, decode, encode, guide, to_float
from mra.diffusion.transfers import match_moments
from mra.training import Machine, any_process, stoppable

SAMPLERS = {"ddim": ddim, "dpm": dpm_solver}
PART = 64           # images that are made, judged and written together
PROBES = 4          # parts that are sampled first, to see what the branch leaves wrong on average
FILE = 5000         # records of an annotation file
FILTERS = ("greyscale", "malformed", "mismatch")


@dataclass(frozen=True)
class Wish:
    """One image to make: from words, or from a source image whose phrases and boxes it keeps."""

    caption: str
    origin: str                             # path of the image that the caption, or the image itself, comes from
    phrases: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


def wishes(config: AdaptConfig, base: Diffusion, records: Iterable[Record]) -> list[Wish]:
    """What to make of these records, captions of like length side by side."""
    if config.mode == "restyle":
        chosen = random.Random(config.seed).sample(list(records), min(config.images, len(records)))
        return [Wish(record.captions[0], record.path, record.phrases, record.boxes) for record in chosen]
    pairs = [(caption, record.path) for record in records for caption in record.captions]
    made = prompts_of([caption for caption, _ in pairs], config.images, config.seed)
    found = [Wish(prompt, pairs[i][1], tuple(dict.fromkeys(noun_phrases(prompt)))) for i, prompt in made]
    return sorted(found, key=lambda wish: len(base.tokenizer.encode(wish.caption)))


def make(config: AdaptConfig, machine: Machine, base: Diffusion, branch: DomainBranch, judge: Judge,
         wanted: list[Wish], target_latents: Tensor | None, places: dict[str, Tensor], out: Path) -> None:
    """Sample, judge and annotate, part by part; a part that is on disk for the same configuration is kept."""
    parts = [wanted[i:i + PART] for i in range(0, len(wanted), PART)]
    retriever = checkpoint.load_retriever(Path(config.checkpoint), machine.device)[:2] if config.checkpoint else None
    used = replace(config, workers=0, out="", grey_mean=0, grey_variance=0, malformed=0, mismatch=0)
    weights = " ".join(checkpoint.digest(network) for network in (base, branch, judge))
    settings = hashlib.sha256(f"{used} {weights}".encode()).hexdigest()[:16]
    networks = [torch.compile(network) if config.compile else network for network in (base.denoiser, branch)]
    files = [out / "parts" / f"{number:06d}.json" for number in range(len(parts))]
    missing = [number for number in range(machine.rank, len(parts), machine.world)
               if not files[number].exists() or json.loads(files[number].read_text())["settings"] != settings]

    def make_part(number: int) -> None:
        if asked.is_set():
            return
        draw = torch.Generator(machine.device).manual_seed(hash((config.seed, number)) % 2**62)
        with torch.no_grad(), machine.autocast():
            latents, condition, prompt = sample(config, base, networks, parts[number], target_latents, draw)
            latents = scale * latents + shift
            images = decode(base.autoencoder, latents, draw)
            rows = describe(config, base, branch, parts[number], latents, condition, prompt, places, draw)
        mean, variance = colourfulness(images)
        judged = {"colour_mean": mean, "colour_variance": variance, "malformed": judge.score(images)[:, 0]}
        if retriever:
            judged["match"] = agreement(*retriever, images, [wish.caption for wish in parts[number]])
        write_part(files[number], images, rows, judged, settings)
        seconds = (time.perf_counter() - started) / (number + 1)
        machine.say(f"part {number + 1}/{len(parts)}  {PART / seconds:.1f} images/s  "
                    f"{seconds * (len(parts) - number - 1) / 60:.1f} min left")

    with stoppable() as asked:
        if missing:
            scale, shift = calibrate(config, machine, base, networks, wanted, target_latents)
        started = time.perf_counter()
        machine.map(make_part, missing)
        if any_process(asked.is_set(), machine):        # which also waits for all
            raise KeyboardInterrupt


def calibrate(config: AdaptConfig, machine: Machine, base: Diffusion, networks: list[nn.Module], wanted: list[Wish],
              target_latents: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, h, w): what gives samples the mean and variance of the target at each place.

    Not in the paper. A branch of few steps gets the commonest pose and background a little wrong on average; that is
    measured on samples of random wishes, and undone. Without the target's latents nothing is.
    """
    if target_latents is None:
        return torch.ones((), device=machine.device), torch.zeros((), device=machine.device)
    chosen = sorted(random.Random(config.seed).choices(range(len(wanted)), k=PROBES * PART))

    def probe(number: int) -> Tensor:
        draw = torch.Generator(machine.device).manual_seed(hash((config.seed, 2**32 + number)) % 2**62)
        some = [wanted[i] for i in chosen[number * PART:(number + 1) * PART]]
        with torch.no_grad(), machine.autocast():
            return sample(config, base, networks, some, target_latents, draw)[0]

    std, mean = torch.std_mean(torch.cat(machine.map(probe, range(PROBES))), 0)
    target_std, target_mean = torch.std_mean(target_latents, 0)
    return target_std / std, target_mean - target_std / std * mean


def sample(config: AdaptConfig, base: Diffusion, networks: list[nn.Module], some: list[Wish],
           target_latents: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor, Prompt]:
    """Latents (B, C, h, w) of the wishes, the condition (B, 1, H, W) and the prompt they were made with."""
    device, schedule = draw.device, base.schedule
    noise = torch.randn(len(some), *base.config.shape, generator=draw, device=device)
    condition = torch.ones(len(some), 1, base.config.height, base.config.width, device=device)
    strength = 1.0
    if config.mode == "restyle":
        images = Crops([wish.origin for wish in some], base.config).read().to(device)
        if config.conditioned_by == "structure":
            condition = structure(to_float(images))
        strength, visited = config.strength, schedule.trailing(config.sampling_steps, config.strength)
        moved = match_moments(encode(base.autoencoder, images), target_latents)
        first = torch.full((len(some),), visited[0] if visited else 0, device=device)
        noise = q_sample(moved, noise, first, schedule) if visited else moved
    both = base.read([wish.caption for wish in some] + [""] * len(some))
    prompt, nothing = both[:len(some)], both[len(some):]
    denoiser, branch = networks
    span = config.guidance_from * len(schedule.alpha), config.guidance_to * len(schedule.alpha)
    denoise = guide(denoiser, prompt, nothing, branch, condition, config.guidance, config.domain_guidance,
                    config.rescale, span)
    return SAMPLERS[config.sampler](denoise, noise, schedule, config.sampling_steps, strength), condition, prompt


def describe(config: AdaptConfig, base: Diffusion, branch: DomainBranch, some: list[Wish], latents: Tensor,
             condition: Tensor, prompt: Prompt, places: dict[str, Tensor], draw: torch.Generator) -> list[dict]:
    """SDA records without their image: given boxes as they are, else a box for each phrase that is found."""
    rows, maps = [], None
    if config.mode == "generate":
        maps = word_maps(base.denoiser, branch, latents, prompt, condition, base.schedule, draw).float().cpu()
    for i, wish in enumerate(some):
        found = [(phrase, box, 1.0) for phrase, box in zip(wish.phrases, wish.boxes)]
        if maps is not None:
            ids = base.tokenizer.encode(wish.caption, base.config.max_tokens)
            boxes = [phrase_box(maps[i], ids, base.tokenizer.encode(phrase)[1:-1], base.tokenizer.starts_word,
                                places.get(phrase.split()[-1])) for phrase in wish.phrases]
            found = [(phrase, *box) for phrase, box in zip(wish.phrases, boxes)
                     if box and box[1] >= config.box_threshold]
        found = found or [(wish.caption, (0.5, 0.5, 1.0, 1.0), 1.0)]    # no phrase: the whole image (MRA section 2)
        rows.append({"boxes": [[round(x, 4) for x in box] for _, box, _ in found],
                     "logits": [round(sure, 4) for _, _, sure in found],
                     "phrases": [phrase for phrase, _, _ in found], "caption": wish.caption, "origin": wish.origin})
    return rows


def write_part(file: Path, images: Tensor, rows: list[dict], judged: dict[str, Tensor], settings: str) -> None:
    """The images of a part, and then, last, its records with all judgements."""
    folder = file.parent.parent / "imgs" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    suffix = "png" if images.shape[2] < 128 else "jpg"      # compression would show on small ones
    for i, (row, image) in enumerate(zip(rows, images.cpu())):
        row |= {"image": f"{file.stem}/{i:02d}.{suffix}"} | {k: round(float(v[i]), 5) for k, v in judged.items()}
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / f"{i:02d}.{suffix}", quality=95,
                   subsampling=0)
    checkpoint.write_json(file, {"settings": settings, "records": rows}, indent=None)


def filters_of(config: AdaptConfig, row: dict) -> list[str]:
    """Names of the filters that drop a record."""
    grey = row["colour_mean"] < config.grey_mean and row["colour_variance"] < config.grey_variance
    drops = (grey, row["malformed"] > config.malformed, row.get("match", 0.0) < config.mismatch)
    return [name for name, drop in zip(FILTERS, drops) if drop]


def collect(config: AdaptConfig, out: Path, count: int) -> tuple[list[dict], list[dict]]:
    """Write the annotation files of what passes the filters; returns the records kept and those dropped."""
    parts = [out / "parts" / f"{number:06d}.json" for number in range(-(-count // PART))]
    rows = [row for part in parts for row in json.loads(part.read_text())["records"]]
    kept, dropped = [], []
    for number, row in enumerate(rows):
        row |= {"image_id": number, "dropped_by": filters_of(config, row)}
        (dropped if row["dropped_by"] else kept).append(row)
    for old in out.glob("sda_*.json"):
        old.unlink()
    for start in range(0, len(kept), FILE):
        checkpoint.write_json(out / f"sda_{start}_{start + FILE}.json", kept[start:start + FILE], indent=None)
    return kept, dropped
