"""One record type and a reader for every annotation format of the field.

Whatever is wrong in a file is found while it is read, and told in one sentence, so that later code trusts a `Record`.
Boxes and phrases are those of the SDA set of the MRA paper. show/check.py lists all that is wrong at once.
Read next: augment.py.
"""

import gc
import json
import marshal
import math
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data import Box, in_processes
from mra.data.files import shown

SPLITS = ("train", "val", "test")
BOX_ROUNDING = 1e-3                 # a box may leave the image by this fraction; it is clipped
VAL_SHARE, VAL_IMAGES = 0.1, 1000   # a val split made from train: share of the identities, most images

_LAYOUTS = {    # folder of the images | file of all splits, its image key | files of one split each | training parts
    "cuhk": ("CUHK-PEDES", "CUHK-PEDES/reid_raw.json", "file_path", ("finetune/cuhk_{}.json",), ""),
    "icfg": ("ICFG-PEDES", "ICFG-PEDES/ICFG[-_]PEDES.json", "file_path", ("finetune/icfg_{}.json",), ""),
    "rstp": ("RSTPReid", "RSTPReid/data_captions.json", "img_path", ("finetune/rstp_{}.json",), ""),
    "sda": ("SDA", "", "", ("SDA/finetune/sda_{}.json",), "SDA/sda_*.json"),
    "mals": ("MALS", "", "", (), "MALS/g_*_attrs.json"),
}
_OWN = ("", "", "", ("{}.json", "*_{}.json"), "*.json")     # below the user's folder
DATASETS = tuple(_LAYOUTS)
NOT_RECORDS = ("report.json", "report.key.json", "parts.key.json", "gap.json", "town.json")  # reports and keys


@dataclass(frozen=True, slots=True)
class Record:
    """One image; its path is proven to lie inside the image root."""
    path: str
    captions: tuple[str, ...]
    identity: int                   # 0 .. K-1 within its RecordSet
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()   # parallel to boxes, where there are any


class Packed(Sequence):
    """Records in one buffer, unpacked on access. A forked process would copy the pages of objects that it looks at."""

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
    files: tuple[Path, ...]
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
    place: str                      # for messages: annotation file, record number, image as it stands there
    packed: bytes                   # `said`, small: 1.2 million rows are held while a set is read

    @property
    def said(self) -> dict[str, tuple]:
        """The captions, boxes and phrases, by these names."""
        return marshal.loads(self.packed)


def load(dataset: str, split: str, data_root: Path, allow_missing: bool = False, say=print) -> RecordSet:
    """Read a split of one of DATASETS under `data_root`, or of the folder `dataset`. Raises UserError.

    A set without a val split (all but cuhk and rstp) gets one from its training identities, always the same ones;
    train leaves them out. `allow_missing` drops the records whose image is missing.
    """
    return load_splits(dataset, (split,), data_root, allow_missing, say)[0]


def load_splits(dataset: str, splits: tuple[str, ...], data_root: Path, allow_missing: bool = False,
                say=print) -> list[RecordSet]:
    """`load` of several splits; the files that two of them share are read once."""
    sets, rows_of = [], {}
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"unknown split {shown(split)}: choose one of {', '.join(SPLITS)}")
        source = locate(dataset, split, Path(data_root))
        if source not in rows_of:
            rows_of[source], refused = read_rows(source)
            if refused:
                raise UserError(refused[0])
        rows = _choose(rows_of[source], split, source, allow_missing, say)
        ids = {identity: i for i, identity in enumerate(dict.fromkeys(row.identity for row in rows))}
        records = Packed(Record(row.path, identity=ids[row.identity], **row.said) for row in rows)
        if (source.images / "town.json").is_file():
            say(f"{shown(source.images)} is drawn data, not photographs.")
        more = f" and {len(source.files) - 1} more" if len(source.files) > 1 else ""
        say(f"{shown(dataset)} {split}: {len(rows)} images, {sum(row.captions for row in rows)} captions, "
            f"{len(ids)} identities, read from {shown(source.files[0])}{more}")
        sets.append(RecordSet(dataset, split, records))
    return sets


def share_of(whole: RecordSet, share: float) -> RecordSet:
    """A share of its identities, at least two: the same ones each time, a smaller share within a larger."""
    if share == 1:
        return whole
    count = 1 + max(record.identity for record in whole.records)
    chosen = random.Random(0).sample(range(count), count)[:max(2, round(share * count))]
    place = {identity: i for i, identity in enumerate(sorted(chosen))}
    return replace(whole, records=Packed(replace(record, identity=place[record.identity])
                                         for record in whole.records if record.identity in place))


def locate(dataset: str, split: str, root: Path) -> Source:
    """The file of all splits where there is one, else that of the split, else the parts. Raises UserError."""
    own = dataset not in DATASETS
    base = Path(dataset) if own else root
    folder, raw, image_key, patterns, parts = _LAYOUTS.get(dataset, _OWN)
    images, carve = base / folder, dataset not in ("cuhk", "rstp")
    if not images.is_dir():
        raise UserError(f"no folder {shown(images)}: a data set is one of {', '.join(DATASETS)} or a folder")
    if found := _files(base, raw):
        return Source(found[:1], images, None, carve, (image_key, "captions", "id"))
    stored = {name: _files(base, *patterns, split=name) for name in SPLITS}
    carve = carve and not stored["val"]
    wanted = "train" if carve and split == "val" else split         # val is held out of train
    if len(stored[wanted]) > 1:
        raise UserError(f"{shown(images)} holds more than one {wanted} file: keep one data set in a folder")
    if stored[wanted]:
        return Source(stored[wanted], images, wanted, carve, grouped=own or wanted == "train")
    parts = parts if wanted == "train" else ""
    mixed = dataset == "sda" or not any(stored.values())            # parts beside the files of other splits
    if mixed and (found := _files(base, parts)):
        return Source(found, images, wanted, carve, boxed=dataset != "mals")
    sought = " or ".join(filter(None, (raw, *patterns, parts))).replace("{}", wanted)
    hint = ""
    if (images / "caption_all.json").is_file():
        hint = "; caption_all.json is there but names no splits: ask the owners of the set for reid_raw.json"
    raise UserError(f"{shown(dataset)} has no {split} split: in {shown(base)} is no {sought or 'file of it'}{hint}")


def _files(base: Path, *patterns: str, split: str = "") -> tuple[Path, ...]:
    """Sorted as people count: part_2 before part_10."""
    found = [file for pattern in patterns if pattern for file in base.glob(pattern.format(split))
             if not file.name.startswith(".") and file.name not in NOT_RECORDS]
    return tuple(sorted(found, key=lambda file: re.sub(r"\d+", lambda run: run[0].zfill(20), file.name)))


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """All records of all files, of every split they hold; a sentence for each that cannot be used."""
    workers = min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(source.files) // 8)
    read = in_processes(partial(_read_file, source), source.files, workers, start="fork")      # they only read text
    rows, refused = [], []
    gc.disable()        # it would look through millions of objects again and again, none in a cycle
    try:
        for row in _placed(chain.from_iterable(read), source.images):
            (refused if isinstance(row, str) else rows).append(row)
    finally:
        gc.enable()
    if source.grouped:
        rows = _grouped(rows, refused)
    return rows, refused


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
    packed = marshal.dumps({"captions": captions, "boxes": boxes, "phrases": phrases})
    return Row(split, identity, image, False, len(captions), place, packed)


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


def _grouped(rows: list[Row], refused: list[str]) -> list[Row]:
    """One row an image, where the file has one a caption."""
    joined = {}
    for row in rows:
        before = joined.setdefault(row.path, row)
        if before.identity != row.identity:
            refused.append(f"{row.place}: identity {shown(row.identity)}, before {shown(before.identity)}")
        elif before is not row:
            said = {name: values + row.said[name] for name, values in before.said.items()}
            joined[row.path] = before._replace(captions=len(said["captions"]), packed=marshal.dumps(said))
    return list(joined.values())


def _choose(rows: list[Row], split: str, source: Source, allow_missing: bool, say) -> list[Row]:
    """The rows of a split whose image is there; a val split is held out of train where the set has none.

    Who is held out depends on the training identities and their numbers of images alone.
    """
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
    missing = [row.place for row in chosen if row.missing]
    told = f"{len(missing)} of {len(chosen)} images are missing in {shown(source.images)}"
    if len(missing) == len(chosen) or (missing and not allow_missing):
        hint = "complete it" if allow_missing else "complete it or add --allow-missing"
        raise UserError(f"{told}; {hint}: {'; '.join(missing[:5])}")
    if missing:
        say(f"{told} and left out")
    return [row for row in chosen if not row.missing]


def _placed(rows: Iterable[Row | str], folder: Path) -> Iterator[Row | str]:
    """The rows with the path of their image, `missing` if there is none; a sentence if a link leads out of `folder`.

    Each folder is listed once: asking the disk for each of 1.2 million files takes minutes.
    """
    roots = f"{folder}/imgs/", f"{folder}/"
    listing = cache(partial(_listing, inside=tuple(os.path.join(os.path.realpath(root), "") for root in roots)))
    for row in rows:
        if isinstance(row, Row):
            below, _, name = row.path.rpartition("/")
            for root in roots:
                leads_out = listing(root + below).get(name)
                if leads_out is not None:
                    break
            if leads_out is None:
                row = row._replace(missing=True)
            elif leads_out:
                row = f"{row.place}: a symbolic link leads out of the image folder"
            else:
                row = row._replace(path=root + row.path)
        yield row


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
