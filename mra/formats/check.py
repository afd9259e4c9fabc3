"""Is a set on disk whole? Every record is read and every image decoded. Faults are listed, oddities are noted.

`python train.py --check --dataset cuhk --data-root DIR` lists all faults; training stops at the first one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from mra.config import UserError
from mra.data.files import in_processes, shown
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.formats.layouts import SPLITS, locate
from mra.formats.read import Row, examined, read_rows

PUBLISHED = {   # identities, images and captions of each split, from the benchmark table of the MRA paper
    "cuhk": {"train": (11_003, 34_054, 68_126), "val": (1_000, 3_078, 6_158), "test": (1_000, 3_074, 6_156)},
    "icfg": {"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    "rstp": {"train": (3_701, 18_505, 37_010), "val": (200, 1_000, 2_000), "test": (200, 1_000, 2_000)},
}
COLUMNS = ("identities", "images", "captions")
SMALL = 16      # pixels: an image with a shorter side shows too little of a person
LONG = 6        # the longer side over the shorter: beyond it, an image is hardly a crop of one person
LISTED = 20     # faults of one kind that are listed; the others are counted
CHUNK = 64      # images that a process decodes before it is given others


def check_set(dataset: str, data_root: Path, tokenizer: Tokenizer, longest: int, workers: int,
              say: Callable = print) -> bool:
    """Print what a set holds, its faults and notes; True if it has no fault. Raises UserError if there is no set.

    The model reads `longest` ids of a caption, [CLS] and [SEP] included. `workers` processes decode the images.
    """
    published, sources, rows = PUBLISHED.get(dataset, {}), [], []
    faults, notes = defaultdict(list), defaultdict(list)        # sentences by kind
    for split in SPLITS:
        try:
            sources.append(locate(dataset, split, Path(data_root)))
        except UserError as error:
            notes["split without a file"].append(str(error))
    for source in dict.fromkeys(sources):       # two splits may share their files
        some, refused = read_rows(source)
        rows += some
        if refused:
            faults["unusable"] += refused
    if not rows:
        raise UserError([*faults["unusable"], *notes["split without a file"]][0])
    drawn = " (drawn data, not photographs)" if (source.images / "town.json").is_file() else ""
    say(f"{shown(dataset)} in {shown(source.images)}{drawn}")
    say(f"{'split':7}" + "".join(f"{name + ' (published)' if published else name:>26}" for name in COLUMNS))
    people = {}
    for split in SPLITS:
        some, cells = [row for row in rows if row.split == split], []
        if not some and split not in published:
            continue
        people[split] = {row.identity for row in some}
        counts = len(people[split]), len(some), sum(row.captions for row in some)
        for name, count, right in zip(COLUMNS, counts, published.get(split, (0, 0, 0))):
            cells.append(f"{count:,} ({right:,})" if published else f"{count:,}")
            if published and count != right:
                kinds = notes if count else faults      # a part of a set can be trained on, an empty split cannot
                kinds["count that is not the published one"].append(f"{split}: {count:,} {name}, published {right:,}")
        say(f"{split:7}" + "".join(f"{cell:>26}" for cell in cells))
    for one, other in combinations(people if source.split is None else (), 2):      # else each file may count from 0
        for identity in sorted(people[one] & people[other]):
            notes["identity of two splits"].append(f"{shown(identity)} in {one} and {other}")
    _captions(rows, dataset, tokenizer, longest, notes)
    _images(rows, workers, faults, notes, say)
    for kind, examples in notes.items():
        say(f"Note: {len(examples):,} x {kind}, such as {examples[0]}")
    for kind, sentences in faults.items():
        say("\n  ".join([f"{len(sentences):,} x {kind}:", *sentences[:LISTED]]))
        if len(sentences) > LISTED:
            say(f"  ... and {len(sentences) - LISTED:,} more")
    say("Not all is well: see above." if faults else "All is well.")
    return not faults


def _captions(rows: list[Row], dataset: str, tokenizer: Tokenizer, longest: int, notes: dict[str, list]) -> None:
    """Note captions that the model does not read in full, and those that stand on several people of a split."""
    first = {}      # the first row that has a caption, by split and caption
    for row in rows:
        for caption in row.record().captions:
            words, place = clean(caption, dataset), f"{row.place}: {shown(caption)}"
            if not words:           # such as Chinese alone: used in training and search like any other
                notes["caption without a word after cleaning"].append(place)
                continue
            ids = tokenizer.encode(words, longest + 1)
            if len(ids) > longest:
                notes[f"caption of more than {longest - 2} word pieces, which the model cuts"].append(place)
            if tokenizer.unk_id in ids:
                unknown = [word for word in words.split() if tokenizer.unk_id in tokenizer.encode(word)]
                notes["caption with words that the vocabulary lacks"].append(f"{place} has {shown(' '.join(unknown))}")
            before = first.setdefault((row.split, words.lower()), row)
            if before.identity != row.identity:
                notes["caption of several people"].append(f"{place} and {before.place}")


def _images(rows: list[Row], workers: int, faults: dict[str, list], notes: dict[str, list], say: Callable) -> None:
    """Find images that are missing, stand in two records, do not decode, or have an odd shape."""
    missing = [row for row in rows if row.missing]
    if missing:
        faults["missing image"] += [row.place for row in missing]
        folders = Counter(row.path.rpartition("/")[0] for row in missing).most_common(LISTED)
        say("missing in the folders " + ", ".join(f"{shown(name)} {n:,}" for name, n in folders))
    first = {}      # the first row of an image; a model that trains on an image of val or test has seen the answer
    for row in rows:
        before = first.setdefault(row.path, row)
        if before is not row:
            faults["image that has two records"].append(f"{row.place}: also in {before.split}, {before.place}")
    paths = [path for path, row in first.items() if not row.missing]
    odd = f"image under {SMALL} pixels a side or of an aspect beyond 1:{LONG}"
    results = in_processes(examined, paths, workers if len(paths) > CHUNK else 1, CHUNK)
    for number, (path, (trouble, width, height)) in enumerate(zip(paths, results, strict=True), 1):
        if trouble:
            faults["image that does not decode"].append(trouble)
        elif min(width, height) < SMALL or max(width, height) > LONG * min(width, height):
            notes[odd].append(f"{shown(Path(path))}, {width} x {height}")
        if number % 2000 == 0 or number == len(paths) > CHUNK:
            say(f"  {number:,} of {len(paths):,} images decoded")
