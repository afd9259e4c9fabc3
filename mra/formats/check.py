"""Is a set on disk whole? Every record is read and every image decoded. Faults are listed, oddities are noted.

`python train.py --check --dataset cuhk --data-root DIR` lists all faults; training stops at the first one.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from mra.config import UserError
from mra.data.files import examined, in_processes, shown
from mra.data.records import unpack
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.formats.layouts import SPLITS, locate
from mra.formats.read import Row, read_rows

PUBLISHED = {   # identities, images and captions of each split, from the benchmark table of the MRA paper
    "cuhk": {"train": (11_003, 34_054, 68_126), "val": (1_000, 3_078, 6_158), "test": (1_000, 3_074, 6_156)},
    "icfg": {"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    "rstp": {"train": (3_701, 18_505, 37_010), "val": (200, 1_000, 2_000), "test": (200, 1_000, 2_000)},
}
SMALL = 16      # pixels: an image with a shorter side shows too little of a person
LISTED = 20     # faults of one kind that are listed; the others are counted
CHUNK = 64      # images that a process decodes before it is given others

Kinds = dict[str, list[str]]        # the sentences of each kind of fault or note


def check_set(dataset: str, data_root: Path, tokenizer: Tokenizer, longest: int, workers: int,
              say: Callable = print) -> bool:
    """Print what a set holds, its faults and notes; True if it has no fault. Raises UserError if there is no set.

    The model reads `longest` ids of a caption, [CLS] and [SEP] included. `workers` processes decode the images.
    """
    sources, rows = [], []
    faults, notes = defaultdict(list), defaultdict(list)
    for split in SPLITS:
        try:
            source = locate(dataset, split, Path(data_root))
        except UserError as error:
            notes["split without a file"].append(str(error))
            continue
        if source in sources:       # two splits may share their files
            continue
        sources.append(source)
        some, refused = read_rows(source)
        rows += some
        if refused:
            faults["unusable"] += refused
    if not rows:
        raise UserError([*faults["unusable"], *notes["split without a file"]][0])
    drawn = " (drawn data, not photographs)" if (sources[0].images / "town.json").is_file() else ""
    say(f"{shown(dataset)} in {shown(sources[0].images)}{drawn}")
    _counts(rows, PUBLISHED.get(dataset, {}), faults, notes, say)
    _captions(rows, dataset, tokenizer, longest, notes)
    _images(rows, workers, faults, notes, say)
    for title, kinds, listed in (("Note", notes, 1), ("Fault", faults, LISTED)):
        for kind, sentences in kinds.items():
            say("\n  ".join([f"{title}: {len(sentences):,} x {kind}, such as", *sentences[:listed]]))
    say("Not all is well: see above." if faults else "All is well.")
    return not faults


def _counts(rows: list[Row], published: dict, faults: Kinds, notes: Kinds, say: Callable) -> None:
    """Say what each split holds, beside the published numbers. A part of a split can be trained on."""
    for split in SPLITS:
        some = [row for row in rows if row.split == split]
        counts = len({row.identity for row in some}), len(some), sum(len(unpack(row.packed).captions) for row in some)
        line = "{}: {:,} identities, {:,} images, {:,} captions".format(split, *counts)
        if split in published:
            line += "; published {:,}, {:,} and {:,}".format(*published[split])
            if not some:
                faults["empty split"].append(line)
            elif counts != published[split]:
                notes["split without the published counts"].append(line)
        if some or split in published:
            say(line)


def _captions(rows: list[Row], dataset: str, tokenizer: Tokenizer, longest: int, notes: Kinds) -> None:
    """Note captions that the model does not read in full, and those that stand on several people of a split."""
    first = {}      # the first row that has a caption, by split and caption
    for row in rows:
        for caption in unpack(row.packed).captions:
            words, place = clean(caption, dataset), f"{row.place}: {shown(caption)}"
            ids = tokenizer.encode(words, longest + 1)
            if len(ids) > longest:
                notes[f"caption of more than {longest - 2} word pieces, which the model cuts"].append(place)
            if tokenizer.unk_id in ids:
                unknown = [word for word in words.split() if tokenizer.unk_id in tokenizer.encode(word)]
                notes["caption with words that the vocabulary lacks"].append(f"{place} has {shown(' '.join(unknown))}")
            before = first.setdefault((row.split, words.lower()), row)
            if before.identity != row.identity:
                notes["caption of several people"].append(f"{place} and {before.place}")


def _images(rows: list[Row], workers: int, faults: Kinds, notes: Kinds, say: Callable) -> None:
    """Find images that are missing, have two records, do not decode, or are tiny."""
    first = {}      # the first row of an image
    for row in rows:
        before = first.setdefault(unpack(row.packed).path, row)
        if before is not row:       # a model that trains on an image of val or test has seen the answer
            faults["image that has two records"].append(f"{row.place}: also in {before.split}, {before.place}")
        if row.missing:
            faults["missing image"].append(row.place)
    paths = [path for path, row in first.items() if not row.missing]
    for number, (trouble, width, height) in enumerate(in_processes(examined, paths, workers, CHUNK), 1):
        if trouble:
            faults["image that does not decode"].append(trouble)
        elif min(width, height) < SMALL:
            notes[f"image under {SMALL} pixels a side"].append(f"{shown(Path(paths[number - 1]))}, {width} x {height}")
        if number % 2000 == 0 or number == len(paths):
            say(f"  {number:,} of {len(paths):,} images decoded")
