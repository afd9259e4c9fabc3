"""From annotation files to a RecordSet.

Whatever is wrong in a file is found here and said in one sentence, so the method trusts a `Record`. Read next:
check.py.
"""

import json
import math
import os
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data.files import shown
from mra.data.records import Box, Packed, Record, RecordSet, pack, unpack
from mra.formats.layouts import SPLITS, Source, locate

# The names of a field in the different formats.
IMAGE, CAPTIONS, IDENTITY = ("image", "file_path", "img_path"), ("caption", "captions"), ("image_id", "id")
BOX_ROUNDING = 1e-3                 # a box may leave the image by this fraction; it is clipped
VAL_SHARE, VAL_IMAGES = 0.1, 1000   # a val split made from train: share of the identities, most images


class Row(NamedTuple):
    """A checked record of any split. Its Record is packed, since all rows of a set are in memory at once."""
    split: str
    identity: str                   # in the annotation file
    place: str                      # for messages: annotation file, record number, image
    missing: bool                   # there is no such image; the path is then that of the annotation file
    packed: bytes                   # the Record, with identity 0


def load(dataset: str, split: str, data_root: Path, allow_missing: bool = False, say=print) -> RecordSet:
    """Read a split of one of DATASETS under `data_root`, or of the folder `dataset`. Raises UserError.

    A set without a val split (all but cuhk and rstp) gets one from its training identities, always the same ones;
    train leaves them out. `allow_missing` drops the records whose image is missing.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {shown(split)}: choose one of {', '.join(SPLITS)}")
    source = locate(dataset, split, Path(data_root))
    rows, refused = read_rows(source)
    if refused:
        raise UserError(refused[0])
    rows = _of_split(rows, split, source, say)
    missing = [row.place for row in rows if row.missing]
    told = f"{len(missing)} of {len(rows)} images are missing in {shown(source.images)}"
    if missing and (len(missing) == len(rows) or not allow_missing):
        hint = "complete it" if allow_missing else "complete it or add --allow-missing"
        raise UserError(f"{told}; {hint}: {'; '.join(missing[:5])}")
    if missing:
        say(f"{told} and left out")
        rows = [row for row in rows if not row.missing]
    numbers = {identity: i for i, identity in enumerate(dict.fromkeys(row.identity for row in rows))}
    records = Packed(replace(unpack(row.packed), identity=numbers[row.identity]) for row in rows)
    captions = sum(len(record.captions) for record in records)
    if (source.images / "town.json").is_file():
        say(f"{shown(source.images)} is drawn data, not photographs.")
    say(f"{shown(dataset)} {split}: {len(records)} images, {captions} captions, {len(numbers)} identities, "
        f"read from {shown(source.files[0])}" + (" and others" if source.files[1:] else ""))
    return RecordSet(dataset, split, records)


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """All records of all files, of every split they hold; a sentence for each that cannot be used."""
    rows, refused, listing = [], [], cache(_files_in)
    for file in source.files:
        name = shown(file)
        try:
            items = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            refused.append(f"{name} cannot be read as one JSON list; is it cut short, or not UTF-8? ({error})")
            continue
        if not isinstance(items, list) or not items:
            refused.append(f"{name} must hold a list of records and holds {shown(items)}")
            continue
        for number, item in enumerate(items):
            image = item.get(_key(item, IMAGE)) if isinstance(item, dict) else None
            place = f"{name}, record {number} (the first is 0), image {shown(image)}"
            try:
                rows.append(_row(item, source, place, listing))
            except ValueError as error:
                refused.append(f"{place}: {error}")
    if source.grouped:
        rows = _grouped(rows, refused)
    return rows, refused


def _row(item, source: Source, place: str, listing) -> Row:
    """Check one record and look for its image. Raises ValueError saying what is wrong with the record."""
    if not isinstance(item, dict):
        raise ValueError(f"a record must be an object with named fields, not {shown(item)}")
    image = _field(item, IMAGE, str)
    captions = _field(item, CAPTIONS, str, list)
    identity = str(_field(item, IDENTITY, int, str))
    split = source.split or _field(item, ("split",), str)
    if split not in SPLITS:
        raise ValueError(f"unknown split {shown(split)}: it must be one of {', '.join(SPLITS)}")
    captions = _texts([captions] if isinstance(captions, str) else captions, "caption")
    boxes = phrases = ()
    if source.boxed or "boxes" in item:
        boxes = tuple(map(_box, _field(item, ("boxes",), list)))
        phrases = _texts(_field(item, ("phrases",), list), "phrase")
    if not captions or len(boxes) != len(phrases):
        raise ValueError(f"it has {len(captions)} captions, {len(boxes)} boxes and {len(phrases)} phrases")
    if not image or image[0] == "/" or "\\" in image or ".." in image.split("/"):
        raise ValueError("the path is empty, holds a backslash, or leads out of the image folder")
    below, _, name = image.rpartition("/")
    found = [root + image for root in (f"{source.images}/imgs/", f"{source.images}/") if name in listing(root + below)]
    path = found[0] if found else image
    return Row(split, identity, place, not found, pack(Record(path, captions, 0, boxes, phrases)))


def _files_in(folder: str) -> set[str]:
    """The names of its files. To ask for each of 1.5 million images on a network disk takes hours."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}
    except (OSError, ValueError):       # no such folder
        return set()


def _key(item: dict, names: tuple[str, ...]) -> str:
    """The first of these names of a field that the record has."""
    return next((name for name in names if name in item), names[0])


def _field(item: dict, names: tuple[str, ...], *kinds: type):
    key = _key(item, names)
    if key not in item:
        raise ValueError(f"the field {' or '.join(map(repr, names))} is missing")
    if type(item[key]) not in kinds:
        raise ValueError(f"the field {key!r} has the wrong type: {shown(item[key])}")
    return item[key]


def _texts(values: list, kind: str) -> tuple[str, ...]:
    """The texts stripped; half of a surrogate pair, which no file can hold, becomes a question mark."""
    for value in values:
        if not isinstance(value, str) or not any(map(str.isalnum, value)):
            raise ValueError(f"a {kind} is empty or not text: {shown(value)}")
    return tuple([value.strip().encode(errors="replace").decode() for value in values])


def _box(value) -> Box:
    """Check a box, and clip what rounding put outside the image."""
    if not (isinstance(value, list) and len(value) == 4 and set(map(type, value)) <= {int, float}
            and abs(min(value)) <= 2 and abs(max(value)) <= 2):
        raise ValueError(f"a box must be four fractions cx, cy, w, h of the image, not {shown(value)}")
    cx, cy, w, h = value
    edges = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    clipped = [min(max(edge, 0.0), 1.0) for edge in edges]
    left, top, right, bottom = clipped
    outside = max(abs(edge - inside) for edge, inside in zip(edges, clipped))
    if outside > BOX_ROUNDING or not (left < right and top < bottom):       # also where one of them is NaN
        raise ValueError(f"the box {shown(value)} is empty or leaves the image (cx, cy, w, h)")
    if not outside:
        return cx, cy, w, h
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _grouped(rows: list[Row], refused: list[str]) -> list[Row]:
    """One row for each image, where the file has one record for each caption."""
    joined = {}
    for row in rows:
        more = unpack(row.packed)
        before = joined.setdefault(more.path, row)
        if before.identity != row.identity:
            refused.append(f"{row.place}: identity {shown(row.identity)}, before {shown(before.identity)}")
        elif before is not row:
            one = unpack(before.packed)
            both = Record(one.path, one.captions + more.captions, 0, one.boxes + more.boxes, one.phrases + more.phrases)
            joined[one.path] = before._replace(packed=pack(both))
    return list(joined.values())


def _of_split(rows: list[Row], split: str, source: Source, say) -> list[Row]:
    """The rows of a split; a val split is held out of train where the set has none."""
    chosen, hint = [row for row in rows if row.split == split], ""
    if source.hold_out and split != "test" and all(row.split != "val" for row in rows):
        train = [row for row in rows if row.split == "train"]
        held = _held_out(train)
        chosen = [row for row in train if (row.identity in held) == (split == "val")]
        say(f"without a val split: {len(held)} training identities, the same each time, are held out as val")
        if split == "val":
            hint = "; to hold some out as val takes two training identities"
    if not chosen:
        raise UserError(f"{shown(source.files[0])} has no record for the split {split}{hint}")
    return chosen


def _held_out(train: list[Row]) -> set[str]:
    """Identities for val: they depend on the training identities and their numbers of images alone."""
    images, held, count = Counter(row.identity for row in train), set(), 0
    for identity in random.Random(0).sample(sorted(images), math.ceil(VAL_SHARE * (len(images) - 1))):
        if count + images[identity] <= VAL_IMAGES:
            held.add(identity)
            count += images[identity]
    return held
