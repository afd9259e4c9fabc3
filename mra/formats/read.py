"""From annotation files to a RecordSet.

Whatever is wrong in a file is found here and said in one sentence, so the method trusts a `Record`. Read next:
check.py.
"""

import gc
import json
import math
import os
import random
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data.files import in_processes, open_image, shown
from mra.data.records import Box, Packed, Record, RecordSet, pack, unpack
from mra.formats.layouts import SPLITS, Source, locate

BOX_ROUNDING = 1e-3                 # a box may leave the image by this fraction; it is clipped
VAL_SHARE, VAL_IMAGES = 0.1, 1000   # a val split made from train: share of the identities, most images


class Row(NamedTuple):
    """A checked record of any split. All rows of a set are held while it is read, so they are small, as in `Packed`."""
    split: str
    identity: str
    path: str                       # in the annotation file; once the image is found, the path to open
    captions: int                   # number of captions
    place: str                      # for messages: annotation file, record number, image
    packed: bytes                   # a Record with captions, boxes and phrases alone
    missing: bool = False           # there is no such image

    def record(self, identity: int = 0) -> Record:
        said = unpack(self.packed)
        return Record(self.path, said.captions, identity, said.boxes, said.phrases)


def load(dataset: str, split: str, data_root: Path, allow_missing: bool = False, say=print) -> RecordSet:
    """Read a split of one of DATASETS under `data_root`, or of the folder `dataset`. Raises UserError.

    A set without a val split (all but cuhk and rstp) gets one from its training identities, always the same ones;
    train leaves them out. `allow_missing` drops the records whose image is missing.
    """
    return load_splits(dataset, (split,), data_root, allow_missing, say)[0]


def load_splits(dataset: str, splits: tuple[str, ...], data_root: Path, allow_missing: bool = False,
                say=print) -> list[RecordSet]:
    """`load` of several splits; the files that two of them share are read once."""
    sets, read = [], cache(read_rows)
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"unknown split {shown(split)}: choose one of {', '.join(SPLITS)}")
        source = locate(dataset, split, Path(data_root))
        rows, refused = read(source)
        if refused:
            raise UserError(refused[0])
        rows = _choose(rows, split, source, allow_missing, say)
        ids = {identity: i for i, identity in enumerate(dict.fromkeys(row.identity for row in rows))}
        records = Packed(row.record(ids[row.identity]) for row in rows)
        if (source.images / "town.json").is_file():
            say(f"{shown(source.images)} is drawn data, not photographs.")
        more = f" and {len(source.files) - 1} more" if len(source.files) > 1 else ""
        say(f"{shown(dataset)} {split}: {len(rows)} images, {sum(row.captions for row in rows)} captions, "
            f"{len(ids)} identities, read from {shown(source.files[0])}{more}")
        sets.append(RecordSet(dataset, split, records))
    return sets


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """All records of all files, of every split they hold; a sentence for each that cannot be used."""
    workers = min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(source.files) // 8)
    read = in_processes(partial(_read_file, source), source.files, workers, start="fork")      # they only read text
    roots = f"{source.images}/imgs/", f"{source.images}/"
    listing = cache(partial(_listing, inside=tuple(os.path.join(os.path.realpath(root), "") for root in roots)))
    rows, refused = [], []
    gc.disable()        # it would take a third of the time, and none of these objects is in a cycle
    try:
        for some, sentences in read:
            refused += sentences
            for row in some:
                try:
                    rows.append(_placed(row, roots, listing))
                except ValueError as error:
                    refused.append(str(error))
    finally:
        gc.enable()
    if source.grouped:
        rows = _grouped(rows, refused)
    return rows, refused


def _read_file(source: Source, file: Path) -> tuple[list[Row], list[str]]:
    """As `read_rows`, of one file and without a look at the images."""
    name, rows, refused = shown(file), [], []
    try:
        items = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"{name} cannot be read as one JSON list; is it cut short, or not UTF-8? ({error})"]
    if not isinstance(items, list) or not items:
        return [], [f"{name} must hold a list of records and holds {shown(items)}"]
    for number, item in enumerate(items):
        image = item.get(source.keys[0]) if isinstance(item, dict) else None
        place = f"{name}, record {number} (the first is 0), image {shown(image)}"
        try:
            rows.append(_row(item, source, place))
        except ValueError as error:
            refused.append(f"{place}: {error}")
    return rows, refused


def _row(item, source: Source, place: str) -> Row:
    """Check one record. Raises ValueError saying what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError(f"a record must be an object with named fields, not {shown(item)}")
    image_key, captions_key, identity_key = source.keys
    image, captions = _field(item, image_key, str), _field(item, captions_key, str, list)
    identity = str(_field(item, identity_key, int, str))
    split = source.split or _field(item, "split", str)
    if split not in SPLITS:
        raise ValueError(f"unknown split {shown(split)}: it must be one of {', '.join(SPLITS)}")
    captions = _texts([captions] if isinstance(captions, str) else captions, "caption")
    boxes = phrases = ()
    if source.boxed or "boxes" in item:
        boxes = tuple(map(_box, _field(item, "boxes", list)))
        phrases = _texts(_field(item, "phrases", list), "phrase")
    if not captions or len(boxes) != len(phrases):
        raise ValueError(f"it has {len(captions)} captions, {len(boxes)} boxes and {len(phrases)} phrases")
    if not image or image[0] == "/" or "\\" in image or ".." in image.split("/"):
        raise ValueError("the path is empty, holds a backslash, or leads out of the image folder")
    return Row(split, identity, image, len(captions), place, pack(Record("", captions, 0, boxes, phrases)))


def _field(item: dict, key: str, *kinds: type):
    if key not in item:
        raise ValueError(f"the field {key!r} is missing")
    if type(item[key]) not in kinds:
        raise ValueError(f"the field {key!r} has the wrong type: {shown(item[key])}")
    return item[key]


def _texts(values: list, kind: str) -> tuple[str, ...]:
    """Stripped; half of a surrogate pair, which no file can hold, becomes a question mark."""
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
    left, right = cx - w / 2, cx + w / 2
    top, bottom = cy - h / 2, cy + h / 2
    if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
        return cx, cy, w, h
    outside = min(left, top) < -BOX_ROUNDING or max(right, bottom) > 1 + BOX_ROUNDING
    left, right = max(left, 0.0), min(right, 1.0)
    top, bottom = max(top, 0.0), min(bottom, 1.0)
    if outside or not (left < right and top < bottom):              # also where one of them is NaN
        raise ValueError(f"the box {shown(value)} is empty or leaves the image (cx, cy, w, h)")
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _placed(row: Row, roots: tuple[str, str], listing) -> Row:
    """The row with the path of its image, or `missing`. Raises ValueError if a symbolic link leads out of the folder.

    `listing` lists each folder once: asking the disk for each of 1.5 million files takes minutes.
    """
    below, _, name = row.path.rpartition("/")
    for root in roots:
        names = listing(root + below)
        if name in names and names[name]:
            raise ValueError(f"{row.place}: a symbolic link leads out of the image folder")
        if name in names:
            return row._replace(path=root + row.path)
    return row._replace(missing=True)


def _listing(folder: str, inside: tuple[str, ...]) -> dict[str, bool]:
    """{file name: does a symbolic link lead out of the folders `inside`}; empty for what is no folder."""
    def leads_out(path: str) -> bool:
        return not os.path.join(os.path.realpath(path), "").startswith(inside)

    try:
        away = leads_out(folder)
        with os.scandir(folder) as entries:
            return {entry.name: away or entry.is_symlink() and leads_out(entry.path)
                    for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}
    except (OSError, ValueError):
        return {}


def _grouped(rows: list[Row], refused: list[str]) -> list[Row]:
    """One row for each image, where the file has one record for each caption."""
    joined = {}
    for row in rows:
        before = joined.setdefault(row.path, row)
        if before.identity != row.identity:
            refused.append(f"{row.place}: identity {shown(row.identity)}, before {shown(before.identity)}")
        elif before is not row:
            one, other = before.record(), row.record()
            both = Record("", one.captions + other.captions, 0, one.boxes + other.boxes, one.phrases + other.phrases)
            joined[row.path] = before._replace(captions=len(both.captions), packed=pack(both))
    return list(joined.values())


def _choose(rows: list[Row], split: str, source: Source, allow_missing: bool, say) -> list[Row]:
    """The rows of a split whose image is there; a val split is held out of train where the set has none."""
    chosen = [row for row in rows if row.split == split]
    if source.hold_out and split != "test" and all(row.split != "val" for row in rows):
        train = [row for row in rows if row.split == "train"]
        held = _held_out(train)
        chosen = [row for row in train if (row.identity in held) == (split == "val")]
        say(f"without a val split: {len(held)} training identities, the same each time, are held out as val")
    if not chosen:
        few = "; to hold some out as val takes two training identities" if source.hold_out and split == "val" else ""
        raise UserError(f"{shown(source.files[0])} has no record for the split {split}{few}")
    missing = [row.place for row in chosen if row.missing]
    told = f"{len(missing)} of {len(chosen)} images are missing in {shown(source.images)}"
    if len(missing) == len(chosen) or (missing and not allow_missing):
        hint = "complete it" if allow_missing else "complete it or add --allow-missing"
        raise UserError(f"{told}; {hint}: {'; '.join(missing[:5])}")
    if missing:
        say(f"{told} and left out")
    return [row for row in chosen if not row.missing]


def _held_out(train: list[Row]) -> set[str]:
    """Identities for val: they depend on the training identities and their numbers of images alone."""
    images, held, count = Counter(row.identity for row in train), set(), 0
    for identity in random.Random(0).sample(sorted(images), math.ceil(VAL_SHARE * (len(images) - 1))):
        if count + images[identity] <= VAL_IMAGES:
            held.add(identity)
            count += images[identity]
    return held


def examined(path: str) -> tuple[str, int, int]:
    """Why an image does not decode ("" if it does), its width and height in pixels (0 if it does not)."""
    try:        # in this file, since check.py loads torch, which the processes that decode images do without
        return "", *open_image(path).size
    except UserError as error:
        return str(error), 0, 0
