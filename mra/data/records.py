"""One record type: an image, its captions, the identity of the person, and boxes with phrases where there are any.

Boxes and phrases are those of the SDA set (MRA section 2). formats/ reads annotation files into records and checks
them. Read next: augment.py.
"""

import json
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image


@dataclass(frozen=True, slots=True)
class Record:
    """One image of one person."""
    path: str
    captions: tuple[str, ...]
    identity: int                   # 0 .. K-1 within its RecordSet
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()   # parallel to boxes


class Packed(Sequence):
    """Records as JSON texts in one buffer, unpacked on access.

    SDA has 1.5 million records. As Python objects they would fill gigabytes in every loading process: a forked process
    shares memory only until it writes there, and reading an object writes its reference count.
    """

    def __init__(self, records: Iterable[Record]):
        self.buffer, self.ends = bytearray(), array("Q", [0])
        for record in records:
            self.buffer += pack(record)
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Record:
        place = range(len(self))[index]         # as a list: -1 is the last one, and beyond them is an IndexError
        return unpack(self.buffer[self.ends[place]:self.ends[place + 1]])


@dataclass(frozen=True)
class RecordSet:
    """One split, in the order of its annotation files."""
    name: str
    split: str
    records: Sequence[Record]


def pack(record: Record) -> bytes:
    return json.dumps([record.path, record.captions, record.identity, record.boxes, record.phrases]).encode()


def unpack(packed: bytes | bytearray) -> Record:
    path, captions, identity, boxes, phrases = json.loads(packed)
    return Record(path, tuple(captions), identity, tuple(map(tuple, boxes)), tuple(phrases))


def share_of(whole: RecordSet, share: float) -> RecordSet:
    """A share of its identities, at least two. The choice is always the same; a larger share holds the smaller ones."""
    if share == 1:
        return whole
    count = 1 + max(record.identity for record in whole.records)
    chosen = random.Random(0).sample(range(count), count)[:max(2, round(share * count))]
    number = {identity: i for i, identity in enumerate(sorted(chosen))}
    kept = (record for record in whole.records if record.identity in number)
    return replace(whole, records=Packed(replace(record, identity=number[record.identity]) for record in kept))
