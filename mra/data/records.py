"""One record type, for the images of every data set. formats/read.py makes the records. Read next: augment.py."""

import json
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image


@dataclass(frozen=True, slots=True)
class Record:
    """One image of one person. A record of SDA takes about 2 kB of memory.

    In val and test an image without a caption is a distractor, and captions without an image are queries alone.
    """
    path: str                       # empty: no image
    captions: tuple[str, ...]
    identity: int                   # counted from 0 within its RecordSet
    boxes: tuple[Box, ...] = ()     # of SDA (MRA section 2): a box for each phrase of the caption
    phrases: tuple[str, ...] = ()   # parallel to boxes


@dataclass(frozen=True)
class RecordSet:
    """One split, in the order of its annotation files."""
    name: str
    split: str
    records: Sequence[Record]


class Packed:
    """Lists of plain values in one buffer, which forked loading processes share.

    MALS has 1.5 million pairs. Reading a Python object writes its reference count, so each process would copy it.
    """

    def __init__(self, items: Iterable[list]):
        self.buffer, self.ends = bytearray(), array("Q", [0])
        for item in items:
            self.buffer += json.dumps(item).encode()
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> list:
        return json.loads(self.buffer[self.ends[index]:self.ends[index + 1]])


def share_of(whole: RecordSet, share: float) -> RecordSet:
    """A share of the identities, at least two: always the same ones. A larger share contains every smaller one."""
    if share == 1:
        return whole
    count = 1 + max(record.identity for record in whole.records)
    chosen = random.Random(0).sample(range(count), count)[:max(2, round(share * count))]
    number = {identity: i for i, identity in enumerate(sorted(chosen))}
    kept = [replace(record, identity=number[record.identity]) for record in whole.records if record.identity in number]
    return replace(whole, records=kept)
