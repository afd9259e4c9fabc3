"""From annotation files to a RecordSet: find the files of a split, read them, check every record, choose the split.

A benchmark has one file of all splits, or the released files of one split each. SDA and MALS have parts, and every part
is training data. Whatever is wrong in a file is said here in one sentence, so the method trusts a `Record`. A row of
LAYOUTS adds a format; a set to pretrain on is also named in config.pretrains. Read next: check.py.
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
from mra.data.files import quoted
from mra.data.records import Box, Record, RecordSet

SPLITS = ("train", "val", "test")
# The names of a field in the different formats.
IMAGE, CAPTIONS, IDENTITY = ("image", "file_path", "img_path"), ("caption", "captions"), ("image_id", "id")
VAL_SHARE, VAL_IMAGES = 0.1, 1000   # a val split made from train: share of the identities, most images


class Layout(NamedTuple):
    """Paths below the data root; `{}` stands for the split, `*` for any text."""
    images: str                         # folder of the images
    whole: str = ""                     # the file of all splits
    of_split: str = ""                  # files of one split each
    parts: str = ""                     # files that share the training data
    has_val: bool = False               # without a val split, training identities are held out


LAYOUTS = {
    "cuhk": Layout("CUHK-PEDES", "CUHK-PEDES/reid_raw.json", "finetune/cuhk_{}.json", has_val=True),
    "icfg": Layout("ICFG-PEDES", "ICFG-PEDES/ICFG[-_]PEDES.json", "finetune/icfg_{}.json"),
    "rstp": Layout("RSTPReid", "RSTPReid/data_captions.json", "finetune/rstp_{}.json", has_val=True),
    "sda": Layout("SDA", of_split="SDA/finetune/sda_{}.json", parts="SDA/sda_*.json"),
    "mals": Layout("MALS", parts="MALS/g_*_attrs.json"),
}
OWN = Layout("", of_split="{}.json", parts="sda_*.json")     # below the user's folder
DATASETS = tuple(LAYOUTS)


class Source(NamedTuple):
    """The annotation files of one split, and how to read them."""
    files: list[Path]
    images: Path
    split: str | None               # None: every record names its own
    hold_out: bool                  # if no record is of val, hold out training identities
    grouped: bool = False           # an image may have one record for each caption: join them


class Row(NamedTuple):
    """A checked record of any split."""
    split: str
    identity: str                   # in the annotation file
    place: str                      # for messages: annotation file, record number, image
    missing: bool                   # the image is not there; the record's path is then that of the annotation file
    record: Record                  # with identity 0


def load(dataset: str, split: str, data_root: Path, allow_missing: bool = False, say=print) -> RecordSet:
    """Read a split of one of DATASETS under `data_root`, or of the folder `dataset`. Raises UserError.

    A set without a val split gets one from its training identities; train leaves them out. `allow_missing` drops the
    records whose image is missing. Only val and test may hold records without a caption, or without an image.
    """
    source = locate(dataset, split, Path(data_root))
    rows, refused = read_rows(source)
    if refused:
        raise UserError(refused[0])
    rows = _of_split(rows, split, source, say)
    images = [row for row in rows if row.record.path]
    missing = [row.place for row in images if row.missing]
    if missing:
        told = f"{len(missing)} of {len(images)} images are missing in {quoted(source.images)} and its folder imgs"
        advice = "; --allow-missing of train.py and evaluate.py drops some" if len(missing) < len(images) else ""
        if not advice or not allow_missing:
            raise UserError(f"{told}{advice}: {'; '.join(missing[:5])}")
        say(f"{told}, and are left out")
        rows, images = ([row for row in some if not row.missing] for some in (rows, images))
    if {row.identity for row in rows if row.record.captions}.isdisjoint(row.identity for row in images):
        raise UserError(f"{quoted(source.files[0])}: in the split {split} no caption is of a person with an image")
    numbers = {identity: i for i, identity in enumerate(dict.fromkeys(row.identity for row in rows))}
    records = [replace(row.record, identity=numbers[row.identity]) for row in rows]
    captions = sum(len(record.captions) for record in records)
    drawn = " (drawn data, not photographs)" if (source.images / "town.json").is_file() else ""
    others = " and others" if len(source.files) > 1 else ""
    say(f"{quoted(dataset)} {split}: {len(images)} images, {captions} captions, {len(numbers)} identities, "
        f"read from {quoted(source.files[0])}{others}{drawn}")
    return RecordSet(dataset, split, records)


def locate(dataset: str, split: str, root: Path) -> Source:
    """The file of all splits if there is one, else the file of the split, else the parts. Raises UserError."""
    layout = LAYOUTS.get(dataset, OWN)
    base = Path(dataset) if layout is OWN else root
    images = base / layout.images
    if not images.is_dir():
        raise UserError(f"no folder {quoted(images)}: a data set is one of {', '.join(DATASETS)} or a folder")
    whole = _files(base, layout.whole)
    if whole:
        return Source(whole[:1], images, None, not layout.has_val)
    hold_out = not layout.has_val and not _files(base, layout.of_split.format("val"))
    wanted = "train" if hold_out and split == "val" else split
    of_split = _files(base, layout.of_split.format(wanted))
    parts = layout.parts if wanted == "train" else ""
    files = of_split or _files(base, parts)
    if files:
        return Source(files, images, wanted, hold_out, grouped=files is of_split)
    sought = [path.format(wanted) for path in (layout.whole, layout.of_split, parts) if path]
    hint = ""
    if (images / "caption_all.json").is_file():
        hint = "; caption_all.json is there but names no splits: ask the owners of the set for reid_raw.json"
    raise UserError(f"{quoted(dataset)} has no {split} split: in {quoted(base)} is no "
                    f"{' or '.join(sought) or 'file of it'}{hint}")


def _files(base: Path, pattern: str) -> list[Path]:
    """The files of a pattern in alphabetical order; none if the pattern is empty."""
    return sorted(base.glob(pattern)) if pattern else []


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """All records of all files, of every split they hold; a sentence for each that cannot be used."""
    rows, refused, listing = {}, [], cache(_files_in)       # rows by image where they are joined, else by number
    for file in source.files:
        name = quoted(file)
        try:
            items = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            refused.append(f"{name} cannot be read as one JSON list; is it cut short, or not UTF-8? ({error})")
            continue
        if not isinstance(items, list) or not items:
            refused.append(f"{name} must hold a list of records and holds {quoted(items)}")
            continue
        for number, item in enumerate(items):
            named = item if isinstance(item, dict) else {}
            image = next((named[key] for key in IMAGE if key in named), None)
            place = f"{name}, record {number} (the first is 0), image {quoted(image)}"
            try:
                row = _row(item, source, place, listing)
                key = row.record.path if source.grouped and row.record.path else len(rows)
                rows[key] = _joined(rows[key], row) if key in rows else row
            except ValueError as error:
                refused.append(f"{place}: {error}")
    return list(rows.values()), refused


def _row(item, source: Source, place: str, listing) -> Row:
    """Check one record and look for its image. Raises ValueError saying what is wrong with the record."""
    if not isinstance(item, dict):
        raise ValueError(f"a record must be an object with named fields, not {quoted(item)}")
    image = _field(item, IMAGE, str, type(None)) or ""
    captions = _field(item, CAPTIONS, str, list)
    identity = str(_field(item, IDENTITY, int, str))
    split = source.split or _field(item, ("split",), str)
    if split not in SPLITS:
        raise ValueError(f"unknown split {quoted(split)}: it must be one of {', '.join(SPLITS)}")
    captions = _texts([captions] if isinstance(captions, str) else captions, "caption")
    boxes = phrases = ()
    if "boxes" in item or "phrases" in item:
        boxes = tuple(map(_box, _field(item, ("boxes",), list)))
        phrases = _texts(_field(item, ("phrases",), list), "phrase")
    if len(boxes) != len(phrases):
        raise ValueError(f"it has {len(boxes)} boxes and {len(phrases)} phrases")
    if not (image or captions) or split == "train" and not (image and captions):
        raise ValueError("it needs an image and a caption; in val and test one of the two is enough")
    if image.startswith("/") or "\\" in image or ".." in image.split("/"):
        raise ValueError("the path holds a backslash, or leads out of the image folder")
    below, _, name = image.rpartition("/")
    found = [root + image for root in (f"{source.images}/imgs/", f"{source.images}/") if name in listing(root + below)]
    path = found[0] if found else image
    missing = image != "" and not found
    return Row(split, identity, place, missing, Record(path, captions, 0, boxes, phrases))


def _joined(before: Row, row: Row) -> Row:
    """Two rows of one image, of a file with one record for each caption, as one row."""
    if before.identity != row.identity:
        raise ValueError(f"identity {quoted(row.identity)}, but {quoted(before.identity)} in {before.place}")
    one, two = before.record, row.record
    return before._replace(record=replace(one, captions=one.captions + two.captions, boxes=one.boxes + two.boxes,
                                          phrases=one.phrases + two.phrases))


def _files_in(folder: str) -> set[str]:
    """The names of its files. To ask for each of 1.5 million images on a network disk takes hours."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}
    except (OSError, ValueError):       # no such folder
        return set()


def _field(item: dict, names: tuple[str, ...], *kinds: type):
    """The field that has one of these names. Raises ValueError where it is missing or of another type."""
    for name in names:
        if name in item:
            if type(item[name]) not in kinds:
                raise ValueError(f"the field {name!r} has the wrong type: {quoted(item[name])}")
            return item[name]
    raise ValueError(f"the field {' or '.join(map(repr, names))} is missing")


def _texts(values: list, kind: str) -> tuple[str, ...]:
    """The texts stripped; half of a surrogate pair, which no file can hold, becomes a question mark."""
    for value in values:
        if not isinstance(value, str) or not any(map(str.isalnum, value)):
            raise ValueError(f"a {kind} is empty or not text: {quoted(value)}")
    return tuple([value.strip().encode(errors="replace").decode() for value in values])


def _box(value) -> Box:
    """Check a box, and clip it to the image: the boxes of a detector may reach over its edges."""
    if not (isinstance(value, list) and len(value) == 4
            and all(type(number) in (int, float) and abs(number) <= 2 for number in value)):
        raise ValueError(f"a box must be four fractions cx, cy, w, h of the image, not {quoted(value)}")
    cx, cy, w, h = value
    edges = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    clipped = [min(max(edge, 0.0), 1.0) for edge in edges]
    left, top, right, bottom = clipped
    if left >= right or top >= bottom:
        raise ValueError(f"the box {quoted(value)} is empty, or beside the image (cx, cy, w, h)")
    if clipped == edges:
        return cx, cy, w, h
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _of_split(rows: list[Row], split: str, source: Source, say) -> list[Row]:
    """The rows of a split. Where a set has no val split, some training identities become val, always the same ones."""
    if source.hold_out and split != "test" and all(row.split != "val" for row in rows):
        train = [row for row in rows if row.split == "train"]
        images, held, count = Counter(row.identity for row in train), set(), 0
        for identity in random.Random(0).sample(sorted(images), math.ceil(VAL_SHARE * (len(images) - 1))):
            if count + images[identity] <= VAL_IMAGES:
                held.add(identity)
                count += images[identity]
        chosen = [row for row in train if (row.identity in held) == (split == "val")]
        say(f"without a val split: {len(held)} training identities, the same each time, are held out as val")
    else:
        chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise UserError(f"{quoted(source.files[0])} has no record for the split {split}")
    return chosen
