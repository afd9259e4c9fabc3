"""Making a set of images: what to make, a part of it made from beginning to end, and the finished set in SDA format.

`Maker.part` is the way of DaD through sample, calibration, decoder, boxes and scores for the filters; adapt.py calls it
part by part. Read next: adapt.py.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra.config import AdaptConfig
from mra.data.files import read_json, save_image, write_json
from mra.data.records import Record
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.diffusion.base import Diffusion, decode
from mra.diffusion.boxes import phrase_box, word_maps
from mra.diffusion.filters import Judge, colourfulness
from mra.diffusion.prompts import prompts_of
from mra.diffusion.sampling import Painter

PART = 64           # images that are made and written together
PROBES = 256        # images that are sampled for the calibration
MOVERS = 1000       # source images whose moments are moved to the target's, when images are restyled
FILE = 5000         # records of an annotation file
FILTERS = ("greyscale", "malformed")
WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)


# ---- what to make

@dataclass(frozen=True)
class Plan:
    """What one run makes. A draft is a record to make: its caption is the prompt, its path the image it comes from."""

    drafts: list[Record]
    probes: list[Record]        # drafts whose samples are the calibration's
    movers: list[Record]        # source images that stand for all of them in `match_moments`
    places: dict[str, Tensor]   # where in an image a noun usually is, see boxes.usual_places

    @property
    def parts(self) -> int:
        """How many parts of PART drafts there are."""
        return math.ceil(len(self.drafts) / PART)

    def chosen_probes(self, seed: int) -> list[list[Record]]:
        """PROBES probes, drawn with replacement, in parts of PART; in their order, so that lengths stay together."""
        chosen = sorted(random.Random(seed).choices(range(len(self.probes)), k=PROBES))
        return [[self.probes[i] for i in chosen[start:start + PART]] for start in range(0, PROBES, PART)]

    def digest(self) -> str:
        """A short name for this plan; it depends on the pixels of the source images that are restyled."""
        found = hashlib.sha256()
        for draft in [*self.drafts, *self.probes, *self.movers]:
            found.update(str(draft).encode())
            if self.movers:
                found.update(Path(draft.path).read_bytes())
        for noun, place in self.places.items():
            found.update(noun.encode() + place.numpy().tobytes())
        return found.hexdigest()[:16]


def make_plan(config: AdaptConfig, base: Diffusion, source: Sequence[Record], target: Sequence[Record],
              places: dict[str, Tensor]) -> Plan:
    """What to make, from the records of the source and of the target.

    The probes are typical of the set as a whole: always drafts of the target's captions, or source images when
    restyling, and at least PROBES of them.
    """
    restyles = config.mode == "restyle"
    drafts = drafts_of(config, base.tokenizer, source if config.from_source else target)
    if base.config.stable:          # not calibrated, as in the paper
        probes = []
    else:
        many = replace(config, images=max(config.images, PROBES))
        probes = drafts_of(many, base.tokenizer, source if restyles else target)
    movers = [source[i] for i in range(min(MOVERS, len(source)))] if restyles else []
    return Plan(drafts, probes, movers, places)


def drafts_of(config: AdaptConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> list[Record]:
    """Drafts of `config.images` images: some of these records, to be restyled, or one for each prompt.

    A prompt's draft has the prompt's phrases, no boxes yet, and its caption's number as identity: the prompts of one
    caption describe one person. Drafts are sorted by length, so that few prompts need padding.
    """
    if config.mode == "restyle":
        chosen = random.Random(config.seed).sample(range(len(records)), min(config.images, len(records)))
        return [records[i] for i in chosen]
    pairs = [(caption, record.path) for record in records for caption in record.captions]
    prompts = prompts_of([caption for caption, _ in pairs], config.images, config.seed)
    drafts = [Record(pairs[i][1], (prompt,), i, (), tuple(dict.fromkeys(noun_phrases(prompt))))
              for i, prompt in prompts]
    return sorted(drafts, key=lambda draft: len(tokenizer.encode(draft.captions[0])))


# ---- a part of the set, from the drafts to the files

@dataclass(frozen=True)
class Maker:
    """All that makes the images of a plan."""

    config: AdaptConfig
    painter: Painter
    judge: Judge
    plan: Plan
    out: Path

    def file(self, number: int) -> Path:
        """The records of a part; it is written after the part's images."""
        return self.out / "parts" / f"{number:06d}.json"

    def probe(self, probes: list[Record], draw: torch.Generator, autocast: torch.autocast) -> Tensor:
        """Latents (B, C, h, w) of some probes, not calibrated."""
        with torch.no_grad(), autocast:
            return self.painter.sample(probes, draw)[0]

    def part(self, number: int, moments: tuple, draw: torch.Generator, autocast: torch.autocast) -> None:
        """Make PART images: sample, calibrate, decode, find the phrases' boxes, score for the filters, write.

        `moments` are the calibration's scale and shift, (C, h, w) each.
        """
        scale, shift = moments
        drafts = self.plan.drafts[number * PART:(number + 1) * PART]
        base = self.painter.base
        with torch.no_grad(), autocast:
            latents, prompt = self.painter.sample(drafts, draw)                          # (B, C, h, w)
            latents = scale * latents + shift
            images = decode(base.autoencoder, latents, draw)                             # (B, 3, H, W) uint8
            maps = [None] * len(drafts)
            if self.config.mode == "generate":          # else the source's boxes stay
                maps = word_maps(base.denoiser, self.painter.branch, latents, prompt, base.schedule, draw).float().cpu()
            rows = [self.annotate(draft, own) for draft, own in zip(drafts, maps)]
        write_part(self.file(number), images, rows, self.scores(images))

    def annotate(self, draft: Record, maps: Tensor | None) -> dict:
        """An SDA record without its image. The word maps (T, h, w) give each phrase its box; None keeps the draft's.

        Without any phrase the region is the whole image and the phrase is the caption (MRA section 2).
        """
        caption, found = draft.captions[0], []
        if maps is None:
            found = [(phrase, box, 1.0) for phrase, box in zip(draft.phrases, draft.boxes)]
        else:
            for phrase in draft.phrases:
                placed = phrase_box(maps, caption, phrase, self.painter.base.tokenizer, self.plan.places)
                if placed and placed[1] >= self.config.box_threshold:
                    found.append((phrase, *placed))
        if not found:
            found = [(caption, WHOLE_IMAGE, 1.0)]
        return {"boxes": [[round(x, 4) for x in box] for _, box, _ in found],
                "logits": [round(sure, 4) for _, _, sure in found],
                "phrases": [phrase for phrase, _, _ in found], "caption": caption, "image_id": draft.identity,
                "origin": draft.path}

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """What the filters decide by (B,), of uint8 images (B, 3, H, W)."""
        mean, variance = colourfulness(images)
        return {"colour_mean": mean, "colour_variance": variance, "malformed": self.judge.score(images)[:, 0]}


def write_part(file: Path, images: Tensor, rows: list[dict], scores: dict[str, Tensor]) -> None:
    """Write the images (B, 3, H, W) of a part, and then its records with all scores."""
    folder = file.parent.parent / "imgs" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    suffix = "png" if images.shape[2] < 128 else "jpg"      # compression would show on small images
    for i, (row, image) in enumerate(zip(rows, images.cpu())):
        path = folder / f"{i:02d}.{suffix}"
        row |= {"image": f"{file.stem}/{path.name}"} | {name: round(float(values[i]), 5)
                                                        for name, values in scores.items()}
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), path, quality=95, subsampling=0)
    write_json(file, rows, indent=None)


# ---- the finished set

def filters_of(config: AdaptConfig, row: dict) -> list[str]:
    """Names of the filters that drop a record."""
    grey = row["colour_mean"] < config.grey_mean and row["colour_variance"] < config.grey_variance
    drops = (grey, row["malformed"] > config.malformed)
    return [name for name, drop in zip(FILTERS, drops) if drop]


def collect(config: AdaptConfig, parts: list[Path], out: Path) -> tuple[list[dict], list[dict]]:
    """Write the annotation files of what passes the filters; returns the records kept and those dropped."""
    kept, dropped = [], []
    for row in (row for part in parts for row in read_json(part, list)):
        row["dropped_by"] = filters_of(config, row)
        if row["dropped_by"]:
            dropped.append(row)
        else:
            kept.append(row)
    for start in range(0, len(kept), FILE):
        write_json(out / f"sda_{start}_{start + FILE}.json", kept[start:start + FILE], indent=None)
    return kept, dropped
