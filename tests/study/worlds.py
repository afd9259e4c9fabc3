"""People in random worlds, from which a diffusion base can learn: a stand-in for the variety of real pictures.

    python -m tests.study.worlds data/worlds                              draw 20,000 people, two images each
    python -m tests.study.worlds data/worlds --base FILE                  a trained base learns from them

Light, colour, blur, grain, compression, the camera's height and distance, and the scene are drawn anew for every
image, from wide ranges. They hold nothing of the targets: a world keeps a least distance from each of their cameras,
and its scene is drawn by a function of its own. Nobody here lives in another set. The shipped base has not learned from
them: trials.md says what a first sitting was worth.
"""

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter

from mra.config import DAD_RECIPES, AdaptConfig, UserError
from mra.data.files import in_processes, save_image, write_text
from mra.data.records import Box, RecordSet
from mra.diffusion.base import encode
from mra.diffusion.pairs import LatentPairs
from mra.formats.read import load
from mra.run import checkpoint, networks
from mra.run.command import run
from mra.run.machine import Machine
from mra.town.drawing import DOMAINS, HEIGHT, WIDTH, Domain, Pose, backdrop, camera_of, render_in
from mra.town.people import Person, describe, sample_person
from mra.town.sets import NOTE, PART, Shot, source_record

PEOPLE, IMAGES, SEED = 20_000, 2, 1
WORLDS = 1_000_000      # each number is a world
RANGES = {              # of the strengths of a world; about as wide as those of all targets together
    "exposure": (-1.6, 0.9), "gamma": (-0.5, 0.5), "saturation": (-1.4, 0.4), "red": (-0.6, 0.6), "blue": (-0.6, 0.6),
    "haze": (0, 0.22), "relief": (0.1, 1), "shadow": (0, 0.8), "noise": (0, 0.04), "blur": (0, 1), "motion": (0, 4),
    "jpeg": (3, 45), "height": (0, 0.7), "distance": (0.04, 0.24), "crop": (0, 0.07), "occlusion": (0.2, 0.2)}
APART = 0.15            # least distance of a world from each camera of a target


@cache
def targets_cameras() -> list[Domain]:
    return [camera_of(name, camera) for name in ("cuhk", "icfg", "rstp") for camera in range(DOMAINS[name].cameras)]


def distance(one: Domain, other: Domain) -> float:
    """Mean over the strengths of their differences, each as a share of its range."""
    shares = [abs(getattr(one, name) - getattr(other, name)) / (high - low)
              for name, (low, high) in RANGES.items() if high > low]
    return sum(shares) / len(shares)


def world_of(number: int) -> Domain:
    """The look of a world: a pure function of its number."""
    rng = random.Random(f"worlds/{number}")
    while True:
        strengths = {name: rng.uniform(*ends) for name, ends in RANGES.items()}
        scene = rng.choice(("plain", "random", "random"))
        world = Domain(WORLDS, scene, (0.25, 0.25, 0.25, 0.25), light=rng.uniform(-1, 1), **strengths)
        if min(distance(world, camera) for camera in targets_cameras()) >= APART:
            return world


def clutter(rng: random.Random) -> Image.Image:
    """Random shapes in random colours over two planes, (HEIGHT, 3 WIDTH): no scene of a target looks like it."""
    width, height = 3 * WIDTH, HEIGHT

    def colour(spread: float) -> tuple[int, ...]:
        grey = rng.uniform(20, 235)
        return tuple(round(min(255, max(0, grey + spread * rng.uniform(-1, 1)))) for _ in range(3))

    image = Image.new("RGB", (width, height), colour(40))
    pen, floor = ImageDraw.Draw(image), rng.uniform(0.1, 0.9) * height
    pen.polygon((0, floor, width, floor + rng.uniform(-40, 40), width, height, 0, height), colour(40))
    for _ in range(rng.randint(0, 60)):
        x, y = rng.uniform(-20, width), rng.uniform(-20, height)
        wide, high = rng.uniform(2, 70), rng.uniform(2, 70)
        shape = rng.choice((pen.rectangle, pen.ellipse, pen.line, pen.chord))
        if shape == pen.line:
            pen.line((x, y, x + rng.uniform(-1, 1) * 150, y + rng.uniform(-1, 1) * 150), colour(50), rng.randint(1, 6))
        elif shape == pen.chord:
            pen.chord((x, y, x + wide, y + high), rng.uniform(0, 360), rng.uniform(0, 360), colour(50))
        else:
            shape((x, y, x + wide, y + high), colour(50))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))


def scene_of(number: int, world: Domain, variant: int) -> Image.Image:
    """One of the six backdrops of a world, (HEIGHT, 3 WIDTH)."""
    if world.scene == "plain":
        return backdrop(f"worlds/{number}", world, variant)
    return clutter(random.Random(f"worlds/{number}/{variant}"))


def shots(people: int) -> Iterator[Shot]:
    """The images of people, each in a world of its own."""
    for number in range(people):
        rng = random.Random(f"{SEED}/worlds/0/{number}")
        yield from shots_of(number, sample_person(rng), IMAGES, rng)


def shots_of(number: int, person: Person, count: int, rng: random.Random) -> Iterator[Shot]:
    """`count` shots of one person, at most 7; the camera of a shot is the number of its world."""
    for i, world in enumerate(rng.sample(range(WORLDS), 7)[:count]):
        yaw = rng.choices((0, 180, 270, 90))[0] + rng.uniform(-20, 20)
        pose = Pose(yaw % 360, rng.uniform(0, 2 * math.pi))
        path = f"{number // 1000:03d}/{number:04d}_c{world + 1}_{i:04d}.jpg"
        yield Shot("train", number, person, pose, world, rng.getrandbits(48), path)


def render(person: Person, pose: Pose, number: int, seed: int) -> tuple[Image.Image, dict[str, Box]]:
    """The image of a person in the world of that number, and the box of each visible part."""
    world = world_of(number)
    return render_in(person, pose, world, partial(scene_of, number, world), seed)


def draw(folder: Path, shot: Shot) -> dict:
    """Draw and save one image; returns its record."""
    image, boxes = render(shot.person, shot.pose, shot.camera, shot.seed)
    file = folder / "imgs" / shot.path
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, file, quality=95)
    return source_record(shot, describe(shot.person, shot.pose.view, boxes, random.Random(f"{shot.seed}/0")))


def draw_all(folder: Path, people: int) -> None:
    """Write a set in SDA's format. Raises UserError if the folder exists."""
    if folder.exists():
        raise UserError(f"{folder} exists: move it away, or give another folder.")
    scratch = folder.with_suffix(".tmp")
    shutil.rmtree(scratch, ignore_errors=True)          # left by a run that was stopped
    records = list(in_processes(partial(draw, scratch), list(shots(people)), os.cpu_count() or 1, chunk=40))
    for start in range(0, len(records), PART):
        lines = ",\n".join(json.dumps(record) for record in records[start:start + PART])
        write_text(scratch / f"sda_{start}_{start + PART}.json", f"[\n{lines}\n]\n")
    scratch.rename(folder)
    print(f"{folder}: {len(records)} {NOTE}")


def widen(config: AdaptConfig, records: RecordSet, machine: Machine) -> None:
    """Train the U-Net of the base on, and write out/worlds-<size>/base.safetensors. An unfinished training goes on.

    Autoencoder and text encoder stay as they are, but for the scale of the latents.
    """
    base = networks.load_base(config, machine)
    images, captions, contents = networks.read_pairs(records, base.config, config.workers)
    folder, fit = Path(f"out/worlds-{config.size}"), replace(DAD_RECIPES[config.size].denoiser, steps=config.steps)
    facts = {"size": asdict(base.config), "source": "sda, then random worlds", "goes on from": checkpoint.digest(base),
             "images": len(images), "captions": len(captions), "contents": contents, "seed": config.seed}
    base.autoencoder.learn_scale(encode(base.autoencoder, images[:networks.SCALE_IMAGES]))
    base.denoiser.requires_grad_(True).text_encoder.requires_grad_(False)

    def prepare() -> networks.Loss:
        pairs = LatentPairs(base, images, captions)
        pairs.encode_captions(torch.float32)
        return pairs.loss

    networks.learn("denoiser", base.denoiser, prepare, fit, folder, facts, machine)
    facts |= {"vocab": base.tokenizer.pieces, "versions": checkpoint.VERSIONS}
    checkpoint.save(folder / "base.safetensors", checkpoint.weights(base, half=True), facts)
    print(f"{folder / 'base.safetensors'} is ready.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the set: it is drawn, or read with --base")
    parser.add_argument("--people", type=int, default=PEOPLE, help="how many people are drawn")
    parser.add_argument("--base", default="", help="file of the base that is to learn from the set")
    parser.add_argument("--size", default="demo", choices=("tiny", "demo"), help="size of that base")
    parser.add_argument("--steps", type=int, default=3600, help="of its training")
    given = parser.parse_args()
    if given.base:
        config = AdaptConfig(base=given.base, size=given.size, steps=given.steps)
        widen(config, load("sda", "train", given.folder), Machine.of("", ""))
    else:
        draw_all(given.folder / "SDA", given.people)


if __name__ == "__main__":
    run(main)
