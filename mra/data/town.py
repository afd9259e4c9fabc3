"""The demo town: sets of drawn pedestrians, written in the real sets' own folder layouts and formats.

No real set may be shipped, so the package draws its own: one source (SDA) and three targets (CUHK-PEDES, ICFG-PEDES,
RSTPReid). Who lives where and what each image shows is a pure function of a seed, so the same person in the same pose
can be drawn in any domain.
Before: drawing.py (one image), people.py (what is written of it). After: records.py, which reads the sets back.
"""

import fcntl
import json
import math
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mra.config import UserError, parse, replacing, run
from mra.data import in_processes
from mra.data.drawing import DOMAINS, VERSION, Pose, render
from mra.data.people import Person, Words, describe, sample_person, twin_of
from mra.data.records import save_image

NOTE = "computer drawings of people who do not exist, not photographs"


@dataclass(frozen=True)
class TownSizes:
    """People of each split, and images of each of them, on average. ICFG-PEDES has no val split: those people train."""
    source_train: tuple[int, float] = (3000, 2)
    source_test: tuple[int, float] = (200, 3)
    target_train: tuple[int, float] = (400, 4)
    target_val: tuple[int, float] = (100, 3)
    target_test: tuple[int, float] = (240, 3)

    def splits(self, set_name: str) -> list[tuple[str, int, float]]:
        """(split as written, people, images of each), in the order of the identities."""
        if set_name == "source":
            return [("train", *self.source_train), ("test", *self.source_test)]
        return [("train", *self.target_train), ("train" if set_name == "icfg" else "val", *self.target_val),
                ("test", *self.target_test)]


DEFAULT = TownSizes()
TINY = TownSizes((6, 2), (4, 3), (4, 3), (2, 2), (6, 3))
FOLDERS = {"source": "SDA", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
CUHK_CAMERAS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market")
TWIN_SHARE = 0.3    # of the test identities belong to a pair that differs in one attribute
CHUNK = 20          # people a process draws at once
MANY = 500          # portraits: fewer are drawn before processes have started
OURS = re.compile(r"(\d+_c\d+_\d+|sda_\w+|reid_raw|ICFG-PEDES|data_captions|town|DRAWN)\.(jpg|json|txt|tmp)")   # files


class Shot(NamedTuple):
    """All that an image is made of; `path` is relative to the folder imgs of the set."""
    split: str
    identity: int
    person: Person
    pose: Pose
    camera: int
    seed: int
    path: str


def shots(set_name: str, sizes: TownSizes, seed: int, start: int = 0, stop: int = 10 ** 9) -> Iterator[Shot]:
    """The shots of a set's people number start to stop, counted over its splits; pure, any part alone."""
    first, twins = 0, {second for _, second in _twins(set_name, sizes)}
    for split, people, images in sizes.splits(set_name):
        for number in range(max(start, first), min(stop, first + people)):
            own_rng, before = (random.Random(f"{seed}/{set_name}/{first}/{number - i}") for i in (0, 1))
            person = (twin_of(sample_person(before), own_rng) if number in twins      # of the one before, drawn again
                      else sample_person(own_rng))
            own = round(images * (number - first + 1)) - round(images * (number - first))
            yield from _shots_of(set_name, split, number, person, own, own_rng)
        first += people


def _twins(set_name: str, sizes: TownSizes) -> list[list[int]]:
    """Pairs of numbers of people: the first of the test split."""
    *others, (_, people, _) = sizes.splits(set_name)
    first = sum(count for _, count, _ in others)
    return [[first + i, first + i + 1] for i in range(0, math.ceil(TWIN_SHARE * people / 2) * 2, 2)]


def _shots_of(set_name: str, split: str, number: int, person: Person, images: int,
              rng: random.Random) -> Iterator[Shot]:
    domain, identity = DOMAINS[set_name], number + (set_name == "cuhk")
    cameras = rng.sample(range(domain.cameras), domain.cameras)
    for i in range(images):
        camera = cameras[i % domain.cameras]
        yaw = rng.choices((0, 180, 270, 90), domain.views)[0] + rng.uniform(-20, 20)
        folder = {"source": f"{number // 1000:03d}/", "cuhk": f"{CUHK_CAMERAS[camera % 5]}/", "rstp": "",
                  "icfg": f"{split}/{identity:04d}/"}[set_name]
        yield Shot(split, identity, person, Pose(yaw % 360, rng.uniform(0, 2 * math.pi)), camera,
                   rng.getrandbits(48), f"{folder}{identity:04d}_c{camera + 1}_{i:04d}.jpg")


def build(root: Path, set_name: str, sizes: TownSizes, seed: int, workers: int, say=print) -> None:
    """Write a set under root in its real layout, unless its manifest says that it is there already.

    The manifest town.json comes last, by renaming: a set without it is drawn again. Raises UserError when the folder
    holds anything that was not drawn here.
    """
    folder, splits = Path(root) / FOLDERS[set_name], sizes.splits(set_name)
    twins = [[number + (set_name == "cuhk") for number in pair] for pair in _twins(set_name, sizes)]
    manifest = json.dumps({"note": NOTE, "version": VERSION, "set": set_name, "seed": seed, "sizes": splits,
                           "look": asdict(DOMAINS[set_name]), "twins": twins}, indent=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{set_name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                    # a second run waits for the first
        if (folder / "town.json").is_file() and (folder / "town.json").read_bytes() == manifest.encode():
            return
        drawn = (folder / "DRAWN.txt").is_file()
        for path in folder.rglob("*"):
            if path.is_file() and not (drawn and OURS.fullmatch(path.name)):
                raise UserError(f"{path} was not drawn here, and the demo town would draw over it: move it away")
        say(f"{folder}: drawing demo data: {sum(round(n * images) for _, n, images in splits)} {NOTE}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with replacing(folder / "DRAWN.txt") as scratch:    # before anything else: the folder is ours
            scratch.write_text(f"Drawn by mra/data/town.py: {NOTE}.\n")
        draw, people = partial(_draw_some, folder, set_name, sizes, seed), sum(n for _, n, _ in splits)
        _write_records(folder, in_processes(draw, range(0, people, CHUNK), workers), say)
        with replacing(folder / "town.json") as scratch:
            scratch.write_text(manifest)


def _draw_some(folder: Path, set_name: str, sizes: TownSizes, seed: int, start: int) -> list[tuple[str, str]]:
    """A worker's part: draws CHUNK people from `start` on; (annotation file, record in JSON) of each image."""
    made = []
    for shot in shots(set_name, sizes, seed, start, start + CHUNK):
        image, boxes = render(shot.person, shot.pose, set_name, shot.camera, shot.seed)
        (folder / "imgs" / shot.path).parent.mkdir(parents=True, exist_ok=True)
        save_image(image, folder / "imgs" / shot.path, quality=95)
        words = [describe(shot.person, shot.pose.view, boxes, random.Random(f"{shot.seed}/{i}")) for i in (0, 1)]
        name, record = _record(set_name, shot, words)
        made.append((name, json.dumps(record)))
    return made


def _write_records(folder: Path, made: Iterator[list[tuple[str, str]]], say) -> None:
    """Annotation files, the same whatever the number of workers."""
    files, drawn = defaultdict(list), 0
    for name, record in (pair for some in made for pair in some):
        files[name.format(drawn // 5000 * 5000, drawn // 5000 * 5000 + 5000)].append(record)
        drawn += 1
        if drawn % 5000 == 0:
            say(f"  {drawn} images drawn")
    for name, records in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with replacing(folder / name) as scratch:
            scratch.write_text("[\n" + ",\n".join(records) + "\n]\n", encoding="utf-8")


def _record(set_name: str, shot: Shot, words: list[Words]) -> tuple[str, dict]:
    """(annotation file, record) in the set's own format."""
    captions = [one.caption for one in words]
    if set_name == "source" and shot.split == "test":
        return "finetune/sda_test.json", {"image": shot.path, "caption": captions, "image_id": shot.identity}
    if set_name == "source":
        boxes = [[round(v, 4) for v in box] for box in words[0].boxes]
        sure = random.Random(shot.seed)      # stands for the grounding model's confidence
        return "sda_{}_{}.json", {"image": shot.path, "boxes": boxes, "phrases": words[0].phrases,
                                  "logits": [round(sure.uniform(0.35, 0.9), 4) for _ in boxes],
                                  "caption": captions[0], "image_id": shot.identity}
    path = "img_path" if set_name == "rstp" else "file_path"
    record = {"split": shot.split, "captions": captions, path: shot.path, "id": shot.identity}
    if set_name == "cuhk":
        tokens = [caption.replace(",", "").replace(".", "").split() for caption in captions]
        return "reid_raw.json", record | {"processed_tokens": tokens}
    if set_name == "icfg":
        return "ICFG-PEDES.json", record | {"captions": captions[:1]}
    return "data_captions.json", record


class Portrait(NamedTuple):
    """A drawing in memory: pixels (H, W, 3) uint8, one annotator's words, its camera."""
    pixels: np.ndarray
    words: Words
    camera: int


def portraits(domain: str, people: list[Person], seed: int, size: tuple[int, int], workers: int,
              poses: list[Pose] | None = None) -> list[Portrait]:
    """Each person once, as a camera of that domain meets them (or in the given pose), (H, W) = size; pure."""
    tasks = [(domain, person, f"{seed}/{i}", size, poses and poses[i]) for i, person in enumerate(people)]
    return list(in_processes(_portrait, tasks, workers if len(tasks) >= MANY else 1, CHUNK))


def _portrait(task: tuple) -> Portrait:
    domain, person, seed, size, pose = task
    rng = random.Random(f"portrait/{domain}/{seed}")
    shot = next(_shots_of(domain, "", 0, person, 1, rng))       # for its camera, pose and seed
    pose = pose or shot.pose
    image, boxes = render(person, pose, domain, shot.camera, shot.seed)
    return Portrait(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)),
                    describe(person, pose.view, boxes, rng), shot.camera)


def root(tiny: bool) -> Path:
    """Where the demo town lies, under the working directory."""
    return Path("data/demo-tiny" if tiny else "data/demo")


@dataclass(frozen=True)
class TownConfig:
    """What `python -m mra.data.town` draws."""
    root: str = "data/town"                    # its folder, for --data-root
    sets: tuple[str, ...] = tuple(FOLDERS)     # source, cuhk, icfg, rstp
    people: float = 1.0                        # times the people of the default town
    seed: int = 0
    workers: int = os.cpu_count() or 1         # processes


def main() -> None:
    config = parse(TownConfig, "Draw a town of any size: the source has 3,200 people, each target 740, times --people.")
    if unknown := set(config.sets) - set(FOLDERS):
        raise UserError(f"--sets {unknown.pop()}: choose from {', '.join(FOLDERS)}.")
    if not (0 < config.people < 1e6 and config.workers >= 1 and config.seed >= 0):
        raise UserError("--people, --workers and --seed: give numbers above 0 (a seed may be 0).")
    sizes = TownSizes(*((max(2, round(n * config.people)), images) for n, images in astuple(DEFAULT)))
    for name in config.sets:
        build(Path(config.root), name, sizes, config.seed, config.workers)


def ready(dataset: str, tiny: bool, say=print) -> Path:
    """`root`, with the drawn set of that name (sda, cuhk, icfg, rstp) in it; it is drawn if it is missing."""
    if dataset == "mals":
        raise UserError("The demo town has no MALS: give --data-root, the folder that holds it.")
    if dataset in ("sda", "cuhk", "icfg", "rstp"):
        build(root(tiny), "source" if dataset == "sda" else dataset, TINY if tiny else DEFAULT, 0,
              1 if tiny else os.cpu_count() or 1, say)
    return root(tiny)


if __name__ == "__main__":
    run(main)
