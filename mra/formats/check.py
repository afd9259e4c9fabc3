"""Is a set on disk complete? Every record is read, every image decoded, and the counts compared with published ones.

`python train.py --check --dataset cuhk --data-root DIR` lists all that is wrong; training stops at the first trouble.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from mra.config import UserError
from mra.data.files import in_processes, open_image, shown
from mra.data.words import clean
from mra.formats.layouts import SPLITS, locate
from mra.formats.read import read_rows

PUBLISHED = {   # identities, images and captions of each split, from the benchmark table of the MRA paper
    "cuhk": {"train": (11_003, 34_054, 68_126), "val": (1_000, 3_078, 6_158), "test": (1_000, 3_074, 6_156)},
    "icfg": {"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    "rstp": {"train": (3_701, 18_505, 37_010), "val": (200, 1_000, 2_000), "test": (200, 1_000, 2_000)},
}
COLUMNS = ("identities", "images", "captions")
LISTED = 20     # sentences of one kind of trouble; the others are counted
CHUNK = 64      # images that a process decodes before it is given others


def check_set(dataset: str, data_root: Path, workers: int, say: Callable = print) -> bool:
    """Print what a set holds and all that is wrong with it; True if nothing is. Raises UserError if there is no set."""
    published, rows_of, rows = PUBLISHED.get(dataset, {}), {}, {}
    wrong, absent = defaultdict(list), []       # wrong: sentences by kind of trouble
    for split in SPLITS:
        try:
            source = locate(dataset, split, Path(data_root))
        except UserError as error:
            (wrong["not found"] if split in published else absent).append(str(error))
            continue
        if source not in rows_of:
            rows_of[source], refused = read_rows(source)
            wrong["unusable"] += refused
        if source.split in (None, split):       # else val is to be held out of train
            rows[split] = [row for row in rows_of[source] if row.split == split]
    if not any(rows.values()):
        raise UserError([*wrong["unusable"], *wrong["not found"], *absent][0])
    for sentence in absent:
        say(f"Note: {sentence}")
    drawn = (source.images / "town.json").is_file()
    say(f"{shown(dataset)} in {shown(source.images)}{' (drawn data, not photographs)' if drawn else ''}")
    say(f"{'split':7}" + "".join(f"{name + ' (published)' if published else name:>26}" for name in COLUMNS))
    for split in [split for split in SPLITS if rows.get(split) or split in published]:
        some, cells = rows.get(split, []), []
        found = len({row.identity for row in some}), len(some), sum(row.captions for row in some)
        for name, count, right in zip(COLUMNS, found, published.get(split, (0, 0, 0))):
            cells.append(f"{count:,} ({right:,})" if published else f"{count:,}")
            if split in published and count != right and not drawn:
                wrong["count that is not the published one"].append(f"{split}: {count:,} {name}, published {right:,}")
        say(f"{split:7}" + "".join(f"{cell:>26}" for cell in cells))
    every = [row for some in rows.values() for row in some]
    wrong["missing image"] = [row.place for row in every if row.missing]
    first = {}      # an image of two splits: a model that trains on it has seen the answer
    for row in every:
        before = first.setdefault(row.path, row)
        if before is not row:
            wrong["image that has two records"].append(f"{row.place}: also in {before.split}, {before.place}")
    for one, other in combinations(rows if source.split is None else (), 2):        # else each file may count from 0
        if shared := {row.identity for row in rows[one]} & {row.identity for row in rows[other]}:
            say(f"Note: {len(shared):,} identities of {one} stand in {other}, too, as {shown(min(shared))}")
    wordless = [row.place for row in every for caption in row.record().captions if not clean(caption, dataset)]
    if wordless:        # such as Chinese alone: used in training and search like any other
        say(f"Note: {len(wordless):,} captions have no word left after cleaning, the first in {wordless[0]}")
    present = list(dict.fromkeys(row.path for row in every if not row.missing))
    wrong["image that does not decode"] = troubles(present, workers, say)
    _tell(wrong, [row.path.rpartition("/")[0] for row in every if row.missing], say)
    return not any(wrong.values())


def trouble(path: str) -> str | None:
    """Why an image does not decode; None if it does."""
    try:
        open_image(path)
    except UserError as error:
        return str(error)


def troubles(paths: list[str], workers: int, say: Callable = print) -> list[str]:
    """Decode every image in `workers` processes; a sentence for each that does not decode."""
    found = []
    results = in_processes(trouble, paths, workers if len(paths) > CHUNK else 1, CHUNK)
    for number, sentence in enumerate(results, 1):
        if sentence:
            found.append(sentence)
        if number % 2000 == 0 or number == len(paths) > CHUNK:
            say(f"  {number:,} of {len(paths):,} images decoded")
    return found


def _tell(wrong: dict[str, list[str]], missing: list[str], say: Callable) -> None:
    """Print the first sentences of each kind of trouble, and how many images are missing in which folder."""
    for kind, sentences in wrong.items():
        if sentences:
            say("\n  ".join([f"{len(sentences):,} x {kind}:", *sentences[:LISTED]]))
        if len(sentences) > LISTED:
            say(f"  ... and {len(sentences) - LISTED:,} more")
    if missing:
        folders = Counter(missing).most_common(LISTED)
        say("missing in the folders " + ", ".join(f"{shown(name)} {n:,}" for name, n in folders))
    say("Not all is well: see above." if any(wrong.values()) else "All is well.")
