"""The study: what DaD and the region losses are each worth, and how near DaD comes to exact images of the target.

    python -m tests.study                                          all runs; resumes where it stopped. Several such
                                                                   processes on one machine share out the runs
    python -m tests.study --targets icfg --seeds 0 1 --arms dad    a part of them
    python -m tests.study --table                                  tables and figures of the finished runs
    python -m tests.study --quick                                  two arms, one seed, tiny

A run is an arm (the images of the second pretraining stage), a set of losses, a target and a seed:

    first stage     the source; the same for all arms, but in random light for those of AUGMENTED
    mix             four fifths the arm's images, one fifth the source's; then the test without fine-tuning
    tenth, all      fine-tuning on a tenth and on all of the target's labelled pairs, both from the mix; each is tested

Two arms differ: "none" begins with the fine-tuning, "shuffled" with its mix. Number and resolution of the images,
steps and recipes are the same in every arm (mra/config.py; STEPS and RATES below). The rates were chosen on val from
the source alone, the number of images on a town of other people. The checkpoint of the first stage is the best on the
source's val, that of the mix the last one, that of fine-tuning the best on the target's val.
The study calls `adapt.py` and `train.py` as a user would. A finished run is one file, run.json.
Read next: comparisons.py, which makes the tables; gap.py, which measures the adapted images themselves.
"""

import fcntl
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra import ranking
from mra.config import DIFFUSION_PRESETS, AdaptConfig, UserError, flag, recipe
from mra.data.files import read_json, replacing, save_image, write_json
from mra.data.records import Record, RecordSet, share_of
from mra.diffusion.base import read_images
from mra.formats.read import load
from mra.run import checkpoint
from mra.run.checkpoint import is_kept, remember
from mra.run.command import parse
from mra.run.machine import Machine, choose_device, locked
from mra.town import sets
from mra.weights.retrievers import load_retriever
from tests.study import charts, comparisons
from tests.study.gap import TARGETS, stacked, trained_base
from tests.study.portraits import portraits
from tests.study.transfers import transferred

ROOT = Path(__file__).parents[2]        # of train.py and adapt.py

LOSSES = {"regions": (), "pairs": ("--no-regions",), "released": ()}      # the last had a flag, which is gone
TITLES = {"regions": "With region losses", "pairs": "Without region losses",
          "released": "With regions that ignore their box"}

# ---- the arms
TRANSFERS = ("reinhard", "histogram", "fourier", "moments")
SHARES = {"dad 5%": 0.05, "dad 25%": 0.25, "dad 50%": 0.5}      # of the arm's images that DaD makes, the rest: source
VARIANTS = {        # flags of adapt.py; `dad` itself has both filters, and the source's captions
    "dad unfiltered": ("--malformed", "0", "--grey-mean", "0"),
    "dad only grey": ("--malformed", "0"),
    "dad only malformed": ("--grey-mean", "0"),
    "dad of target captions": ("--captions", "target"),         # as in the paper
}
RETIRED = "dad matched"     # had a retriever as a third filter, which is gone; its runs stay in the tables
AUGMENTED = {"augmented": "source", "augmented dad": "dad", "augmented exact": "exact"}     # whose images they have
LATER = (*AUGMENTED, "worlds")      # arms that came after the first 126 runs: study_table.py counts them apart
ARMS = ("none", "source", *TRANSFERS, "restyled", "dad", *SHARES, "dad unfiltered", "dad only grey",
        "dad only malformed", RETIRED, "dad of target captions", "exact", "exact again", "shuffled",
        *LATER)                     # as in tables
BESIDE_DAD = [arm for arm in ARMS if arm in (*TRANSFERS, "restyled", *VARIANTS, RETIRED)]   # compared with DaD
MADE = tuple(arm for arm in ARMS if arm != RETIRED)             # arms that can be run
MAIN = [(arm, losses) for arm in ("source", "dad", "exact") for losses in ("regions", "pairs")]
MAIN_AUGMENTED = [(arm, "regions") for arm in AUGMENTED]
KEPT = 2 / 3                # images of an arm, as a share of those that DaD makes; its filters drop some
SOURCE_SHARE = 0.25         # source images in the mix, as a share of the arm's
LEAST = 12                  # images that DaD makes, so that a mix has both kinds
WORDS = ("caption", "phrases", "boxes")         # what a record says about its image
LIGHT = "0.75"              # train.py's --light in the arms with augmentation, as for the shipped retriever

# ---- the stages
FEW = 0.1                   # share of the labelled identities
STAGES = ("zero-shot", "zero-shot after a tenth", "tenth", "all")      # the second: DaD has seen a tenth of the pairs
RATES = {"tenth": 1e-4, "all": 4e-4}            # of fine-tuning: best on val, from the source's first stage, seed 0
STEPS = {"demo": {"source": 1500, "mix": 1000, "tenth": 150, "all": 600},
         "tiny": {"source": 2, "mix": 2, "tenth": 2, "all": 2}}

# ---- the comparisons: two (losses, arm) each, on the targets and seeds that both have
COMPARED = {
    "regions and DaD - DaD alone": (("regions", "dad"), ("pairs", "dad")),
    "regions and DaD - regions alone": (("regions", "dad"), ("regions", "source")),
    "DaD alone - source alone": (("pairs", "dad"), ("pairs", "source")),
    "regions alone - source alone": (("regions", "source"), ("pairs", "source")),
    "exact: regions - none": (("regions", "exact"), ("pairs", "exact")),
    "exact - source, with region losses": (("regions", "exact"), ("regions", "source")),
    "exact - source, without": (("pairs", "exact"), ("pairs", "source")),
    "source: regions - regions that ignore the box": (("regions", "source"), ("released", "source")),
    "exact: regions - regions that ignore the box": (("regions", "exact"), ("released", "exact")),
    **{f"DaD - {arm}": (("regions", "dad"), ("regions", arm)) for arm in BESIDE_DAD},
    "exact again - exact": (("regions", "exact again"), ("regions", "exact")),
    "augmented - source": (("regions", "augmented"), ("regions", "source")),
    "augmented dad - augmented": (("regions", "augmented dad"), ("regions", "augmented")),
    "augmented exact - augmented": (("regions", "augmented exact"), ("regions", "augmented")),
    "worlds - source": (("regions", "worlds"), ("regions", "source")),
}


@dataclass(frozen=True)
class StudyConfig:
    """Which runs, and where."""

    arms: tuple[str, ...] = flag((), "which arms; empty: all")
    targets: tuple[str, ...] = flag((), "of cuhk, icfg, rstp; empty: all")
    seeds: tuple[str, ...] = flag((), "which seeds; empty: 0 to 4 of the main arms, 0 to 2 of those with augmentation, "
                                       "0 and 1 of the others")
    out: str = flag("out/study", "folder of the runs and tables")
    images: int = flag(6000, "images that DaD makes; every arm has two thirds as many")
    table: bool = flag(False, "make no run: tables and figures of the finished ones")
    quick: bool = flag(False, "source and dad at tiny size, one seed, 60 images at most")


@dataclass(frozen=True)
class Run:
    """One run of the study."""

    arm: str
    losses: str
    target: str
    seed: int
    images: int
    size: str = "demo"

    @property
    def name(self) -> str:
        return f"{self.losses}-{self.images_of(self.arm)}"

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def key(self) -> dict:
        """All that decides the run."""
        found = asdict(self) | of_kind(self)
        if self.arm in AUGMENTED:
            found["light"] = LIGHT
        return found

    def images_of(self, kind: str) -> str:
        """A name for images of that kind for this target and seed."""
        return f"{re.sub(r'[ %]+', '-', kind).strip('-')}-{self.target}-{self.size}-{self.images}-s{self.seed}"


def of_kind(one: Run) -> dict:
    """What runs that may stand in one table have in common."""
    return {"size": one.size, "images": one.images, "steps": STEPS[one.size], "rates": RATES}


# ---- the runs, one after another

def main() -> None:
    config = parse(StudyConfig, __doc__)
    check(config)
    runs, out, machine = list(plan(config)), Path(config.out), Machine.of("", "")
    if not runs:
        raise UserError("There is no such run: the arms beside the main ones have icfg as their only target.")
    out.mkdir(parents=True, exist_ok=True)
    if not config.table:
        for number, one in enumerate(runs, 1):
            told = f"{number}/{len(runs)}: {one.name}"
            try:
                make(one, out, told, machine)
            except BlockingIOError:
                print(f"{told} is being made by another process.", flush=True)
    report(out, of_kind(runs[0]))


def check(config: StudyConfig) -> None:
    """Raise UserError for values that no run can use."""
    every_seed = [str(seed) for seed in range(100)]
    for name, given, known in (("arms", config.arms, MADE), ("targets", config.targets, TARGETS),
                               ("seeds", config.seeds, every_seed)):
        unknown = [value for value in given if value not in known]
        if unknown:
            raise UserError(f"--{name} {unknown[0]!r}: choose from {', '.join(known[:len(MADE)])}.")
    if config.images < LEAST:
        raise UserError(f"--images {config.images}: give {LEAST} or more.")
    if config.quick and (config.arms or config.targets or config.seeds):
        raise UserError("--quick is two arms of one target and seed: no --arms, --targets, --seeds.")


def plan(config: StudyConfig) -> Iterator[Run]:
    """The runs, seed by seed, so that the main table comes first."""
    if config.quick:
        for arm in ("source", "dad"):
            yield Run(arm, "regions", "icfg", 0, min(config.images, 60), "tiny")
        return
    others = [(arm, "regions") for arm in MADE if (arm, "regions") not in MAIN + MAIN_AUGMENTED]
    asked_for = config.arms and config.seeds
    for seed in map(int, config.seeds or "01234"):
        for target in config.targets or TARGETS:
            groups = list(MAIN)
            if seed < 3 or asked_for:
                groups += MAIN_AUGMENTED
            if target == "icfg" and (seed < 2 or asked_for):
                groups += others
            for arm, losses in groups:
                if arm in (config.arms or MADE):
                    yield Run(arm, losses, target, seed, config.images)


def make(one: Run, out: Path, told: str, machine: Machine) -> None:
    """Make a run unless it is finished. Its checkpoints go once run.json holds the results. Raises BlockingIOError."""
    folder = out / one.name
    with locked(folder, machine):
        if not is_kept(folder / "run.json", one.key, machine.say):
            print(told, flush=True)
            write_json(folder / "run.json", perform(one, out))
            remember(folder / "run.json", one.key)
        for stage in folder.iterdir():
            if stage.is_dir():
                shutil.rmtree(stage)


# ---- one run

def perform(one: Run, out: Path) -> dict:
    """All stages of a run, each resumable; returns what run.json holds."""
    folder, learned = out / one.name, learns(one.arm)
    start = start_of_few = pretrained(one, out, 1.0)
    if learned:                                 # in the 10 % protocol DaD sees the same 10 %
        start_of_few = pretrained(one, out, FEW)
    results = {}
    if one.arm != "none":
        results["zero-shot"] = results["zero-shot after a tenth"] = test(start, one, (one.target,))
    if learned:
        results["zero-shot after a tenth"] = test(start_of_few, one, (one.target,))
    results["tenth"] = test(fine_tune(one, folder, "tenth", FEW, start_of_few), one, (one.target,))
    results["all"] = test(fine_tune(one, folder, "all", 1.0, start), one, TARGETS)
    return one.key | {"labelled": labelled(one), "versions": checkpoint.VERSIONS,
                      "precision": Machine.of("", "").precision, "results": results}


def learns(arm: str) -> bool:
    """Whether the arm's images come from something that has learned from labelled target pairs."""
    return AUGMENTED.get(arm, arm).startswith("dad") or arm == "restyled"


def labelled(one: Run) -> dict[str, int]:
    """Labelled target pairs that each stage has used, with those of val that choose the fine-tuned checkpoint."""
    def pairs(some: RecordSet) -> int:
        return sum(len(record.captions) for record in some.records)

    root = sets.ready(one.target, one.tiny)
    whole, val = (load(one.target, split, root, say=quiet) for split in ("train", "val"))
    few, every = pairs(share_of(whole, FEW)), pairs(whole)
    seen = (every, few) if learns(one.arm) else (0, 0)
    return dict(zip(STAGES, (*seen, few + pairs(val), every + pairs(val))))


def pretrained(one: Run, out: Path, share: float) -> str:
    """The checkpoint after first stage and mix; "none" for the arm without. `share`: of the labels that DaD sees."""
    steps, folder = STEPS[one.size], out / one.name / f"mix-{share:g}"
    usual = "--evals", "1", "--lr", str(recipe("sda", one.size)["lr"])
    if one.arm == "none":
        return "none"
    if one.arm == "shuffled":           # nothing but wrong captions, for as many steps in all
        return train(folder, one, str(image_set(one, out, share)), steps["mix"] + steps["source"], "none", *usual)
    kind, light = one.losses, ()
    if one.arm in AUGMENTED:
        kind, light = f"{one.losses}-augmented", ("--light", LIGHT)
    first = train(out / "first" / f"{kind}-{one.size}-s{one.seed}", one, "sda", steps["source"], "none", *light)
    if one.arm != "augmented":          # random light on the target's look lowered R@1 in a trial: 52.2 for 61.3
        light = ()
    return train(folder, one, str(image_set(one, out, share)), steps["mix"], first, *usual, *light)


def fine_tune(one: Run, folder: Path, stage: str, share: float, start: str) -> str:
    """The checkpoint after fine-tuning; without pretraining it takes as many steps in all."""
    steps = STEPS[one.size]
    count, rate = steps[stage], str(RATES[stage])
    if start == "none":
        count, rate = steps["source"] + steps["mix"] + steps[stage], "4e-4"
    return train(folder / stage, one, one.target, count, start, "--share", str(share), "--lr", rate)


def train(folder: Path, one: Run, dataset: str, steps: int, start: str, *flags: str) -> str:
    """Call train.py, whose recipes are those of pretraining and fine-tuning; the checkpoint that is best on val."""
    fresh = start == "none"
    fusion_from = "0.15" if fresh else "0"      # weights that have learned already match from the first step
    call("train.py", "--dataset", dataset, "--preset", one.size, "--seed", str(one.seed), "--out", str(folder),
         "--init", start, "--steps", str(steps), "--fusion-from", fusion_from, *LOSSES[one.losses], *flags)
    return str(folder / "best.safetensors")


def call(script: str, *flags: str) -> None:
    """Run one of the scripts quietly; what it said is shown if it fails.

    Where another process makes the same, as the first stage for another arm, it waits for that.
    """
    command = [sys.executable, str(ROOT / script), *flags]
    while True:
        ran = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = ran.communicate()
        except KeyboardInterrupt:       # it stops after its step and saves; a second SIGINT would stop it at once
            ran.terminate()
            ran.communicate()
            raise
        if ran.returncode == 0:
            return
        if "another run is writing there" not in said:
            raise UserError(f"{' '.join(command)} failed: {said.strip()[-500:]}")
        time.sleep(20)


@torch.inference_mode()
def test(path: str, one: Run, targets: tuple[str, ...]) -> dict:
    """Metrics on the targets' test splits, by embeddings and re-ranked; R@1 also of twins' queries and of the rest.

    The weight of the similarity in re-ranking is the checkpoint's own, chosen on val.
    """
    model, tokenizer, facts = load_retriever(Path(path), choose_device(""))
    results = {}
    for target in targets:
        root = sets.ready(target, one.tiny)
        split = load(target, "test", root, say=quiet)
        captions, query_ids, paths, gallery_ids = ranking.queries_of(split, tokenizer)
        found = ranking.search(model, tokenizer, captions, paths, ranking.Settings(model.config.rerank))
        weight = facts["val"].get("weight", 0.0)
        of_twins = of_twins_in(split, root / sets.FOLDERS[target] / "town.json")
        results[target] = {}
        for stage, order in (("embeddings", found.candidates), ("re-ranked", found.reranked(weight))):
            twins = found.metrics(query_ids.where(of_twins, -1), gallery_ids, order)    # -1 has no match: not counted
            rest = found.metrics(query_ids.where(~of_twins, -1), gallery_ids, order)
            results[target][stage] = found.metrics(query_ids, gallery_ids, order) | {
                "twins R@1": twins["R@1"], "rest R@1": rest["R@1"]}
    return results


def of_twins_in(split: RecordSet, manifest: Path) -> Tensor:
    """Whether each query (Q,) is for a person for whom there is another who differs in one attribute."""
    twins = {number for pair in read_json(manifest)["twins"] for number in pair}
    found = []
    for record in split.records:
        number = int(Path(record.path).name.split("_")[0])
        found += [number in twins] * len(record.captions)
    return torch.tensor(found)


# ---- the images of an arm: (N, 3, H, W), and as many SDA records without their file

def image_set(one: Run, out: Path, share: float) -> Path:
    """A folder in SDA format: the arm's images, and the source's to fill its places and SOURCE_SHARE as many besides.

    With region losses and without, and with augmentation, an arm has the same images, so another process may be making
    them: it is waited for.
    """
    one = replace(one, arm=AUGMENTED.get(one.arm, one.arm))
    folder = out / "sets" / f"{one.images_of(one.arm)}-{share:g}"
    file, key = folder / "report.json", set_key(one, share)
    with alone(folder.with_name(f"{folder.name}.lock")):
        if not is_kept(file, key, Machine.of("", "").say):
            make_set(one, share, folder)
            remember(file, key)
    return folder


def set_key(one: Run, share: float) -> dict:
    """All that decides the images and their words."""
    key = {"arm": one.arm, "target": one.target, "size": one.size, "seed": one.seed, "share of labels": share,
           "images of the arm": f"{KEPT:.4f} x {SHARES.get(one.arm, 1)} x {one.images}", "source share": SOURCE_SHARE}
    if learns(one.arm):
        key["adapt.py"] = " ".join(adapt_flags(one, share))
    return key


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is within it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_set(one: Run, share: float, folder: Path) -> None:
    """Make the set of `image_set`, and last its report."""
    source = list(load("sda", "train", sets.ready("sda", one.tiny), say=quiet).records)
    random.Random(one.seed).shuffle(source)
    most = min(round(one.images * KEPT), round(len(source) / (1 + SOURCE_SHARE)))
    count = max(1, round(most * SHARES.get(one.arm, 1)))
    images, rows = own_images(one, share, source[:count])
    own = len(rows)
    if own < count and one.arm != "source":
        print(f"{one.name}: {own} images of its own in place of {count}, the others are the source's.", flush=True)
    rest = source[own:round(most * (1 + SOURCE_SHARE))]
    images = [*images, *read_images([record.path for record in rest], DIFFUSION_PRESETS[one.size])]
    rows = rows + rows_of(rest)
    if one.arm == "shuffled":
        words = [{name: row[name] for name in WORDS} for row in rows]
        random.Random(one.seed).shuffle(words)
        rows = [row | other for row, other in zip(rows, words)]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "imgs").mkdir(parents=True)
    for number, (image, row) in enumerate(zip(images, rows)):
        row["image"] = f"{number:06d}.png"
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / "imgs" / row["image"])
    for start in range(0, len(rows), 5000):
        write_json(folder / f"sda_{start}_{start + 5000}.json", rows[start:start + 5000], indent=None)
    write_json(folder / "report.json", {"own": own, "images": len(rows)})


def own_images(one: Run, share: float, source: list[Record]) -> tuple[Sequence[Tensor], list[dict]]:
    """As many images of the arm's kind as there are source records; DaD's filters may leave fewer."""
    if one.arm == "source":
        return [], []
    if learns(one.arm):
        return adapted(one, share, len(source))
    if one.arm in TRANSFERS:
        return moved(one, source)
    return redrawn(one, source)


def adapted(one: Run, share: float, count: int) -> tuple[Tensor, list[dict]]:
    """Images that adapt.py makes, having learned from the target's labelled pairs or a share of them.

    Each image counts as a person of its own.
    """
    kind = "dad" if one.arm in SHARES else one.arm
    folder = Path("out/sda") / f"study-{one.images_of(kind)}-{share:g}"
    call("adapt.py", "--out", str(folder), *adapt_flags(one, share))
    rows = [row for part in sorted(folder.glob("sda_*.json")) for row in read_json(part, list)]
    random.Random(one.seed).shuffle(rows)
    rows = rows[:count]
    images = read_images([str(folder / "imgs" / row["image"]) for row in rows], DIFFUSION_PRESETS[one.size])
    return images, [{name: row[name] for name in WORDS} | {"image_id": 10**6 + number}
                    for number, row in enumerate(rows)]


def adapt_flags(one: Run, share: float) -> list[str]:
    flags = ["--target", one.target, "--size", one.size, "--seed", str(one.seed), "--share", str(share),
             "--images", str(one.images)]
    if one.arm == "restyled":
        return [*flags, "--mode", "restyle"]
    return [*flags, "--captions", "source", *VARIANTS.get(one.arm, ())]


def moved(one: Run, source: list[Record]) -> tuple[Tensor, list[dict]]:
    """Source images in the look of the target's unlabelled training images, without diffusion."""
    base = trained_base(AdaptConfig(size=one.size), Machine.of("cpu", ""))
    target = load(one.target, "train", sets.ready(one.target, one.tiny), say=quiet)
    plain, looks = (read_images([record.path for record in some], base.config) for some in (source, target.records))
    return transferred(plain, looks, base.autoencoder)[one.arm], rows_of(source)


def redrawn(one: Run, source: list[Record]) -> tuple[Tensor, list[dict]]:
    """The source's people as the target's cameras or random worlds show them, with captions and boxes of their own."""
    sizes = sets.TINY if one.tiny else sets.DEFAULT
    shots = {shot.path: shot for shot in sets.shots("source", sizes["source"], 0)}
    people = [shots[record.path.split("/imgs/")[1]].person for record in source]
    size = DIFFUSION_PRESETS[one.size]
    seed = 8 if one.arm == "exact again" else 7
    place = "worlds" if one.arm == "worlds" else one.target
    drawn = portraits(place, people, seed, (size.height, size.width), torch.get_num_threads())
    rows = [{"image_id": record.identity} | {name: getattr(portrait.words, name) for name in WORDS}
            for portrait, record in zip(drawn, source)]
    return stacked([portrait.pixels for portrait in drawn]), rows


def rows_of(records: list[Record]) -> list[dict]:
    return [{"image_id": record.identity, "caption": record.captions[0], "phrases": record.phrases,
             "boxes": record.boxes} for record in records]


# ---- tables and figures

def report(out: Path, kind: dict) -> None:
    """study.json with every run, table.md, figure.png and curve.png, of the finished runs of that kind."""
    found = [read_json(file) for file in sorted(out.glob("*/run.json"))]
    runs = [one for one in found if kind.items() <= one.items()]
    if not runs:
        raise UserError(f"{out} holds no finished run of size {kind['size']} with --images {kind['images']}.")
    write_json(out / "study.json", runs)
    text = "\n".join(f"{title}\n\n{comparisons.as_table(rows)}" for title, rows in tables_of(runs).items() if rows)
    with replacing(out / "table.md") as scratch:
        scratch.write_text(text)
    print(text)
    charts.bars(bars_of(runs), "R@1 on the target without fine-tuning: means, and each run a dot", out / "figure.png")
    written = [str(out / "study.json"), "table.md", "figure.png"]
    points = points_of(runs)
    if all(points.values()):
        charts.curve(points, "R@1 without fine-tuning against the share of adapted images; each run a dot",
                     out / "curve.png")
        written.append("curve.png")
    print(f"Wrote {', '.join(written)}.")


def arms_of(runs: list[dict], losses: str) -> dict[str, comparisons.Runs]:
    """The runs of each arm that has any with these losses."""
    groups = {arm: comparisons.of(runs, losses, arm) for arm in ARMS}
    return {arm: some for arm, some in groups.items() if some}


def tables_of(runs: list[dict]) -> dict[str, list[dict[str, str]]]:
    """Rows of a table for each stage, and of one with all differences."""
    tables = {}
    for stage in STAGES:
        tables[stage] = [comparisons.row(runs, losses, arm, stage) for losses in LOSSES
                         for arm in arms_of(runs, losses) if arm != "none" or "zero-shot" not in stage]
    if "none" in arms_of(runs, "regions"):      # what training does with the labelled pairs that DaD has learned from
        for stage, same, told in (("zero-shot", "all", "all"), ("zero-shot after a tenth", "tenth", "a tenth")):
            beside = {"arm": f"none, fine-tuned on {told}", "R@1 - source": "", "gap closed": ""}
            tables[stage].append(comparisons.row(runs, "regions", "none", same) | beside)
    tables["differences"] = []
    for name, pair in COMPARED.items():
        for stage in STAGES:
            cells = comparisons.comparison(runs, *pair, stage)
            if cells:
                tables["differences"].append({"difference": name} | cells)
    return tables


def bars_of(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """R@1 without fine-tuning: of the two kinds of main arms, which have more targets and seeds, and of all arms."""
    bars = {}
    for losses, title in TITLES.items():
        every = {arm: some for arm, some in arms_of(runs, losses).items() if arm != "none"}
        main_arms = {arm: some for arm, some in every.items() if (arm, losses) in MAIN}
        bars[f"{title}, the main arms"] = comparisons.comparable(main_arms)
        augmented = {arm: some for arm, some in every.items() if (arm, losses) in MAIN_AUGMENTED}
        bars[f"{title}, the main arms with augmentation"] = comparisons.comparable(augmented)
        if len(every) > len(main_arms):
            bars[f"{title}, all arms"] = comparisons.comparable(every)
    return bars


def points_of(runs: list[dict]) -> dict[float, list[float]]:
    """R@1 without fine-tuning by the share of adapted images; none at shares without a run."""
    arms = {0.0: "source", **{share: arm for arm, share in SHARES.items()}, 1.0: "dad"}
    return comparisons.comparable({share: comparisons.of(runs, "regions", arm) for share, arm in arms.items()})


def quiet(line: str) -> None:
    """Stands where readers would print."""
