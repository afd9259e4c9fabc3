"""Is a set on disk whole? Every record read, every image decoded, the counts beside the published ones.

`python train.py --check --dataset cuhk --data-root DIR` lists all that is wrong at once, where training would stop at
the first record. Read before: records.py. After: augment.py.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from mra.config import UserError
from mra.data import in_processes
from mra.data.records import SPLITS, Row, locate, open_image, read_rows, shown
from mra.data.words import clean

PUBLISHED = {   # identities, images and captions of each split, from the benchmark table of the MRA paper
    "cuhk": {"train": (11_003, 34_054, 68_126), "val": (1_000, 3_078, 6_158), "test": (1_000, 3_074, 6_156)},
    "icfg": {"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    "rstp": {"train": (3_701, 18_505, 37_010), "val": (200, 1_000, 2_000), "test": (200, 1_000, 2_000)},
}
COLUMNS = ("identities", "images", "captions")
LISTED = 20     # of a kind of trouble; the others are counted
CHUNK = 64      # images that a process decodes before it is given others


def check_set(dataset: str, data_root: Path, workers: int, say: Callable = print) -> bool:
    """Print what a set holds and all that is wrong with it; whether nothing is. Raises UserError if there is none."""
    published, rows, wrong, absent, before = PUBLISHED.get(dataset, {}), {}, defaultdict(list), [], None
    for split in SPLITS:
        try:
            source = locate(dataset, split, Path(data_root))
        except UserError as error:
            (wrong["not found"] if split in published else absent).append(str(error))
            continue
        if source != before:
            before, (read, refused) = source, read_rows(source)
            wrong["unusable"] += refused
        if source.split in (None, split):       # else val is to be held out of train
            rows[split] = [row for row in read if row.split == split]
    if not any(rows.values()):
        raise UserError([*wrong["unusable"], *wrong["not found"], *absent][0])
    for sentence in absent:
        say(f"Note: {sentence}")
    counts = {split: (len({row.identity for row in some}), len(some), sum(row.captions for row in some))
              for split in SPLITS if (some := rows.get(split, [])) or split in published}
    drawn = (source.images / "town.json").is_file()
    say(f"{shown(dataset)} in {shown(source.images)}{' (drawn data, not photographs)' * drawn}\n"
        + table(counts, published))
    if not drawn:
        wrong["count that is not the published one"] = [
            f"{split}: {found:,} {name}, published {right:,}" for split in published
            for name, found, right in zip(COLUMNS, counts[split], published[split]) if found != right]
    every = [row for some in rows.values() for row in some]
    present = list(dict.fromkeys(row.path for row in every if not row.missing))
    wrong["missing image"] = [row.place for row in every if row.missing]
    first = {}      # of two splits, whoever trains on it has seen the answer
    wrong["image that has two records"] = [
        f"{row.place}: also in {first[row.path].split}, {first[row.path].place}" for row in every
        if first.setdefault(row.path, row) is not row]
    for one, other in combinations(rows if before.split is None else (), 2):        # else each file may count from 0
        if shared := {row.identity for row in rows[one]} & {row.identity for row in rows[other]}:
            say(f"Note: {len(shared):,} identities of {one} stand in {other}, too, as {shown(min(shared))}")
    wordless = [row.place for row in every for caption in row.said[0] if not clean(caption, dataset)]
    if wordless:        # as of Chinese signs alone: trained on and searched with like any other
        say(f"Note: {len(wordless):,} captions have no word left after cleaning, the first in {wordless[0]}")
    wrong["image that does not decode"] = list(troubles(present, workers, say).values())
    return tell(wrong, every, say)


def table(counts: dict[str, tuple], published: dict[str, tuple]) -> str:
    """The counts of each split, with the published ones in brackets."""
    lines = [f"{'split':7}" + "".join(f"{name + ' (published)' * bool(published):>26}" for name in COLUMNS)]
    for split, found in counts.items():
        cells = [f"{n:,}" + f" ({right:,})" * bool(published)
                 for n, right in zip(found, published.get(split, (0, 0, 0)))]
        lines.append(f"{split:7}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def trouble(path: str) -> str | None:
    """Why an image does not decode; None if it does."""
    try:
        open_image(path)
    except UserError as error:
        return str(error)


def troubles(paths: list[str], workers: int, say: Callable = print) -> dict[str, str]:
    """Decode every image, in so many processes; {path: sentence} of those that do not decode."""
    found = {}
    results = in_processes(trouble, paths, workers if len(paths) > CHUNK else 1, CHUNK)
    for number, (path, sentence) in enumerate(zip(paths, results), 1):
        if sentence:
            found[path] = sentence
        if number % 2000 == 0 or number == len(paths) > CHUNK:
            say(f"  {number:,} of {len(paths):,} images decoded")
    return found


def tell(wrong: dict[str, list[str]], every: list[Row], say: Callable) -> bool:
    """Print the first of each kind of trouble, and the missing images by folder; whether there is none."""
    for kind, sentences in wrong.items():
        if sentences:
            say("\n  ".join([f"{len(sentences):,} x {kind}:", *sentences[:LISTED]]
                            + [f"... and {len(sentences) - LISTED:,} more"] * (len(sentences) > LISTED)))
    folders = Counter(row.path.rpartition("/")[0] for row in every if row.missing).most_common(LISTED)
    if folders:
        say("missing in the folders " + ", ".join(f"{shown(name)} {n:,}" for name, n in folders))
    well = not any(wrong.values())
    say("All is well." if well else "Not all is well: see above.")
    return well
