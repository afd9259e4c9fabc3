"""Making a set: the plan of what to make, the making of one part of it, and the finished set in SDA format.

`Maker.part` is DaD from beginning to end: sample, calibration, decoder, boxes, scores of the filters.
Read next: adapt.py.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra.config import DAD_RECIPES, AdaptConfig
from mra.data.files import read_json, save_image, write_json
from mra.data.records import Record
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.diffusion.base import Diffusion, decode
from mra.diffusion.boxes import phrase_box, word_maps
from mra.diffusion.filters import Judge, colourfulness
from mra.diffusion.prompts import prompts_of
from mra.diffusion.sampling import Painter

PART = 64           # images of a part, which are made and written together
MOVERS = 1000       # source images that `match_moments` takes the source's mean and variance from
FILE = 5000         # records of an annotation file
FILTERS = ("greyscale", "malformed")
WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)


# ---- what to make

@dataclass(frozen=True)
class SetPlan:
    """What one run makes. A draft is a record to make: its caption is the prompt, its path the image it comes from."""

    drafts: list[Record]
    probes: list[Record]        # drafts from which the calibration's are chosen; empty: no calibration
    movers: list[Record]        # see MOVERS; empty unless images are restyled
    places: dict[str, Tensor]   # where in an image a noun usually is, see boxes.usual_places

    @property
    def parts(self) -> int:
        """The number of parts."""
        return math.ceil(len(self.drafts) / PART)

    def chosen_probes(self, seed: int, count: int) -> list[list[Record]]:
        """`count` random probes, with replacement, in parts of PART; sorted, so that lengths stay together."""
        chosen = sorted(random.Random(seed).choices(range(len(self.probes)), k=count))
        return [[self.probes[i] for i in chosen[start:start + PART]] for start in range(0, count, PART)]

    def digest(self) -> str:
        """A hash of this plan; when images are restyled, also of their files."""
        found = hashlib.sha256()
        for draft in [*self.drafts, *self.probes, *self.movers]:
            found.update(str(draft).encode())
            if self.movers:
                found.update(Path(draft.path).read_bytes())
        for noun, place in self.places.items():
            found.update(noun.encode() + place.numpy().tobytes())
        return found.hexdigest()[:16]


def make_plan(config: AdaptConfig, base: Diffusion, source: Sequence[Record], target: Sequence[Record],
              places: dict[str, Tensor]) -> SetPlan:
    """Plan a set from the records of the source and of the target.

    The calibration compares samples of the probes with the target's latents. So probes are drafts of the target's
    captions even with --captions source, and there are at least as many as the recipe asks for.
    """
    restyles, tokenizer = config.mode == "restyle", base.tokenizer
    drafts = drafts_of(config, config.images, source if config.from_source else target, tokenizer)
    probes = []
    if not base.config.stable:      # which is not calibrated, as in the paper
        count = max(config.images, DAD_RECIPES[config.size].probes)
        probes = drafts_of(config, count, source if restyles else target, tokenizer)
    movers = list(islice(source, MOVERS)) if restyles else []
    return SetPlan(drafts, probes, movers, places)


def drafts_of(config: AdaptConfig, count: int, records: Sequence[Record], tokenizer: Tokenizer) -> list[Record]:
    """`count` drafts, or as many as there are: records to restyle, or records of new prompts.

    The draft of a prompt has the prompt's phrases and no boxes yet. Its identity is the number of its caption, since
    the prompts of one caption describe one person. Drafts are sorted by length, so that few prompts need padding.
    """
    if config.mode == "restyle":
        chosen = random.Random(config.seed).sample(range(len(records)), min(count, len(records)))
        return [records[i] for i in chosen]
    pairs = [(caption, record.path) for record in records for caption in record.captions]
    prompts = prompts_of([caption for caption, _ in pairs], count, config.seed)
    drafts = [Record(pairs[i][1], (prompt,), i, (), tuple(dict.fromkeys(noun_phrases(prompt))))
              for i, prompt in prompts]
    return sorted(drafts, key=lambda draft: len(tokenizer.encode(draft.captions[0])))


# ---- one part of the set

@dataclass(frozen=True)
class Maker:
    """Makes the images and records of a plan, part by part."""

    config: AdaptConfig
    painter: Painter
    judge: Judge
    plan: SetPlan
    out: Path

    def file(self, number: int) -> Path:
        """The path of a part's records, which are written after its images."""
        return self.out / "parts" / f"{number:06d}.json"

    def probe(self, probes: list[Record], draw: torch.Generator, autocast: torch.autocast) -> Tensor:
        """Sampled latents (B, C, h, w) of some probes."""
        with torch.no_grad(), autocast:
            return self.painter.sample(probes, draw)[0]

    def part(self, number: int, moments: tuple, draw: torch.Generator, autocast: torch.autocast) -> None:
        """Make and write one part; `moments` are the scale and shift of sampling.calibration."""
        scale, shift = moments
        drafts = self.plan.drafts[number * PART:(number + 1) * PART]
        base = self.painter.base
        with torch.no_grad(), autocast:
            latents, prompt = self.painter.sample(drafts, draw)                          # (B, C, h, w)
            latents = scale * latents + shift
            images = decode(base.autoencoder, latents, draw)                             # (B, 3, H, W) uint8
            maps = [None] * len(drafts)
            if self.config.mode == "generate":          # restyled images keep the source's boxes
                maps = word_maps(base.denoiser, self.painter.branch, latents, prompt, base.schedule, draw).float().cpu()
            rows = [self.annotate(draft, own) for draft, own in zip(drafts, maps)]
        mean, variance = colourfulness(images)
        scores = {"colour_mean": mean, "colour_variance": variance, "malformed": self.judge.score(images)[:, 0]}
        write_part(self.file(number), images, rows, scores)

    def annotate(self, draft: Record, maps: Tensor | None) -> dict:
        """An SDA record without its image; boxes are found in the maps (T, h, w) of words, or are those of the draft.

        If no phrase has a box, the whole image is the region and the caption its phrase (MRA section 2).
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


def write_part(file: Path, images: Tensor, rows: list[dict], scores: dict[str, Tensor]) -> None:
    """Write the uint8 images (B, 3, H, W) of a part, then its records with the scores (B,)."""
    folder = file.parent.parent / "imgs" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    suffix = "png" if images.shape[2] < 128 else "jpg"      # JPEG artefacts would show on small images
    for i, (row, image) in enumerate(zip(rows, images.cpu())):
        path = folder / f"{i:02d}.{suffix}"
        row["image"] = f"{file.stem}/{path.name}"
        for name, values in scores.items():
            row[name] = round(float(values[i]), 5)
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), path, quality=95, subsampling=0)
    write_json(file, rows, indent=None)


# ---- the finished set

def filters_of(config: AdaptConfig, row: dict) -> list[str]:
    """Names of the filters that drop a record."""
    grey = row["colour_mean"] < config.grey_mean and row["colour_variance"] < config.grey_variance
    drops = {"greyscale": grey, "malformed": row["malformed"] > config.malformed}
    return [name for name in FILTERS if drops[name]]


def collect(config: AdaptConfig, parts: list[Path], out: Path) -> tuple[list[dict], list[dict]]:
    """Write annotation files of the records that pass the filters; returns these records and the dropped ones."""
    rows = [row for part in parts for row in read_json(part, list)]
    for row in rows:
        row["dropped_by"] = filters_of(config, row)
    kept = [row for row in rows if not row["dropped_by"]]
    dropped = [row for row in rows if row["dropped_by"]]
    for start in range(0, len(kept), FILE):
        write_json(out / f"sda_{start}_{start + FILE}.json", kept[start:start + FILE], indent=None)
    return kept, dropped
