"""People drawn in memory, as a camera of a domain or a random world sees them: what the study compares with."""

import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from mra.data.files import in_processes
from mra.town.drawing import Pose, render
from mra.town.people import Person, Words, describe
from mra.town.sets import shots_of

MANY = 500      # fewer are drawn before processes have started
CHUNK = 20      # portraits that a process draws at once


class Portrait(NamedTuple):
    """A drawing in memory: pixels (H, W, 3) uint8, one annotator's words, its camera or world."""
    pixels: np.ndarray
    words: Words
    camera: int


def portraits(domain: str, people: list[Person], seed: int, size: tuple[int, int], workers: int,
              poses: list[Pose] | None = None) -> list[Portrait]:
    """Each person once, as a camera of that domain meets them (or in the given pose), (H, W) = size; pure.

    With "worlds" in place of a domain each person is in a random world (worlds.py).
    """
    tasks = [(domain, person, f"{seed}/{i}", size, poses and poses[i]) for i, person in enumerate(people)]
    return list(in_processes(_portrait, tasks, workers if len(tasks) >= MANY else 1, CHUNK))


def _portrait(task: tuple) -> Portrait:
    domain, person, seed, size, pose = task
    rng = random.Random(f"portrait/{domain}/{seed}")
    if domain == "worlds":
        from tests.study import worlds  # here: with it each drawing process imports torch, which takes seconds
        shot, place = next(worlds.shots_of(0, person, 1, rng)), ()
        draw = worlds.render
    else:
        shot, place = next(shots_of(domain, "", 0, person, 1, rng)), (domain,)
        draw = render
    pose = pose or shot.pose        # the shot also has a camera or world, and a seed
    image, boxes = draw(person, pose, *place, shot.camera, shot.seed)
    return Portrait(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)),
                    describe(person, pose.view, boxes, rng), shot.camera)
