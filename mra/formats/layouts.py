"""Where the annotation files of a data set lie, and which of them hold a split. A row of LAYOUTS adds a format.

A benchmark has one file of all splits, or the released files of one split each. SDA and MALS have parts, and every part
is training data. Read next: read.py.
"""

import re
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data.files import shown

SPLITS = ("train", "val", "test")


class Layout(NamedTuple):
    """Paths below the data root; `{}` stands for the split, `*` for any text."""
    images: str                         # folder of the images
    whole: str = ""                     # the file of all splits
    of_split: tuple[str, ...] = ()      # files of one split each
    parts: str = ""                     # files that share the training data
    has_val: bool = False               # without a val split, training identities are held out
    boxed: bool = False                 # every record of a part must have boxes and phrases


LAYOUTS = {
    "cuhk": Layout("CUHK-PEDES", "CUHK-PEDES/reid_raw.json", ("finetune/cuhk_{}.json",), has_val=True),
    "icfg": Layout("ICFG-PEDES", "ICFG-PEDES/ICFG[-_]PEDES.json", ("finetune/icfg_{}.json",)),
    "rstp": Layout("RSTPReid", "RSTPReid/data_captions.json", ("finetune/rstp_{}.json",), has_val=True),
    "sda": Layout("SDA", of_split=("SDA/finetune/sda_{}.json",), parts="SDA/sda_*.json", boxed=True),
    "mals": Layout("MALS", parts="MALS/g_*_attrs.json"),
}
OWN = Layout("", of_split=("{}.json", "*_{}.json"), parts="sda_*.json", boxed=True)     # below the user's folder
DATASETS = tuple(LAYOUTS)


class Source(NamedTuple):
    """The annotation files of one split, and how to read them."""
    files: list[Path]
    images: Path
    split: str | None               # None: every record names its own
    hold_out: bool                  # if no record is of val, hold out training identities
    grouped: bool = False           # an image may have one record for each caption: join them
    boxed: bool = False             # every record must have boxes and phrases


def locate(dataset: str, split: str, root: Path) -> Source:
    """The file of all splits if there is one, else the file of the split, else the parts. Raises UserError."""
    layout = LAYOUTS.get(dataset, OWN)
    base = Path(dataset) if layout is OWN else root
    images = base / layout.images
    if not images.is_dir():
        raise UserError(f"no folder {shown(images)}: a data set is one of {', '.join(DATASETS)} or a folder")
    whole = _files(base, layout.whole)
    if whole:
        return Source(whole[:1], images, None, not layout.has_val)
    hold_out = not layout.has_val and not _files(base, *layout.of_split, split="val")
    wanted = "train" if hold_out and split == "val" else split
    files = _files(base, *layout.of_split, split=wanted)
    if len(files) > 1:
        raise UserError(f"{shown(images)} holds more than one {wanted} file: keep one data set in a folder")
    if files:
        return Source(files, images, wanted, hold_out, grouped=True)
    parts = _files(base, layout.parts)
    if parts and wanted == "train":
        return Source(parts, images, wanted, hold_out, boxed=layout.boxed)
    sought = [path.format(wanted) for path in (layout.whole, *layout.of_split) if path]
    if layout.parts and wanted == "train":
        sought.append(layout.parts)
    hint = ""
    if (images / "caption_all.json").is_file():
        hint = "; caption_all.json is there but names no splits: ask the owners of the set for reid_raw.json"
    raise UserError(f"{shown(dataset)} has no {split} split: in {shown(base)} is no "
                    f"{' or '.join(sought) or 'file of it'}{hint}")


def _files(base: Path, *patterns: str, split: str = "") -> list[Path]:
    """The files of these patterns in natural order: part_2 before part_10."""
    found = [file for pattern in patterns if pattern for file in base.glob(pattern.format(split))
             if not file.name.startswith(".")]
    return sorted(found, key=lambda file: re.sub(r"\d+", lambda run: run[0].zfill(20), file.name))
