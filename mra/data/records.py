"""One record type and a reader for every annotation format of the field.

All that can be wrong in a file is found while it is read and told in one sentence, so that code further on trusts a
`Record`. Boxes and phrases are those of the SDA set of the MRA paper.
Read before: config.py (UserError). After: check.py, which lists all that is wrong at once; augment.py.
"""

import gc
import io
import json
import marshal
import math
import os
import random
import re
import reprlib
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mra.config import UserError, replacing
from mra.data import Box, in_processes

SPLITS = ("train", "val", "test")
BOX_ROUNDING = 1e-3                 # a box may leave the image by this fraction; it is clipped
VAL_SHARE, VAL_IMAGES = 0.1, 1000   # a val split made from train: share of the identities, most images
PIXEL_LIMIT = 50_000_000            # a larger picture is no pedestrian crop and endangers the memory
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")

_LAYOUTS = {    # images (a level imgs may follow) | raw file, its image key | a file a split | parts
    "cuhk": ("CUHK-PEDES", "CUHK-PEDES/reid_raw.json", "file_path", ("finetune/cuhk_{}.json",), ""),
    "icfg": ("ICFG-PEDES", "ICFG-PEDES/ICFG[-_]PEDES.json", "file_path", ("finetune/icfg_{}.json",), ""),
    "rstp": ("RSTPReid", "RSTPReid/data_captions.json", "img_path", ("finetune/rstp_{}.json",), ""),
    "sda": ("SDA", "", "", ("SDA/finetune/sda_{}.json",), "SDA/sda_*.json"),
    "mals": ("MALS", "", "", (), "MALS/g_*_attrs.json"),
}
_OWN = ("", "", "", ("{}.json", "*_{}.json"), "*.json")     # below the user's folder
DATASETS = tuple(_LAYOUTS)
NOT_RECORDS = ("report.json", "town.json")      # what adapt.py and the town say about a set, beside its records


@dataclass(frozen=True, slots=True)
class Record:
    """One image; its path is proven to lie inside the image root."""
    path: str
    captions: tuple[str, ...]
    identity: int                   # 0 .. K-1 within its RecordSet
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()   # parallel to boxes, where there are any


class Packed(Sequence):
    """Records in one buffer, unpacked when asked for: to look at an object is to copy it into the loading process."""

    def __init__(self, records: Iterable[Record]):
        self.buffer, self.ends = bytearray(), array("Q", [0])
        for one in records:
            self.buffer += marshal.dumps((one.path, one.captions, one.identity, one.boxes, one.phrases))
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Record:
        place = range(len(self))[index]
        return Record(*marshal.loads(memoryview(self.buffer)[self.ends[place]:self.ends[place + 1]]))


@dataclass(frozen=True)
class RecordSet:
    """One split, in the order of its annotation files."""
    name: str
    split: str
    records: Sequence[Record]


class Source(NamedTuple):
    """The annotation files to read for one split, and how."""
    files: list[Path]
    images: Path
    split: str | None               # None: every record names its own
    carve: bool                     # where no record is of val, hold out training identities
    keys: tuple[str, str, str] = ("image", "caption", "image_id")
    grouped: bool = False           # may hold one record a caption: join those of one image
    boxed: bool = False             # every record must have boxes and phrases; elsewhere it may


class Row(NamedTuple):
    """A checked record of any split."""
    split: str
    identity: str
    path: str
    missing: bool
    captions: int                   # how many
    body: bytes                     # captions, boxes and phrases, small: 1.2 million are held while a set is read
    place: str                      # for messages: annotation file, record number, image as it stands there

    @property
    def said(self) -> tuple[tuple[str, ...], tuple[Box, ...], tuple[str, ...]]:
        """Captions, boxes and phrases."""
        return marshal.loads(self.body)


def load(dataset: str, split: str, data_root: Path, allow_missing: bool = False, say=print) -> RecordSet:
    """Read a split of one of DATASETS under `data_root`, or of the folder `dataset`. Raises UserError.

    A set without a val split (all but cuhk and rstp) gets one from its training identities, always the same
    ones; train leaves them out. `allow_missing` drops the records whose image is missing.
    """
    return load_splits(dataset, (split,), data_root, allow_missing, say)[0]


def load_splits(dataset: str, splits: tuple[str, ...], data_root: Path, allow_missing: bool = False,
                say=print) -> list[RecordSet]:
    """`load` of several splits; the files that two of them share are read once."""
    sets, before, rows = [], None, []
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"unknown split {shown(split)}: choose one of {', '.join(SPLITS)}")
        source = locate(dataset, split, Path(data_root))
        if source != before:
            before, (rows, refused) = source, read_rows(source)
            if refused:
                raise UserError(refused[0])
        sets.append(_record_set(dataset, split, source, rows, allow_missing, say))
    return sets


def _record_set(dataset: str, split: str, source: Source, rows: list[Row], allow_missing: bool, say) -> RecordSet:
    rows = _choose(rows, split, source, say)
    missing = [row.place for row in rows if row.missing]
    if missing:
        told = f"{len(missing)} of {len(rows)} images are missing in {shown(source.images)}"
        if not allow_missing or len(missing) == len(rows):
            hint = "complete it" if allow_missing else "complete it or add --allow-missing"
            raise UserError(f"{told}; {hint}: {'; '.join(missing[:5])}")
        say(f"{told} and left out")
        rows = [row for row in rows if not row.missing]
    ids = {identity: i for i, identity in enumerate(dict.fromkeys(row.identity for row in rows))}
    records = Packed(Record(row.path, captions, ids[row.identity], boxes, phrases)
                     for row in rows for captions, boxes, phrases in [row.said])
    more = f" and {len(source.files) - 1} more" if source.files[1:] else ""
    if (source.images / "town.json").is_file():
        say(f"{shown(source.images)} is drawn data, not photographs.")
    say(f"{shown(dataset)} {split}: {len(rows)} images, {sum(row.captions for row in rows)} captions, "
        f"{len(ids)} identities, read from {shown(source.files[0])}{more}")
    return RecordSet(dataset, split, records)


def share_of(whole: RecordSet, share: float) -> RecordSet:
    """A share of its identities, at least two: the same ones each time, a smaller share within a larger."""
    if share == 1:
        return whole
    count = 1 + max(record.identity for record in whole.records)
    chosen = random.Random(0).sample(range(count), count)[:max(2, round(share * count))]
    place = {identity: i for i, identity in enumerate(sorted(chosen))}
    return replace(whole, records=Packed(replace(record, identity=place[record.identity])
                                         for record in whole.records if record.identity in place))


def shown(value) -> str:
    """`value` fit for a terminal: quoted, control characters escaped, cut at 80 (a Path is not)."""
    text = repr(str(value)) if isinstance(value, (str, Path)) else reprlib.repr(value)
    return text if len(text) <= 80 or isinstance(value, Path) else text[:80] + "..."


def locate(dataset: str, split: str, root: Path) -> Source:
    """The raw file where there is one, else the processed file of the split, else the parts. Raises UserError."""
    base = root if dataset in DATASETS else Path(dataset)
    name, raw, image_key, processed, parts = _LAYOUTS.get(dataset, _OWN)
    images, carve = base / name, dataset not in ("cuhk", "rstp")
    if not images.is_dir():
        raise UserError(f"no folder {shown(images)}: a data set is one of {', '.join(DATASETS)} or a folder")
    if files := _files(base, raw):
        return Source(files[:1], images, None, carve, (image_key, "captions", "id"))
    stored = {s: _files(base, *(pattern.format(s) for pattern in processed)) for s in SPLITS}
    carve = carve and not stored["val"]         # val is then held out of train, and read from train's files
    wanted = "train" if carve and split == "val" else split
    if len(stored[wanted]) > 1:
        raise UserError(f"{shown(images)} holds more than one {wanted} file: keep one data set in a folder")
    if stored[wanted]:
        return Source(stored[wanted], images, wanted, carve, grouped=wanted == "train" or dataset not in DATASETS)
    mixed = dataset == "sda" or not any(stored.values())
    if wanted == "train" and mixed and (files := _files(base, parts)):
        return Source(files, images, "train", carve, boxed=dataset != "mals")
    sought = [raw, *(pattern.format(wanted) for pattern in processed), parts * (wanted == "train")]
    hint = "; caption_all.json is there but names no splits: ask the owners of the set for reid_raw.json"
    raise UserError(f"{shown(dataset)} has no {split} split: in {shown(base)} is no "
                    f"{' or '.join(filter(None, sought)) or 'file of it'}"
                    + hint * (images / "caption_all.json").is_file())


def _files(base: Path, *patterns: str) -> list[Path]:
    """Sorted as people count: part_2 before part_10."""
    found = (file for pattern in filter(None, patterns) for file in base.glob(pattern)
             if not file.name.startswith(".") and file.name not in NOT_RECORDS)
    return sorted(found, key=lambda file: re.sub(r"\d+", lambda run: run[0].zfill(20), file.name))


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """All records of all files, of every split they hold; a sentence for each that cannot be used."""
    images, rows, refused = _Images(source.images), [], []
    workers = min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(source.files) // 8)
    read = in_processes(partial(_read_file, source), source.files, workers, start="fork")      # they only read text
    gc.disable()        # it would look through millions of objects again and again, none in a cycle
    try:
        for row in map(images.placed, chain.from_iterable(read)):
            (refused if isinstance(row, str) else rows).append(row)
    finally:
        gc.enable()
    return _grouped(rows, refused) if source.grouped else rows, refused


def _read_file(source: Source, file: Path) -> list[Row | str]:
    """A file's records, their images not looked for yet; in place of one that cannot be used, a sentence."""
    name, rows = shown(file), []
    try:
        items = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return [f"{name} cannot be read as one JSON list; is it cut short, or not UTF-8? ({error})"]
    if not isinstance(items, list) or not items:
        return [f"{name} must hold a list of records and holds {shown(items)}"]
    for number, item in enumerate(items):
        image = item.get(source.keys[0]) if isinstance(item, dict) else None
        place = f"{name}, record {number} (the first is 0), image {shown(image)}"
        try:
            rows.append(_row(item, source, place))
        except ValueError as error:
            rows.append(f"{place}: {error}")
    return rows


def _row(item, source: Source, place: str) -> Row:
    """Check one record but for its path. Raises ValueError saying what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError(f"a record must be an object with named fields, not {shown(item)}")
    image_key, captions_key, identity_key = source.keys
    image, captions = _field(item, image_key, str), _field(item, captions_key, str, list)
    identity = str(_field(item, identity_key, int, str))
    split = source.split or _field(item, "split", str)
    if split not in SPLITS:
        raise ValueError(f"unknown split {shown(split)}: it must be one of {', '.join(SPLITS)}")
    captions = _texts([captions] if isinstance(captions, str) else captions, "caption")
    boxed = source.boxed or "boxes" in item
    boxes = tuple(map(_box, _field(item, "boxes", list))) if boxed else ()
    phrases = _texts(_field(item, "phrases", list), "phrase") if boxed else ()
    if not captions or len(boxes) != len(phrases):
        raise ValueError(f"it has {len(captions)} captions, {len(boxes)} boxes and {len(phrases)} phrases")
    return Row(split, identity, image, False, len(captions), marshal.dumps((captions, boxes, phrases)), place)


def _field(item: dict, key: str, *kinds: type):
    if key not in item:
        raise ValueError(f"the field {key!r} is missing")
    if type(item[key]) not in kinds:
        raise ValueError(f"the field {key!r} has the wrong type: {shown(item[key])}")
    return item[key]


def _texts(values: list, kind: str) -> tuple[str, ...]:
    """Stripped; half of a surrogate pair, which no file can hold, becomes a question mark."""
    for value in values:
        if not isinstance(value, str) or not (value[:1].isalnum() or any(map(str.isalnum, value))):
            raise ValueError(f"a {kind} is empty or not text: {shown(value)}")
    return tuple([value.strip() if value.isascii() else value.strip().encode(errors="replace").decode()
                  for value in values])


def _box(value) -> Box:
    """Check a box, and clip what rounding put outside the image."""
    if not (isinstance(value, list) and len(value) == 4 and set(map(type, value)) <= {int, float}
            and abs(min(value)) <= 2 and abs(max(value)) <= 2):
        raise ValueError(f"a box must be four fractions cx, cy, w, h of the image, not {shown(value)}")
    cx, cy, w, h = value
    left, top, right, bottom = edges = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
        return cx, cy, w, h
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in edges)
    if not (left < right and top < bottom) or min(edges) < -BOX_ROUNDING or max(edges) > 1 + BOX_ROUNDING:
        raise ValueError(f"the box {shown(value)} is empty or leaves the image (cx, cy, w, h)")
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _grouped(rows: list[Row], refused: list[str]) -> list[Row]:
    """One row an image, where the file has one a caption."""
    joined = {}
    for row in rows:
        before = joined.setdefault(row.path, row)
        if before.identity != row.identity:
            refused.append(f"{row.place}: identity {shown(row.identity)}, before {shown(before.identity)}")
        elif before is not row:
            said = tuple(one + other for one, other in zip(before.said, row.said))
            joined[row.path] = before._replace(captions=before.captions + row.captions, body=marshal.dumps(said))
    return list(joined.values())


def _choose(rows: list[Row], split: str, source: Source, say) -> list[Row]:
    """The rows of a split; whom val holds out of train depends on the identities and their numbers of images alone."""
    chosen = [row for row in rows if row.split == split]
    if source.carve and split != "test" and all(row.split != "val" for row in rows):
        train = [row for row in rows if row.split == "train"]
        images, held, count = Counter(row.identity for row in train), set(), 0
        for identity in random.Random(0).sample(sorted(images), math.ceil(VAL_SHARE * (len(images) - 1))):
            if count + images[identity] <= VAL_IMAGES:
                held.add(identity)
                count += images[identity]
        chosen = [row for row in train if (row.identity in held) == (split == "val")]
        say(f"without a val split: {len(held)} training identities, the same each time, are held out as val")
    if not chosen:
        few = "; to hold some out as val takes two training identities" if source.carve and split == "val" else ""
        raise UserError(f"{shown(source.files[0])} has no record for the split {split}{few}")
    return chosen


class _Images:
    """Finds images by listing each folder once: asking the disk for each of 1.2 M files takes minutes."""

    def __init__(self, folder: Path):
        self.roots = (f"{folder}/imgs/", f"{folder}/")
        self.inside = tuple(os.path.join(os.path.realpath(root), "") for root in self.roots)
        self.listed = {}

    def placed(self, row: Row | str) -> Row | str:
        """The row with the path of its image, `missing` if there is none; a sentence if it lies outside."""
        if isinstance(row, str):
            return row
        image = row.path
        if not image or image[0] == "/" or "\\" in image or ".." in image and ".." in image.split("/"):
            return f"{row.place}: the path is empty, holds a backslash, or leads out of the image folder"
        folder, _, name = image.rpartition("/")
        if folder not in self.listed:
            self.listed[folder] = [self._list(root + folder) for root in self.roots]
        for root, names in zip(self.roots, self.listed[folder]):
            if names.get(name):
                return f"{row.place}: a symbolic link leads out of the image folder"
            if name in names:
                return row._replace(path=root + image)
        return row._replace(missing=True)

    def _list(self, folder: str) -> dict[str, bool]:
        """{file name: does a symbolic link lead out of the image folder}; empty for what is no folder"""
        try:
            away = self._leads_out(folder)
            with os.scandir(folder) as entries:
                return {entry.name: away or entry.is_symlink() and self._leads_out(entry.path)
                        for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}
        except (OSError, ValueError):
            return {}

    def _leads_out(self, path: str) -> bool:
        return not os.path.join(os.path.realpath(path), "").startswith(self.inside)


def open_image(path) -> Image.Image:
    """The first frame as RGB, upright, on white where transparent. Raises UserError naming the file."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode == "F":
                raise ValueError("its pixels are fractions, of a range that nothing tells")
            image.load()
            with suppress(Exception):       # broken EXIF does not spoil the pixels
                image = ImageOps.exif_transpose(image)
            return _rgb(image)
    except Exception as error:      # decoders raise almost every type on broken data
        raise UserError(f"the image {shown(Path(path))} cannot be read: {shown(str(error))}") from error


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Write a PNG or JPEG, complete or not at all; Pillow itself does not notice a disk that fills up."""
    packed = io.BytesIO()
    image.save(packed, {".png": "PNG", ".jpg": "JPEG"}[path.suffix], **options)
    with replacing(path) as scratch:
        scratch.write_bytes(packed.getvalue())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):      # 16 bits, which convert() would clip
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
