"""Whole sets: one source (SDA) and three targets (CUHK-PEDES, ICFG-PEDES, RSTPReid), in the real sets' formats.

The people of a set and what its images show depend on the seed alone. formats/read.py reads the sets back.
"""

import fcntl
import json
import math
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mra.config import UserError
from mra.data.files import in_processes, save_image, write_text
from mra.town.drawing import DOMAINS, VERSION, Pose, render
from mra.town.people import Person, Words, describe, sample_person, twin_of

NOTE = "computer drawings of people who do not exist, not photographs"
FOLDERS = {"source": "SDA", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
FIRST_ID = {"source": 0, "cuhk": 1, "icfg": 0, "rstp": 0}
CUHK_CAMERAS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market")
TWIN_SHARE = 0.3    # share of the test identities that belong to a pair of twins: they differ in one attribute
PART = 5000         # records in one file of the source

# The splits of each set: name, people, images of a person. ICFG-PEDES has no val split.
Sizes = list[tuple[str, int, int]]
DEFAULT = {"source": [("train", 3000, 2), ("test", 200, 3)],
           **dict.fromkeys(("cuhk", "rstp"), [("train", 400, 4), ("val", 100, 3), ("test", 240, 3)]),
           "icfg": [("train", 400, 4), ("train", 100, 3), ("test", 240, 3)]}
TINY = {"source": [("train", 6, 2), ("test", 4, 3)],
        **dict.fromkeys(("cuhk", "rstp"), [("train", 4, 3), ("val", 2, 2), ("test", 6, 3)]),
        "icfg": [("train", 4, 3), ("train", 2, 2), ("test", 6, 3)]}


class Shot(NamedTuple):
    """What one image shows; `path` is relative to the folder imgs of the set."""
    split: str
    identity: int
    person: Person
    pose: Pose
    camera: int
    seed: int
    path: str


def twin_pairs(sizes: Sizes) -> list[tuple[int, int]]:
    """Pairs of people of the test split, by number. The second of a pair is a twin of the first."""
    *others, (_, people, _) = sizes
    first = sum(count for _, count, _ in others)
    return [(first + 2 * i, first + 2 * i + 1) for i in range(math.ceil(TWIN_SHARE * people / 2))]


def shots(set_name: str, sizes: Sizes, seed: int) -> Iterator[Shot]:
    """The shots of a set in the order of its people. They depend on the seed and the number of the person."""
    first, person, twins = 0, None, {second for _, second in twin_pairs(sizes)}
    for split, people, images in sizes:
        for number in range(first, first + people):
            rng = random.Random(f"{seed}/{set_name}/{first}/{number}")
            person = twin_of(person, rng) if number in twins else sample_person(rng)
            yield from shots_of(set_name, split, number, person, images, rng)
        first += people


def shots_of(set_name: str, split: str, number: int, person: Person, count: int, rng: random.Random) -> Iterator[Shot]:
    """`count` shots of one person; people are numbered from 0 in each set."""
    domain, identity = DOMAINS[set_name], number + FIRST_ID[set_name]
    cameras = rng.sample(range(domain.cameras), domain.cameras)
    for i in range(count):
        camera = cameras[i % domain.cameras]
        yaw = rng.choices((0, 180, 270, 90), domain.views)[0] + rng.uniform(-20, 20)
        pose = Pose(yaw % 360, rng.uniform(0, 2 * math.pi))
        folder = {"source": f"{number // 1000:03d}/", "cuhk": f"{CUHK_CAMERAS[camera % 5]}/", "rstp": "",
                  "icfg": f"{split}/{identity:04d}/"}
        path = f"{folder[set_name]}{identity:04d}_c{camera + 1}_{i:04d}.jpg"
        yield Shot(split, identity, person, pose, camera, rng.getrandbits(48), path)


def build(root: Path, set_name: str, sizes: Sizes, seed: int, workers: int, say=print) -> None:
    """Write a set under root in its real layout, unless it is there already with the same manifest town.json.

    It is drawn in a scratch folder and renamed when complete. Raises UserError if its folder holds anything else.
    """
    folder, scratch = root / FOLDERS[set_name], root / f"{FOLDERS[set_name]}.tmp"
    twins = [[number + FIRST_ID[set_name] for number in pair] for pair in twin_pairs(sizes)]
    manifest = json.dumps({"note": NOTE, "version": VERSION, "set": set_name, "seed": seed, "sizes": sizes,
                           "look": asdict(DOMAINS[set_name]), "twins": twins}, indent=1)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{set_name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                    # a second run waits for the first
        if (folder / "town.json").is_file() and (folder / "town.json").read_bytes() == manifest.encode():
            return
        if folder.exists():
            raise UserError(f"{folder} was not drawn here, or with another seed or other sizes: move it away.")
        to_draw = list(shots(set_name, sizes, seed))
        say(f"{folder}: drawing demo data: {len(to_draw)} {NOTE}")
        shutil.rmtree(scratch, ignore_errors=True)          # left by a run that was stopped
        records = defaultdict(list)                         # of each annotation file
        drawn = in_processes(partial(_draw, scratch, set_name), to_draw, workers, chunk=40)
        for number, (name, record) in enumerate(drawn):
            start = number // PART * PART
            records[name.format(start, start + PART)].append(json.dumps(record))
        for name, lines in records.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            write_text(scratch / name, "[\n" + ",\n".join(lines) + "\n]\n")
        write_text(scratch / "town.json", manifest)
        scratch.rename(folder)


def _draw(folder: Path, set_name: str, shot: Shot) -> tuple[str, dict]:
    """Draw and save one image. Returns the name of its annotation file and its record, in the set's own format."""
    image, boxes = render(shot.person, shot.pose, set_name, shot.camera, shot.seed)
    file = folder / "imgs" / shot.path
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, file, quality=95)
    words = [describe(shot.person, shot.pose.view, boxes, random.Random(f"{shot.seed}/{i}")) for i in (0, 1)]
    captions = [one.caption for one in words]
    if set_name == "source" and shot.split == "test":
        return "finetune/sda_test.json", {"image": shot.path, "caption": captions, "image_id": shot.identity}
    if set_name == "source":        # in the file's name "{}" stands for the numbers of its records
        return "sda_{}_{}.json", source_record(shot, words[0])
    path = "img_path" if set_name == "rstp" else "file_path"
    record = {"split": shot.split, "captions": captions, path: shot.path, "id": shot.identity}
    if set_name == "cuhk":
        tokens = [caption.replace(",", "").replace(".", "").split() for caption in captions]
        return "reid_raw.json", record | {"processed_tokens": tokens}
    if set_name == "icfg":
        return "ICFG-PEDES.json", record | {"captions": captions[:1]}
    return "data_captions.json", record


def source_record(shot: Shot, words: Words) -> dict:
    """A record in SDA's format."""
    boxes = [[round(v, 4) for v in box] for box in words.boxes]
    return {"image": shot.path, "image_id": shot.identity, "caption": words.caption, "phrases": words.phrases,
            "boxes": boxes, "logits": [0.5] * len(boxes)}       # the real ones: a model's confidence


def ready(dataset: str, tiny: bool, say=print) -> Path:
    """The demo town's folder below the working directory; a set `dataset` of the town that it lacks is drawn first."""
    root = Path("data/demo-tiny" if tiny else "data/demo")
    set_name = "source" if dataset == "sda" else dataset
    if set_name in FOLDERS:
        sizes = TINY if tiny else DEFAULT
        build(root, set_name, sizes[set_name], 0, os.cpu_count() or 1, say)
    return root
