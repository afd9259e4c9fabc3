"""Where the annotation files of a data set lie, and which of them hold a split.

A benchmark has one file of all splits, or the released files of one split each. SDA and MALS have parts, all of them
training data. Read next: read.py.
"""

import re
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data.files import shown

SPLITS = ("train", "val", "test")
NOT_RECORDS = ("report.json", "report.key.json", "parts.key.json", "gap.json", "town.json")  # reports and keys


class Layout(NamedTuple):
    """Paths below the data root; `{}` stands for the split."""
    images: str                         # folder of the images
    all_splits: str = ""                # the file of all splits
    image_key: str = ""                 # names the image in that file
    of_split: tuple[str, ...] = ()      # files of one split each
    parts: str = ""                     # files that share the training data


LAYOUTS = {
    "cuhk": Layout("CUHK-PEDES", "CUHK-PEDES/reid_raw.json", "file_path", ("finetune/cuhk_{}.json",)),
    "icfg": Layout("ICFG-PEDES", "ICFG-PEDES/ICFG[-_]PEDES.json", "file_path", ("finetune/icfg_{}.json",)),
    "rstp": Layout("RSTPReid", "RSTPReid/data_captions.json", "img_path", ("finetune/rstp_{}.json",)),
    "sda": Layout("SDA", of_split=("SDA/finetune/sda_{}.json",), parts="SDA/sda_*.json"),
    "mals": Layout("MALS", parts="MALS/g_*_attrs.json"),
}
OWN = Layout("", of_split=("{}.json", "*_{}.json"), parts="*.json")     # below the user's folder
DATASETS = tuple(LAYOUTS)


class Source(NamedTuple):
    """The annotation files to read for one split, and how."""
    files: tuple[Path, ...]
    images: Path
    split: str | None               # None: every record names its own
    hold_out: bool                  # where no record is of val, hold out training identities
    keys: tuple[str, str, str] = ("image", "caption", "image_id")
    grouped: bool = False           # may hold one record for each caption: join those of one image
    boxed: bool = False             # every record must have boxes and phrases; elsewhere it may


def locate(dataset: str, split: str, root: Path) -> Source:
    """The file of all splits where there is one, else that of the split, else the parts. Raises UserError."""
    own = dataset not in DATASETS
    base = Path(dataset) if own else root
    layout = LAYOUTS.get(dataset, OWN)
    images = base / layout.images
    if not images.is_dir():
        raise UserError(f"no folder {shown(images)}: a data set is one of {', '.join(DATASETS)} or a folder")
    hold_out = dataset not in ("cuhk", "rstp")
    if found := _files(base, layout.all_splits):
        return Source(found[:1], images, None, hold_out, (layout.image_key, "captions", "id"))
    stored = {name: _files(base, *layout.of_split, split=name) for name in SPLITS}
    hold_out = hold_out and not stored["val"]
    wanted = "train" if hold_out and split == "val" else split      # val is held out of train
    if len(stored[wanted]) > 1:
        raise UserError(f"{shown(images)} holds more than one {wanted} file: keep one data set in a folder")
    if stored[wanted]:
        return Source(stored[wanted], images, wanted, hold_out, grouped=own or wanted == "train")
    parts = layout.parts if wanted == "train" else ""
    if dataset == "sda" or not any(stored.values()):        # only SDA has parts beside the files of other splits
        if found := _files(base, parts):
            return Source(found, images, wanted, hold_out, boxed=dataset != "mals")
    sought = " or ".join(filter(None, (layout.all_splits, *layout.of_split, parts))).replace("{}", wanted)
    hint = ""
    others = set(_files(images, "*.json")) - set(_files(base, layout.parts))
    if (images / "caption_all.json").is_file():
        hint = "; caption_all.json is there but names no splits: ask the owners of the set for reid_raw.json"
    elif len(others) == 1:
        hint = f"; {shown(others.pop())} is there: if it is that file, rename it"
    raise UserError(f"{shown(dataset)} has no {split} split: in {shown(base)} is no {sought or 'file of it'}{hint}")


def _files(base: Path, *patterns: str, split: str = "") -> tuple[Path, ...]:
    """In natural order: part_2 before part_10."""
    found = [file for pattern in patterns if pattern for file in base.glob(pattern.format(split))
             if not file.name.startswith(".") and file.name not in NOT_RECORDS]
    return tuple(sorted(found, key=lambda file: re.sub(r"\d+", lambda run: run[0].zfill(20), file.name)))
