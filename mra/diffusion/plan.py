"""The plan of a set: the images to make, their prompts, and the boxes of their phrases.

The paper runs an open-set detector on its images. Here a phrase gets the average box of its last word, the noun, in the
source set; README.md has how true these boxes are. Read next: filters.py; run/parts.py, which makes the images.
"""

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from mra.config import AdaptConfig
from mra.data.batches import WHOLE_IMAGE
from mra.data.records import Box, Record
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.diffusion.prompts import prompts_of

PLACED = 50_000     # source records whose boxes are averaged
SAMPLED = 1000      # source images that `transfer_moments` takes the source's mean and variance from


def average_boxes(records: Sequence[Record]) -> dict[str, Box]:
    """For the noun of each phrase, the mean of its boxes in the first PLACED records."""
    found = defaultdict(list)
    for record in records[:PLACED]:
        for phrase, box in zip(record.phrases, record.boxes):
            found[noun_of(phrase)].append(box)
    return {noun: tuple(fmean(side) for side in zip(*own)) for noun, own in found.items()}


def noun_of(phrase: str) -> str:
    """The last word of a phrase, in lower case and without quotes or brackets around it."""
    return phrase.split()[-1].strip("\"'()").lower()


def drafts_of(config: AdaptConfig, records: Sequence[Record], boxes: dict[str, Box],
              tokenizer: Tokenizer) -> list[Record]:
    """Drafts, at most `config.images`: records to restyle, or new prompts with the phrases that have a box.

    A draft is a record to make: its caption is the prompt, its path the image that it comes from.
    The identity of a new prompt is the number of its caption, since the prompts of one caption describe one person.
    New prompts are sorted by length, so that few need padding. Records to restyle stay in random order.
    """
    if config.mode == "restyle":
        return random.Random(config.seed).sample(records, min(config.images, len(records)))
    pairs, drafts = [(caption, record.path) for record in records for caption in record.captions], []
    for i, prompt in prompts_of([caption for caption, _ in pairs], config.images, config.seed):
        phrases = tuple(phrase for phrase in dict.fromkeys(noun_phrases(prompt)) if noun_of(phrase) in boxes)
        own = tuple(boxes[noun_of(phrase)] for phrase in phrases)
        drafts.append(Record(pairs[i][1], (prompt,), i, own, phrases))
    return sorted(drafts, key=lambda draft: len(tokenizer.encode(draft.captions[0])))


def record_of(draft: Record) -> dict:
    """The SDA record of the image of a draft, without the name of the image.

    If no phrase has a box, the whole image is the region and the caption its phrase (MRA section 2).
    """
    caption = draft.captions[0]
    return {"boxes": [[round(x, 4) for x in box] for box in draft.boxes or (WHOLE_IMAGE,)],
            "phrases": draft.phrases or (caption,), "caption": caption, "image_id": draft.identity,
            "origin": draft.path}


def content_of(drafts: Sequence[Record], source_sample: Sequence[Record]) -> Iterator[bytes]:
    """All that decides the images of a set, for a digest: records and, when images are restyled, their files."""
    inside = len(os.path.commonprefix([draft.path for draft in drafts]))        # the set may be moved
    for draft in [*drafts, *source_sample]:
        yield str(replace(draft, path=draft.path[inside:])).encode()
        if source_sample:
            yield Path(draft.path).read_bytes()
