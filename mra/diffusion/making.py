"""Making a set: the plan of what to make, and the images and records that are made of it.

`make_images` is DaD from beginning to end: sample, calibration, decoder, boxes. Read next: adapt.py.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mra.config import DAD_RECIPES, AdaptConfig
from mra.data.batches import WHOLE_IMAGE
from mra.data.records import Box, Record
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.diffusion.base import Diffusion, decode
from mra.diffusion.boxes import phrase_box, usual_places, word_maps
from mra.diffusion.prompts import prompts_of
from mra.diffusion.sampling import Painter

MOVERS = 1000       # source images that `match_moments` takes the source's mean and variance from


@dataclass(frozen=True)
class SetPlan:
    """What one run makes. A draft is a record to make: its caption is the prompt, its path the image it comes from."""

    drafts: list[Record]
    probes: list[Record]        # drafts from which the calibration's are chosen; empty: no calibration
    movers: list[Record]        # see MOVERS; empty unless images are restyled
    places: dict[str, Tensor]   # where in an image a noun usually is, see boxes.usual_places

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


def make_plan(config: AdaptConfig, base: Diffusion, source: Sequence[Record], target: Sequence[Record]) -> SetPlan:
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
    return SetPlan(drafts, probes, movers, usual_places(source, *base.config.shape[1:]))


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


def make_images(painter: Painter, drafts: list[Record], places: dict[str, Tensor], moments: tuple,
                draw: torch.Generator) -> tuple[Tensor, list[dict]]:
    """The images of drafts, (B, 3, H, W) uint8, and their SDA records without the name of the image.

    `moments` are the scale and shift of sampling.calibration, `places` those of boxes.usual_places.
    """
    base, config, (scale, shift) = painter.base, painter.config, moments
    latents, prompt = painter.sample(drafts, draw)                                       # (B, C, h, w)
    latents = scale * latents + shift
    images = decode(base.autoencoder, latents, draw)                                     # (B, 3, H, W) uint8
    if config.mode == "restyle":
        return images, [record_of(draft, [(*own, 1.0) for own in zip(draft.phrases, draft.boxes)]) for draft in drafts]
    maps = word_maps(base.denoiser, painter.branch, latents, prompt, base.schedule, draw)              # (B, T, h, w)
    rows = []
    for draft, own in zip(drafts, maps.float().cpu()):
        found = []
        for phrase in draft.phrases:
            placed = phrase_box(own, draft.captions[0], phrase, base.tokenizer, places)
            if placed and placed[1] >= config.box_threshold:
                found.append((phrase, *placed))
        rows.append(record_of(draft, found))
    return images, rows


def record_of(draft: Record, found: list[tuple[str, Box, float]]) -> dict:
    """The SDA record of a made image, with each phrase that has a box, its box and its confidence.

    If no phrase has a box, the whole image is the region and the caption its phrase (MRA section 2).
    """
    found = found or [(draft.captions[0], WHOLE_IMAGE, 1.0)]
    return {"boxes": [[round(x, 4) for x in box] for _, box, _ in found],
            "logits": [round(confidence, 4) for _, _, confidence in found],
            "phrases": [phrase for phrase, _, _ in found], "caption": draft.captions[0], "image_id": draft.identity,
            "origin": draft.path}
