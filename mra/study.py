"""The paper's claims in miniature: does DaD close the gap, do the region losses help, and how far is the exact answer?

    python -m mra.study                                          all runs, one after another; goes on where it stopped.
                                                                 Several such processes share out the runs
    python -m mra.study --targets icfg --seeds 0 1 --arms dad    a part of them, on this machine
    python -m mra.study --table                                  tables and figure of the runs that are there
    python -m mra.study --quick                                  two arms, one seed, tiny

A run is an arm (which images the second pretraining stage sees), a set of losses, a target and a seed. It trains on the
source first, the same for all arms; then on a mix, four fifths the arm's images and one fifth the source's; is tested
on the target as it is, and fine-tuned on a tenth and on all of the target's labelled pairs. Two arms differ: "none"
begins with the fine-tuning, "shuffled" with its mix. Steps, number and resolution of the images are the same in every
arm, and so are the recipes (mra/config.py; RATES): rates were set on val with the source alone, the number of images
on a town of other people. Of the first stage the checkpoint is the best on the source's val, of the mix the last one,
of fine-tuning the best on the target's val.
`adapt.py` and `train.py` are called as a user would, and a finished run is one file, run.json.
Before: ranking.py, diffusion/transfers.py; contrasts.py, which makes the tables.
"""

import fcntl
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra import checkpoint, contrasts, diffusion, figures, ranking
from mra.config import DIFFUSION_PRESETS, UserError, parse, replacing, run
from mra.data import town
from mra.data.records import Record, load, load_splits, save_image, share_of
from mra.diffusion.gap import TARGETS
from mra.diffusion.sampling import read_base, read_images, stacked
from mra.diffusion.transfers import transferred
from mra.training import Busy, Machine, choose_device, claimed, queries_of

LOSSES = {"regions": (), "pairs": ("--no-regions",), "released": ("--released-regions",)}
TITLES = {"regions": "With region losses", "pairs": "Without region losses",
          "released": "With regions that ignore their box"}
TRANSFERS = ("reinhard", "histogram", "fourier", "moments")
SHARES = {"dad 5%": 0.05, "dad 25%": 0.25, "dad 50%": 0.5}       # of the images that DaD makes; the rest stay source
VARIANTS = {"dad unfiltered": ("--malformed", "1000", "--grey-mean", "0"), "dad only grey": ("--malformed", "1000"),
            "dad only malformed": ("--grey-mean", "0"), "dad matched": (),       # with a third one; dad itself has both
            "dad of target captions": ("--captions", "target")}     # as in the paper; else the source's
ARMS = ("none", "source", *TRANSFERS, "restyled", "dad", *SHARES, *VARIANTS, "exact", "exact again", "shuffled")
MAIN = [(arm, losses) for arm in ("source", "dad", "exact") for losses in ("regions", "pairs")]
KEPT = 2 / 3                        # as many images as this share of what DaD makes are in every arm; filters drop some
SOURCE_SHARE = 0.25                 # source images in the mix, as a share of the arm's
WORDS = ("caption", "phrases", "boxes")      # what a record says of its image
LEAST = 12                          # images that DaD makes, so that a mix has both
FEW = 0.1                           # of the labelled identities
STAGES = ("zero-shot", "zero-shot after a tenth", "tenth", "all")      # the second: DaD has seen a tenth of the pairs
CONTRASTS = {   # what is compared with what, on the targets and seeds that both have: (losses, arm)
    "regions and DaD - DaD alone": (("regions", "dad"), ("pairs", "dad")),
    "regions and DaD - regions alone": (("regions", "dad"), ("regions", "source")),
    "DaD alone - source alone": (("pairs", "dad"), ("pairs", "source")),
    "regions alone - source alone": (("regions", "source"), ("pairs", "source")),
    "exact: regions - none": (("regions", "exact"), ("pairs", "exact")),
    "exact - source, with region losses": (("regions", "exact"), ("regions", "source")),
    "exact - source, without": (("pairs", "exact"), ("pairs", "source")),
    **{f"{arm}: regions - regions that ignore the box": (("regions", arm), ("released", arm))
       for arm in ("source", "exact")},
    **{f"DaD - {arm}": (("regions", "dad"), ("regions", arm)) for arm in (*TRANSFERS, "restyled", *VARIANTS)},
    "exact again - exact": (("regions", "exact again"), ("regions", "exact"))}
RATES = {"tenth": 1e-4, "all": 4e-4}        # of fine-tuning: best on val, from the first stage of the source, seed 0
STEPS = {"demo": {"source": 1500, "mix": 1000, "tenth": 150, "all": 600}, "tiny": dict.fromkeys(
    ("source", "mix", "tenth", "all"), 2)}


@dataclass(frozen=True)
class StudyConfig:
    """Which runs, and where."""

    arms: tuple[str, ...] = ()         # of ARMS; empty: all
    targets: tuple[str, ...] = ()      # of cuhk, icfg, rstp; empty: all
    seeds: tuple[str, ...] = ()        # empty: 0 to 4, of all but the main arms 0 and 1
    out: str = "out/study"
    images: int = 6000                 # that DaD makes; two thirds of it are the images of every arm
    table: bool = False                # make no run: tables and figure of those that are there
    quick: bool = False                # source and dad at tiny size, one seed, 60 images at most


@dataclass(frozen=True)
class Run:
    """One row of the study."""

    arm: str
    losses: str
    target: str
    seed: int
    images: int
    size: str = "demo"

    @property
    def name(self) -> str:
        return f"{self.losses}-{self.images_of(self.arm)}"

    def images_of(self, kind: str) -> str:
        """A name for images of that kind for this target and seed."""
        return f"{re.sub(r'[ %]+', '-', kind).strip('-')}-{self.target}-{self.size}-{self.images}-s{self.seed}"


def main() -> None:
    config = parse(StudyConfig, __doc__)
    for name, given, known in (("arms", config.arms, ARMS), ("targets", config.targets, TARGETS),
                               ("seeds", config.seeds, [str(i) for i in range(100)])):
        if unknown := set(given) - set(known):
            raise UserError(f"--{name} {unknown.pop()!r}: choose from {', '.join(known[:20])}.")
    if config.images < LEAST:
        raise UserError(f"--images {config.images}: give {LEAST} or more.")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    runs, machine = list(plan(config)), Machine.of("", "")
    if not runs:
        raise UserError("There is no such run: of the arms beside the main ones, only icfg is a target.")
    for number, one in enumerate([] if config.table else runs, 1):
        try:
            with claimed(out / one.name, machine):
                if not finished(one, out):
                    print(f"{number}/{len(runs)}: {one.name}", flush=True)
                    perform(one, out)
        except Busy:
            print(f"{number}/{len(runs)}: {one.name} is being made by another process.", flush=True)
    report(out, of_kind(runs[0]))


def of_kind(one: Run) -> dict:
    """What runs have in common that may stand in one table."""
    return {"size": one.size, "images": one.images, "steps": STEPS[one.size], "rates": RATES}


def finished(one: Run, out: Path) -> bool:
    """Whether the run is on disk, made as it would be made now."""
    file = out / one.name / "run.json"
    return file.exists() and of_kind(one).items() <= checkpoint.read_json(file).items()


def plan(config: StudyConfig) -> Iterator[Run]:
    """The runs in an order that gives the main table first: seed by seed."""
    if config.quick:
        if config.arms or config.targets or config.seeds:
            raise UserError("--quick is two arms of one target and seed: no --arms, --targets, --seeds.")
        yield from (Run(arm, "regions", "icfg", 0, min(config.images, 60), "tiny") for arm in ("source", "dad"))
        return
    others = [(arm, "regions") for arm in ARMS if (arm, "regions") not in MAIN]
    others += [("source", "released"), ("exact", "released")]
    for seed in map(int, config.seeds or "01234"):
        for target in config.targets or TARGETS:
            more = target == "icfg" and (seed < 2 or config.arms and config.seeds)
            for arm, losses in MAIN + (others if more else []):
                if arm in (config.arms or ARMS):
                    yield Run(arm, losses, target, seed, config.images)


def perform(one: Run, out: Path) -> None:
    """All stages of a run, each resumable; its checkpoints are deleted once run.json holds the results."""
    folder, steps = out / one.name, STEPS[one.size]
    shares = (1.0, FEW) if learns(one.arm) else (1.0,)      # in the 10 % protocol DaD sees the same 10 %
    starts = {share: pretrained(one, out, folder, share) for share in shares}
    zero_shot = [test(start, one, (one.target,)) for start in starts.values() if start != "none"]
    results = dict(zip(STAGES[:2], 2 * zero_shot))      # an arm without DaD has one start for both: twice the same
    for stage, share in (("tenth", FEW), ("all", 1.0)):
        start = starts.get(share, starts[1.0])
        count = steps[stage] + (steps["source"] + steps["mix"] if start == "none" else 0)
        rate = ("--lr", str(RATES[stage])) if start != "none" else ()
        tuned = train(folder / stage, one, one.target, count, start, "--share", str(share), *rate)
        results[stage] = test(tuned, one, TARGETS if stage == "all" else (one.target,))
    whole, val = load_splits(one.target, ("train", "val"), town.ready(one.target, one.size == "tiny"), say=quiet)
    few, every, chosen_on = (sum(len(record.captions) for record in some.records)
                             for some in (share_of(whole, FEW), whole, val))
    seen = (every, few) if learns(one.arm) else (0, 0)
    labelled = dict(zip(STAGES, (*seen, few + chosen_on, every + chosen_on)))
    checkpoint.write_json(folder / "run.json", asdict(one) | of_kind(one) | {
        "labelled": labelled, "versions": checkpoint.VERSIONS, "precision": Machine.of("", "").precision,
        "results": results})
    for stage in folder.iterdir():
        shutil.rmtree(stage) if stage.is_dir() else None


def learns(arm: str) -> bool:
    """Whether the arm's images are made by something that has learned from labelled target pairs."""
    return arm.startswith("dad") or arm == "restyled"


def pretrained(one: Run, out: Path, folder: Path, share: float) -> str:
    """The checkpoint after the source and the mix: made, or found; "none" for the arm without."""
    steps = STEPS[one.size]
    if one.arm == "none":
        return "none"
    first = out / "first" / f"{one.losses}-{one.size}-s{one.seed}"
    shuffled = one.arm == "shuffled"            # nothing but wrong captions, for as long
    start = "none" if shuffled else train(first, one, "sda", steps["source"], "none")
    with alone(out / "sets" / f"{one.images_of(one.arm)}-{share:g}.lock"):
        mix = image_set(one, out, share, start)
    return train(folder / f"mix-{share:g}", one, str(mix), steps["mix"] + steps["source"] * shuffled, start,
                 "--evals", "1")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is within it: with region losses and without an arm has the same images."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train(folder: Path, one: Run, dataset: str, steps: int, start: str, *flags: str) -> str:
    """Call train.py, whose recipes are those of pretraining and fine-tuning; the checkpoint that is best on val."""
    fresh = start == "none"         # weights that have learned already match from the first step
    losses = LOSSES[one.losses] if fresh or one.losses == "pairs" else ()       # `released` stays with a model
    call("train.py", "--dataset", dataset, "--preset", one.size, "--seed", str(one.seed), "--out", str(folder),
         "--init", start, "--steps", str(steps), "--fusion-from", "0.15" if fresh else "0", *losses, *flags)
    return str(folder / "best.safetensors")


def call(script: str, *flags: str) -> None:
    """Run one of the three scripts, quietly; what it said is shown if it fails.

    Where another process makes the same, as the first stage for another arm, it waits for that.
    """
    command = [sys.executable, str(Path(__file__).parent.parent / script), *flags]
    while True:
        ran = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = ran.communicate()
        except KeyboardInterrupt:       # it stops after its step, and saves it; a second SIGINT would stop it at once
            ran.terminate()
            ran.communicate()
            raise
        if not ran.returncode:
            return
        if "another run is writing there" not in said:
            raise UserError(f"{' '.join(command)} failed: {said.strip()[-500:]}")
        time.sleep(20)


@torch.inference_mode()
def test(path: str, one: Run, targets: tuple[str, ...]) -> dict:
    """Metrics on test splits, by embeddings and re-ranked, R@1 of twins' queries and the rest; k, weight as on val."""
    model, tokenizer, facts = checkpoint.load_retriever(Path(path), choose_device(""))
    rows = {}
    for target in targets:
        root = town.ready(target, one.size == "tiny")
        captions, query_ids, paths, gallery_ids = queries_of(split := load(target, "test", root, say=quiet))
        twins = set(sum(json.loads((root / town.FOLDERS[target] / "town.json").read_text())["twins"], []))
        of_twins = torch.tensor([int(Path(record.path).name.split("_")[0]) in twins
                                 for record in split.records for _ in record.captions])
        found = ranking.search(model, tokenizer, captions, paths, model.config.rerank, True)
        orders = found.candidates, found.reranked(facts["val"].get("weight", 0.0))
        asked = query_ids, query_ids.where(of_twins, -1), query_ids.where(~of_twins, -1)        # -1: not counted
        every, twin, rest = (found.metrics(ids, gallery_ids, *orders) for ids in asked)
        rows[target] = {stage: every[i] | {"twins R@1": twin[i]["R@1"], "rest R@1": rest[i]["R@1"]}
                        for i, stage in enumerate(("embeddings", "re-ranked"))}
    return rows


# ---- images of an arm: (N, 3, H, W) and as many SDA records without their file

def image_set(one: Run, out: Path, share: float, retriever: str) -> Path:
    """A folder in SDA format: images of the arm's kind, and source images for SOURCE_SHARE as many and the rest."""
    folder = out / "sets" / f"{one.images_of(one.arm)}-{share:g}"
    if (folder / "report.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    tiny = one.size == "tiny"
    source = list(load("sda", "train", town.ready("sda", tiny), say=quiet).records)
    random.Random(one.seed).shuffle(source)
    most = min(round(one.images * KEPT), round(len(source) / (1 + SOURCE_SHARE)))
    count, total = max(1, round(most * SHARES.get(one.arm, 1))), round(most * (1 + SOURCE_SHARE))
    images, rows = (adapted(one, share, retriever, count) if learns(one.arm) else ([], []) if one.arm == "source"
                    else (moved if one.arm in TRANSFERS else exact)(one, source[:count]))
    own, rest = len(rows), source[len(rows):total]
    images = [*images, *read_images([record.path for record in rest], DIFFUSION_PRESETS[one.size])]
    rows += map(row_of, rest)
    if one.arm == "shuffled":
        words = [{name: row[name] for name in WORDS} for row in rows]
        random.Random(one.seed).shuffle(words)
        rows = [row | other for row, other in zip(rows, words)]
    (folder / "imgs").mkdir(parents=True)
    for number, (image, row) in enumerate(zip(images, rows)):
        row["image"] = f"{number:06d}.png"
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / "imgs" / row["image"])
    for start in range(0, len(rows), 5000):
        checkpoint.write_json(folder / f"sda_{start}_{start + 5000}.json", rows[start:start + 5000], indent=None)
    if own < count and one.arm != "source":
        print(f"{one.name}: {own} images of its own in place of {count}, the others are the source's.", flush=True)
    checkpoint.write_json(folder / "report.json", {"own": own, "images": len(rows)})
    return folder


def row_of(record: Record) -> dict:
    return {"image_id": record.identity, "caption": record.captions[0], "phrases": record.phrases,
            "boxes": record.boxes}


def adapted(one: Run, share: float, retriever: str, count: int) -> tuple[Tensor, list[dict]]:
    """Some of what adapt.py makes, having learned from the target's labelled pairs or a share of them."""
    folder = Path("out/sda") / f"study-{one.images_of('dad' if one.arm in SHARES else one.arm)}-{share:g}"
    flags = ("--mode", "restyle") if one.arm == "restyled" else ("--captions", "source", *VARIANTS.get(one.arm, ()))
    if one.arm == "dad matched":
        flags += ("--checkpoint", retriever)
    call("adapt.py", "--target", one.target, "--size", one.size, "--seed", str(one.seed), "--share", str(share),
         "--images", str(one.images), "--out", str(folder), "--no-measure", *flags)
    rows = [row for part in sorted(folder.glob("sda_*.json")) for row in checkpoint.read_json(part, list)]
    random.Random(one.seed).shuffle(rows)
    images = read_images([str(folder / "imgs" / row["image"]) for row in rows[:count]], DIFFUSION_PRESETS[one.size])
    return images, [{name: row[name] for name in WORDS} | {"image_id": 10**6 + number}      # each a person of its own
                    for number, row in enumerate(rows[:count])]


def moved(one: Run, source: list[Record]) -> tuple[Tensor, list[dict]]:
    """Source images in the look of the target's unlabelled training images, without diffusion."""
    base, _ = read_base(Path(diffusion.__path__[0]) / f"base-{one.size}.safetensors")
    target = load(one.target, "train", town.ready(one.target, one.size == "tiny"), say=quiet)
    plain, looks = (read_images([record.path for record in some], base.config) for some in (source, target.records))
    return transferred(plain, looks, base.eval().autoencoder)[one.arm], list(map(row_of, source))


def exact(one: Run, source: list[Record]) -> tuple[Tensor, list[dict]]:
    """The source's people as the target's cameras meet them, with captions and boxes of their own."""
    sizes = town.TINY if one.size == "tiny" else town.DEFAULT
    shots = {shot.path: shot for shot in town.shots("source", sizes, 0)}
    seen = [shots[record.path.split("/imgs/")[1]] for record in source]
    size = DIFFUSION_PRESETS[one.size]
    drawn = town.portraits(one.target, [shot.person for shot in seen], 7 + (one.arm == "exact again"),
                           (size.height, size.width), torch.get_num_threads())
    rows = [{"image_id": record.identity} | {name: getattr(portrait.words, name) for name in WORDS}
            for portrait, record in zip(drawn, source)]
    return stacked([portrait.pixels for portrait in drawn]), rows


# ---- tables and figure

def report(out: Path, kind: dict) -> None:
    """study.json with every run, table.md, figure.png and curve.png, of the finished runs of that kind."""
    found = [checkpoint.read_json(file) for file in sorted(out.glob("*/run.json"))]
    runs = [one for one in found if kind.items() <= one.items()]
    if not runs:
        raise UserError(f"{out} holds no finished run of size {kind['size']} with --images {kind['images']}.")
    checkpoint.write_json(out / "study.json", runs)
    groups = {losses: {arm: some for arm in ARMS if (some := contrasts.of(runs, losses, arm))} for losses in LOSSES}
    tables = {stage: [contrasts.row(runs, losses, arm, stage) for losses, group in groups.items() for arm in group
                      if arm != "none" or "zero-shot" not in stage] for stage in STAGES}
    if "none" in groups["regions"]:         # beside what DaD makes of the labelled pairs, what training on them does
        for stage, same in zip(STAGES, ("all", "tenth")):
            tables[stage].append(contrasts.row(runs, "regions", "none", same) | {
                "arm": f"none, fine-tuned on {'all' if same == 'all' else 'a tenth'}", "R@1 - source": "",
                "gap closed": ""})
    tables["differences"] = [{"difference": name} | cells for name, pair in CONTRASTS.items() for stage in STAGES
                             if (cells := contrasts.contrast(runs, *pair, stage))]
    text = "\n".join(f"{title}\n\n{contrasts.as_table(rows)}" for title, rows in tables.items() if rows)
    with replacing(out / "table.md") as scratch:
        scratch.write_text(text)
    print(text)
    charts = {}
    for losses, group in groups.items():        # the main arms have targets and seeds that the others lack
        every = {arm: some for arm, some in group.items() if arm != "none"}
        main_arms = {arm: some for arm, some in every.items() if (arm, losses) in MAIN}
        charts[f"{TITLES[losses]}, the main arms"] = contrasts.comparable(main_arms)
        charts[f"{TITLES[losses]}, all arms"] = contrasts.comparable(every if len(every) > len(main_arms) else {})
    figures.bars(charts, "R@1 on the target without fine-tuning: means, and each run a dot", out / "figure.png")
    shares = {0.0: "source", **{share: arm for arm, share in SHARES.items()}, 1.0: "dad"}
    points = contrasts.comparable({share: groups["regions"].get(arm, {}) for share, arm in shares.items()})
    if whole := all(points.values()):
        figures.curve(points, "R@1 without fine-tuning against the share of adapted images; each run a dot",
                      out / "curve.png")
    print(f"Wrote {out / 'study.json'}, table.md, figure.png{' and curve.png' * whole}.")


def quiet(line: str) -> None:
    """Where readers may say something, nothing."""


if __name__ == "__main__":
    run(main)
