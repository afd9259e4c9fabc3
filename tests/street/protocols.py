"""A real camera with few labels or none: what DaD is worth on the street, beside cheaper ways.

    python -m tests.street.protocols STREET --plain CHECKPOINT              all runs; resumes where it stopped
    python -m tests.street.protocols STREET --seeds 0 --arms augmented dad --protocols no-labels        a part of them
    python -m tests.street.protocols STREET --quick                         one seed at tiny size

STREET has the crops (cut.py). CHECKPOINT is a retriever that has seen the source alone, without augmentation. A run is
a protocol (what is known of the street), an arm (the start, and the images of a second stage of pretraining), with or
without region losses, and a seed. Nothing is fine-tuned. README.md says what the protocols and arms are. The study's
helpers call `adapt.py` and `train.py` as a user would. A finished run is one file of STREET/protocols. Read next:
spread.py, which measures.
"""

import argparse
import random
import shutil
import statistics
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from mra import ranking
from mra.config import DIFFUSION_PRESETS, AdaptConfig, UserError
from mra.data.files import read_json, save_image, write_json, write_text
from mra.diffusion.base import read_images
from mra.formats.read import load
from mra.run import checkpoint, networks
from mra.run.command import run
from mra.run.machine import Machine
from mra.show import pictures
from mra.town import sets
from mra.weights.retrievers import load_retriever
from tests.street import spread
from tests.street.cut import STREET, split_of
from tests.study import study
from tests.study.gap import trained_base
from tests.study.transfers import moments

PROTOCOLS = ("no-labels", "no-words", "ten-minutes")
ARMS = ("source", "augmented", "moments", "dad", "dad on plain")
PLAIN = ("source", "dad on plain")          # arms that start from --plain, the others from the shipped retriever
LOSSES = {"with": (), "without": ("--no-regions",)}     # region losses of the second stage
SENTENCES = 2           # chosen for a crop without labels: as many as a labelled crop has
# the paper's branch where sentences teach it: README.md says why
BRANCH = {False: ("--rank", "0", "--steps", "2400"), True: ("--rank", "0")}
ANYBODY = "a person"    # the sentence of every crop in the protocol no-words, for adapt.py the same as none
PICTURED = 8            # images in a row of a picture
METRICS = [ranking.METRICS[number] for number in spread.SHOWN]
STAGES = ("embeddings", "re-ranked")


@dataclass(frozen=True)
class Place:
    """Where all lies: absolute paths, since the scripts run in a folder of each protocol."""

    street: Path        # the crops
    source: Path        # the drawn set's folder
    shipped: Path       # checkpoints
    plain: Path | None
    quick: bool

    @property
    def size(self) -> str:
        return "tiny" if self.quick else "demo"

    @property
    def images(self) -> int:
        """Images that adapt.py makes, before its filters; `moments` has as many."""
        return 40 if self.quick else 3000

    def of(self, protocol: str) -> Path:
        """The protocol's folder. The networks of DaD lie there too, not among those of the demo."""
        return self.street / ("quick" if self.quick else "protocols") / protocol

    def root(self, protocol: str) -> Path:
        """Where the protocol's target set is."""
        return self.street if protocol == "ten-minutes" else self.of(protocol)


@dataclass(frozen=True)
class Run:
    """One run. `source` and `augmented` are checkpoints as they are: they have neither protocol nor seed."""

    protocol: str
    arm: str
    regions: str
    seed: int

    @property
    def name(self) -> str:
        losses = "" if self.regions == "with" else "-noregions"
        return f"{self.arm.replace(' ', '-')}{losses}-s{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("street", type=Path, help="folder of the crops")
    parser.add_argument("--plain", type=Path, help="checkpoint of the source without augmentation")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --quick 0")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--quick", action="store_true", help="tiny size, to try it")
    given = parser.parse_args()
    if not (given.street / "CUHK-PEDES/reid_raw.json").is_file():
        raise UserError(f"{given.street} holds no crops: python -m tests.street VIDEO {given.street} cuts them.")
    if given.plain and not given.plain.is_file():
        raise UserError(f"--plain {given.plain}: there is no such checkpoint.")
    runs = list(plan(given))
    if not runs:
        raise UserError("No run is left: give --plain CHECKPOINT, or other --arms or --protocols.")
    place = place_of(given)
    for number, one in enumerate(runs, 1):
        print(f"{number}/{len(runs)}: {one.protocol}, {one.name}", flush=True)
        make(one, place)
    draw(place, runs)
    table = table_of([read_json(result_file(one, place)) for one in runs])
    write_text(place.of("table.md"), table)
    print(f"\n{table}")


def place_of(given: argparse.Namespace) -> Place:
    """Draw the source if need be. At tiny size no retriever is shipped, so two steps make one."""
    street, shipped = given.street.resolve(), checkpoint.shipped("demo")
    if given.quick:
        shipped = street / "quick/first/best.safetensors"
        study.call("train.py", "--dataset", "sda", "--preset", "tiny", "--steps", "2", "--out", str(shipped.parent))
    plain = given.plain.resolve() if given.plain else None
    return Place(street, sets.ready("sda", given.quick).resolve(), shipped.resolve(), plain, given.quick)


def plan(given: argparse.Namespace) -> Iterator[Run]:
    """The runs, seed by seed. Says which arms are left out without --plain."""
    left_out = [arm for arm in PLAIN if arm in given.arms and not given.plain]
    if left_out:
        print(f"Without --plain CHECKPOINT these arms are left out: {', '.join(left_out)}.", flush=True)
    arms = [arm for arm in ARMS if arm in given.arms and arm not in left_out]
    for arm in arms:
        if arm in ("source", "augmented"):
            yield Run("none", arm, "with", 0)
    usual = [0] if given.quick else [0, 1, 2]
    for seed in given.seeds or usual:
        for protocol in given.protocols:
            for arm in arms:
                # `moments` uses no words
                if arm in ("source", "augmented") or (arm, protocol) == ("moments", "no-words"):
                    continue
                for regions in ("with",) if arm == "dad on plain" else LOSSES:
                    yield Run(protocol, arm, regions, seed)


# ---- one run

def result_file(one: Run, place: Place) -> Path:
    return place.of(one.protocol) / f"{one.name}.json"


def make(one: Run, place: Place) -> None:
    """Make a run unless it is finished; its file holds the metrics of each set of sentences by stage."""
    file, start = result_file(one, place), place.plain if one.arm in PLAIN else place.shipped
    key = asdict(one) | {"size": place.size, "images": place.images, "content of the start": contents(start),
                         "content of the sentences": checkpoint.digest_of([str(STREET["captions"]).encode()])}
    if not place.quick:
        key["content of the base"] = contents(networks.base_file(AdaptConfig(size=place.size)))
    if checkpoint.is_kept(file, key, print):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    trained = start if one.protocol == "none" else second_stage(one, place, start)
    people, paths, gallery_ids = spread.test_crops(place.street)
    found = {}
    for stage, rows in spread.measure(trained, "further", people, paths, gallery_ids).items():
        each = 100 * rows[:, spread.SHOWN].unflatten(0, (-1, len(people))).mean(1)          # (S, 2)
        found[stage] = dict(zip(METRICS, each.T.tolist()))
    write_json(file, asdict(one) | {"sets": found})
    checkpoint.remember(file, key)


def contents(path: Path) -> str:
    return checkpoint.digest_of([path.read_bytes()])


def second_stage(one: Run, place: Place, start: Path) -> Path:
    """The checkpoint after the stage that train.py has for an adapted set, on the images of the run's arm."""
    write_target(one.protocol, place)
    images = moments_set(one, place) if one.arm == "moments" else adapted_set(one, place)
    folder = place.of(one.protocol) / one.name
    flags = ["--preset", place.size, "--seed", str(one.seed)]
    if place.quick:
        flags += ["--steps", "2"]
    study.call("train.py", "--dataset", str(images), "--init", str(start), "--out", str(folder), *flags,
               *LOSSES[one.regions])
    (folder / "last.safetensors").unlink()      # the best weights are kept, for spread.py and maps.py
    return folder / "best.safetensors"


def adapted_set(one: Run, place: Place) -> Path:
    """The set that adapt.py makes of the source's captions; all arms and losses share it."""
    folder = place.of(one.protocol) / f"sets/dad-s{one.seed}"
    branch = () if one.protocol == "no-words" else BRANCH[place.quick]
    with chdir(place.of(one.protocol)):
        study.call("adapt.py", "--target", "cuhk", "--data-root", str(place.root(one.protocol)),
                   "--source", str(place.source), "--captions", "source", "--images", str(place.images),
                   "--size", place.size, "--seed", str(one.seed), "--out", str(folder), *branch)
    return folder


def moments_set(one: Run, place: Place) -> Path:
    """As many random source images, whose latents together get the moments of those of the target's crops."""
    folder = place.of(one.protocol) / f"sets/moments-s{one.seed}"
    with chdir(place.of(one.protocol)):
        if place.quick:     # no base of tiny size is shipped
            study.call("adapt.py", "--train-base", "--size", "tiny", "--source", str(place.source))
        base = trained_base(AdaptConfig(size=place.size, source=str(place.source)), Machine.of("cpu", ""))
    key = {"images": place.images, "content of the base": checkpoint.digest(base)}
    if checkpoint.is_kept(folder / "report.json", key, print):
        return folder
    records = list(load("sda", "train", place.source, say=study.quiet).records)
    records = random.Random(one.seed).sample(records, min(place.images, len(records)))
    target = load("cuhk", "train", place.root(one.protocol), say=study.quiet).records
    drawn, crops = (read_images([record.path for record in some], base.config) for some in (records, target))
    rows = study.rows_of(records)
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(moments(drawn, crops, base.autoencoder)):
        rows[number]["image"] = f"{number:06d}.png"
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / "imgs" / rows[number]["image"])
    write_json(folder / f"sda_0_{len(rows)}.json", rows, indent=None)
    write_json(folder / "report.json", {"images": len(rows)})
    checkpoint.remember(folder / "report.json", key)
    return folder


# ---- the target's pictures without labels

def write_target(protocol: str, place: Place) -> None:
    """Write all crops before the test frames as a CUHK-PEDES without labels: each crop is a person of its own."""
    folder, crops = place.of(protocol) / "CUHK-PEDES", unnamed_crops(place.street)
    file, key = folder / "reid_raw.json", {"crops": len(crops), "content of the retriever": contents(place.shipped)}
    if protocol == "ten-minutes" or checkpoint.is_kept(file, key, print):
        return
    sentences = [[ANYBODY]] * len(crops)
    if protocol == "no-labels":
        sentences = chosen_sentences(place.shipped, [str(crop) for crop in crops.values()], place.source)
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    records = []
    for number, (name, crop) in enumerate(crops.items()):
        shutil.copyfile(crop, folder / "imgs" / name)
        records.append({"split": "train", "captions": sentences[number], "file_path": name, "id": number})
    write_json(file, records, indent=1)
    checkpoint.remember(file, key)


def unnamed_crops(street: Path) -> dict[str, Path]:
    """The crops before the test frames in the order of frame and left edge, by names that tell nobody's identity."""
    found = {}
    for frame, left, *_, person, _ in STREET["people"]:
        if split_of(frame) == "train":
            found[f"f{frame:03}_x{left:03}.png"] = street / f"CUHK-PEDES/imgs/train/f{frame:03}_p{person}.png"
    for frame, left, *_ in STREET["unlabelled"]:
        found[f"f{frame:03}_x{left:03}.png"] = street / f"unlabelled/f{frame:03}_x{left}.png"
    return dict(sorted(found.items()))


@torch.inference_mode()
def chosen_sentences(retriever: Path, crops: list[str], source: Path) -> list[list[str]]:
    """For each crop the SENTENCES most similar ones of the source's distinct captions, the most similar first.

    The similarity is that of the embeddings, the mean of crop and caption and of their mirror images.
    """
    model, tokenizer, _ = load_retriever(retriever, torch.device("cpu"))
    records = load("sda", "train", source, say=study.quiet).records
    captions = list(dict.fromkeys(caption for record in records for caption in record.captions))
    found = ranking.search(model, tokenizer, captions, crops, ranking.Settings(0))
    nearest = (found.queries @ found.gallery.T).topk(SENTENCES, dim=0).indices              # (2, G)
    return [[captions[number] for number in own] for own in nearest.T.tolist()]


# ---- pictures and table

def draw(place: Place, runs: list[Run]) -> None:
    """Pictures of the first set that DaD made: drawn.png without photographs, adaptation.png with the street's."""
    one = next((one for one in runs if one.arm.startswith("dad")), None)
    if one is None:
        return
    folder, size = place.of(one.protocol) / f"sets/dad-s{one.seed}", DIFFUSION_PRESETS[place.size]
    rows = [row for part in sorted(folder.glob("sda_*.json")) for row in read_json(part, list)]
    rows = random.Random(0).sample(rows, min(PICTURED, len(rows)))
    crops = list(unnamed_crops(place.street).values())
    crops = random.Random(0).sample(crops, PICTURED)
    shown = {"source": read_images([row["origin"] for row in rows], size),
             "adapted, by the captions of these": read_images([str(folder / "imgs" / row["image"]) for row in rows],
                                                              size)}
    pictures.sheet(shown, place.street / "drawn.png")
    real = read_images([str(crop) for crop in crops], size)
    pictures.sheet(shown | {"target (exact drawings do not exist here)": real}, place.street / "adaptation.png")


def table_of(results: list[dict]) -> str:
    """A row for the seeds of a protocol, arm and losses: mean +- deviation over sets of sentences (over seeds)."""
    groups = {}
    for one in results:
        groups.setdefault((one["protocol"], one["arm"], one["regions"]), []).append(one["sets"])
    lines = ["| protocol | arm | region losses | runs | " +
             " | ".join(f"{name}, {stage}" for stage in STAGES for name in METRICS) + " |", "|---" * 8 + "|"]
    for told, own in sorted(groups.items(), key=lambda group: places_of(*group[0])):
        cells = [*told, str(len(own))]
        for stage in STAGES:
            for name in METRICS:
                cells.append(summary([one[stage][name] for one in own if stage in one]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def places_of(protocol: str, arm: str, regions: str) -> tuple[int, int, int]:
    """A row's place in the table."""
    return ("none", *PROTOCOLS).index(protocol), ARMS.index(arm), list(LOSSES).index(regions)


def summary(values: list[list[float]]) -> str:
    """Values of each seed and set: their mean +- the mean deviation over sets, in brackets that of the seeds' means."""
    if not values:
        return ""
    means = [statistics.mean(own) for own in values]
    told = f"{statistics.mean(means):.1f} +- {statistics.mean(statistics.stdev(own) for own in values):.1f}"
    if len(means) > 1:
        told += f" ({statistics.stdev(means):.1f})"
    return told


if __name__ == "__main__":
    run(main)
