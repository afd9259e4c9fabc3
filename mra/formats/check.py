"""Is a set on disk whole? Counts every fault and lists the first LISTED of each kind; training stops at the first."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from mra.config import UserError
from mra.data.files import examined, in_processes, quoted
from mra.data.tokenizer import Tokenizer
from mra.formats.read import SPLITS, Row, locate, read_rows

PUBLISHED = {   # identities, images and captions of each split, from the benchmark table of the MRA paper
    "cuhk": {"train": (11_003, 34_054, 68_126), "val": (1_000, 3_078, 6_158), "test": (1_000, 3_074, 6_156)},
    "icfg": {"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    "rstp": {"train": (3_701, 18_505, 37_010), "val": (200, 1_000, 2_000), "test": (200, 1_000, 2_000)},
}
SMALL = 16      # pixels: an image with a shorter side shows too little of a person
LONG = 6        # the longer side over the shorter: beyond it, an image is hardly a crop of one person
LISTED = 20     # faults of one kind that are listed; the others are counted
CHUNK = 64      # images that a process decodes before it is given others


def check_set(dataset: str, data_root: Path, tokenizer: Tokenizer, longest: int, workers: int,
              say: Callable = print) -> bool:
    """Print what a set holds, its faults and notes; True if it has no fault. Raises UserError if there is no set.

    The model reads `longest` ids of a caption, [CLS] and [SEP] included. `workers` processes decode the images.
    """
    sources, rows, vocabulary = [], [], f"the vocabulary {quoted(tokenizer.source)}"
    faults, notes = defaultdict(list), defaultdict(list)
    for split in SPLITS:
        try:
            source = locate(dataset, split, Path(data_root))
        except UserError as error:
            notes["split without a file"].append(str(error))
            continue
        if source not in sources:       # two splits may share their files
            sources.append(source)
            some, refused = read_rows(source)
            rows += some
            faults["unusable"] += refused
    if not rows:
        raise UserError([*faults["unusable"], *notes["split without a file"]][0])
    drawn = " (drawn data, not photographs)" if (sources[0].images / "town.json").is_file() else ""
    say(f"{quoted(dataset)} in {quoted(sources[0].images)}{drawn}")
    for split in SPLITS:
        _count(split, [row for row in rows if row.split == split], PUBLISHED.get(dataset, {}), faults, say)
    first = {}      # the first row of each image
    for row in rows:
        before = first.setdefault(row.record.path or row.place, row)
        if before is not row:       # a model that trains on an image of val or test has seen the answer
            faults["image that has two records"].append(f"{row.place}: also in {before.split}, {before.place}")
        if row.missing:
            faults["missing image"].append(row.place)
        for caption in row.record.captions:
            ids = tokenizer.encode(tokenizer.clean(caption, dataset), longest + 1)
            place = f"{row.place}: {quoted(caption)}"
            if len(ids) > longest:
                notes[f"caption of more than {longest - 2} pieces of {vocabulary}, which the model cuts"].append(place)
            if tokenizer.unk_id in ids:
                notes[f"caption with words that {vocabulary} lacks"].append(place)
    paths = [row.record.path for row in first.values() if row.record.path and not row.missing]
    for number, (trouble, width, height) in enumerate(in_processes(examined, paths, workers, CHUNK), 1):
        if trouble:
            faults["image that does not decode"].append(trouble)
        elif min(width, height) < SMALL or max(width, height) > LONG * min(width, height):
            odd = f"image under {SMALL} pixels a side or of an aspect beyond 1:{LONG}"
            notes[odd].append(f"{quoted(Path(paths[number - 1]))}, {width} x {height}")
        if number % 2000 == 0 or number == len(paths):
            say(f"  {number:,} of {len(paths):,} images decoded")
    for title, kinds, listed in (("Note", notes, 1), ("Fault", faults, LISTED)):
        for kind, sentences in kinds.items():
            if sentences:
                say("\n  ".join([f"{title}: {len(sentences):,} x {kind}, such as", *sentences[:listed]]))
    whole = not any(faults.values())
    say("No faults found." if whole else "Faults found: see above.")
    return whole


def _count(split: str, rows: list[Row], published: dict, faults: dict, say: Callable) -> None:
    """Say what a split holds, beside the published numbers. Other numbers are no fault: a part can be trained on."""
    images = [row for row in rows if row.record.path]
    counts = len({row.identity for row in rows}), len(images), sum(len(row.record.captions) for row in rows)
    line = "{}: {:,} identities, {:,} images, {:,} captions".format(split, *counts)
    if split in published:
        line += "; published {:,}, {:,} and {:,}".format(*published[split])
        if not rows:
            faults["empty split"].append(line)
    pictured = {row.identity for row in images}
    if rows and pictured.isdisjoint(row.identity for row in rows if row.record.captions):
        faults["split in which no caption is of a person with an image"].append(line)
    if rows or split in published:
        say(line)
    distractors = sum(not row.record.captions for row in images)
    alone = sum(len(row.record.captions) for row in rows if not row.record.path)
    if distractors or alone:
        say(f"{split}: {distractors:,} of these images are distractors, {alone:,} of these captions have no image")
