"""One record type: an image, its captions, the identity of the person, and boxes with phrases where there are any.

Boxes and phrases are those of the SDA set (MRA section 2). formats/ reads annotation files into records and checks
them. Read next: augment.py.
"""

import marshal
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image


@dataclass(frozen=True, slots=True)
class Record:
    """One image; its path is proven to lie inside the image root."""
    path: str
    captions: tuple[str, ...]
    identity: int                   # 0 .. K-1 within its RecordSet
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()   # parallel to boxes, where there are any


class Packed(Sequence):
    """Records in one buffer, unpacked on access.

    A set may have 1.5 million records. As Python objects they would fill gigabytes, and each loading process, which is
    forked, would soon own a copy: to look at an object changes its reference count, and so its page of memory.
    """

    def __init__(self, records: Iterable[Record]):
        self.buffer, self.ends = bytearray(), array("Q", [0])
        for record in records:
            self.buffer += pack(record)
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Record:
        place = range(len(self))[index]
        return unpack(memoryview(self.buffer)[self.ends[place]:self.ends[place + 1]])


@dataclass(frozen=True)
class RecordSet:
    """One split, in the order of its annotation files."""
    name: str
    split: str
    records: Sequence[Record]


def pack(record: Record) -> bytes:
    """The record as bytes, for `unpack` within the same run."""
    return marshal.dumps((record.path, record.captions, record.identity, record.boxes, record.phrases))


def unpack(packed: bytes | memoryview) -> Record:
    return Record(*marshal.loads(packed))


def share_of(whole: RecordSet, share: float) -> RecordSet:
    """A share of its identities, at least two: the same ones each time, a smaller share within a larger."""
    if share == 1:
        return whole
    count = 1 + max(record.identity for record in whole.records)
    chosen = random.Random(0).sample(range(count), count)[:max(2, round(share * count))]
    place = {identity: i for i, identity in enumerate(sorted(chosen))}
    return replace(whole, records=Packed(replace(record, identity=place[record.identity])
                                         for record in whole.records if record.identity in place))
