"""The demo town: drawn pedestrians in four looks, written in the real sets' own folder layouts and formats.

No real set may be shipped, so the package draws its own: one source with the look of synthetic data (SDA) and
three targets (CUHK-PEDES, ICFG-PEDES, RSTPReid), each with cameras of its own, that differ from it in light,
colour and viewpoint: the domain gap of the MRA paper. Every strength stands in the table DOMAINS. `render` is a
pure function, so the same person in the same pose can be drawn in any domain.
Before: people.py (who is drawn, what is written). After: records.py, which reads the sets back.
"""

import dataclasses
import io
import json
import math
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mra.config import UserError
from mra.data.people import COLOURS, HAIR_COLOURS, Box, Person, Words, describe, sample_person, twin_of

VERSION = 1                     # of the drawing: sets of another version are drawn again
HEIGHT, WIDTH, SCALE = 192, 96, 4      # pixels of a file; the figure is drawn SCALE times as large
PARTS = ("hair", "headgear", "upper", "inner", "logo", "lower", "shoes", "bag", "carried")
SKINS = ((246, 212, 188), (222, 176, 140), (166, 114, 80), (104, 68, 50))
NOTE = "Drawn by mra/data/town.py: these are computer drawings of people who do not exist, not photographs.\n"


@dataclass(frozen=True)
class Domain:
    """How a set looks. Each strength is 0 where it does nothing; all are multiplied by `strength`."""
    cameras: int
    scene: str                  # plain, campus, street or hall
    views: tuple[float, float, float, float]    # chances of front, back, left, right
    strength: float = 1.0       # of everything below
    spread: float = 0.0         # how much cameras differ: a strength v varies by v * spread
    exposure: float = 0.0       # stops; > 0 is brighter
    gamma: float = 0.0          # log2 of the exponent; > 0 is darker in the middle
    saturation: float = 0.0     # log2 of the factor
    cast: tuple[float, float, float] = (0.0, 0.0, 0.0)    # white balance: stops of red, green, blue
    haze: float = 0.0           # black level, as a share of white
    relief: float = 0.0         # how dark the side away from the light is
    shadow: float = 0.0         # how dark the shadow on the ground is
    noise: float = 0.0          # standard deviation, as a share of white
    blur: float = 0.0           # pixels, standard deviation
    motion: float = 0.0         # pixels, length of the sideways smear
    jpeg: float = 0.0           # 95 - quality
    height: float = 0.0         # of the camera: big heads, short legs
    distance: float = 0.0       # share of the image that the person does not fill
    crop: float = 0.0           # misplacement, as a share of the image
    occlusion: float = 0.0      # chance of something in front


DOMAINS = {
    "source": Domain(6, "plain", (0.7, 0.1, 0.1, 0.1), 1.0, 0.3, relief=0.5, shadow=0.2, saturation=0.1, jpeg=3,
                     distance=0.06, crop=0.01),
    "cuhk": Domain(5, "campus", (0.3, 0.3, 0.2, 0.2), 1.0, 0.4, exposure=0.5, gamma=-0.3, saturation=-0.5,
                   cast=(0.2, 0.0, -0.5), haze=0.10, relief=0.7, shadow=0.5, noise=0.02, blur=0.6, jpeg=30,
                   height=0.15, distance=0.12, crop=0.06, occlusion=0.2),
    "icfg": Domain(6, "street", (0.2, 0.4, 0.2, 0.2), 1.0, 0.4, exposure=-0.9, gamma=0.25, saturation=-0.3,
                   cast=(-0.5, -0.1, 0.4), haze=0.02, relief=0.8, shadow=0.6, noise=0.03, blur=0.7, jpeg=25,
                   height=0.55, distance=0.16, crop=0.03, occlusion=0.2),
    "rstp": Domain(7, "hall", (0.25, 0.25, 0.25, 0.25), 1.0, 0.5, exposure=-0.3, gamma=-0.2, saturation=-0.9,
                   cast=(-0.2, 0.25, -0.3), haze=0.16, relief=0.5, shadow=0.3, noise=0.03, blur=0.5, motion=3.0,
                   jpeg=35, height=0.3, distance=0.2, crop=0.04, occlusion=0.25),
}


@dataclass(frozen=True)
class Camera:
    """One camera of a domain: its strengths after the spread, its scenes, where its light comes from."""
    domain: Domain
    light: float                # -1 left to 1 right, in the picture


@dataclass(frozen=True, slots=True)
class Pose:
    """`yaw` in degrees: 0 faces the camera, 90 the right of the picture; `phase` of the step in radians."""
    yaw: float
    phase: float

    @property
    def view(self) -> str:
        return ("front", "right", "back", "left")[round(self.yaw / 90) % 4]


class Picture(NamedTuple):
    """A drawn image, (HEIGHT, WIDTH) RGB, and the visible parts' boxes; "person" is all of them."""
    image: Image.Image
    boxes: dict[str, Box]


@lru_cache(maxsize=64)
def camera_of(domain: str, camera: int) -> Camera:
    """Camera number `camera` of a domain: a pure function of the table."""
    base, rng = DOMAINS[domain], random.Random(f"{domain}/{camera}")

    def vary(value: float, more: float = 0.0) -> float:
        return base.strength * (value * (1 + base.spread * rng.uniform(-1, 1)) + more * rng.uniform(-1, 1))

    strengths = {field.name: vary(getattr(base, field.name)) for field in fields(Domain)[5:] if field.name != "cast"}
    cast = tuple(vary(value, 0.15 * base.spread) for value in base.cast)
    return Camera(replace(base, cast=cast, **strengths), rng.choice((-1, 1)) * rng.uniform(0.4, 1))


class Figure:
    """A person being drawn: colour, light and part number, each SCALE times the image.

    Coordinates are those of the body: x to the person's left, y down from 0 (head) to 1 (soles), z forward.
    """

    def __init__(self, pose: Pose, camera: Camera, rng: random.Random):
        size, cam = (WIDTH * SCALE, HEIGHT * SCALE), camera.domain
        self.colour, self.light, self.part = (Image.new(mode, size) for mode in ("RGB", "L", "L"))
        self.pens = [ImageDraw.Draw(image) for image in (self.colour, self.light, self.part)]
        self.sin, self.cos = math.sin(math.radians(pose.yaw)), math.cos(math.radians(pose.yaw))
        self.tall = 0.90 - cam.distance * rng.uniform(0.3, 1)
        self.left = 0.5 * WIDTH / HEIGHT + cam.crop * rng.uniform(-1, 1)
        self.top = (1 - self.tall) * rng.uniform(0.5, 0.75) + cam.crop * rng.uniform(-1, 1)
        self.high, self.relief, self.lit = cam.height, cam.relief, camera.light

    def place(self, x, y, z) -> np.ndarray:
        """Body -> pixels of the large image, (K, 2), and the local scale (K, 1): parts near the camera are larger."""
        flat_x, near = x * self.cos + z * self.sin, z * self.cos - x * self.sin
        y = y + 0.3 * self.high * near
        zoom = 1 + self.high * (0.5 - y)
        where = np.stack([self.left + flat_x * zoom * self.tall,
                          self.top + (y + self.high * (0.5 * y - 0.5 * y * y)) * self.tall], -1)
        return where * HEIGHT * SCALE, (zoom * self.tall * HEIGHT * SCALE)[:, None]

    def tube(self, rows, colour, part: str, bands=(), folds=(), ends=(1, 1), shaded: bool = True) -> None:
        """A limb or anything like one: `rows` of (x, y, z, half its width), `ends` 1 where it is round.

        s runs from -1 to 1 across, t from 0 to 1 along: bands (s0, s1, t0, t1, colour) are a pattern's patches,
        folds (s0, t0, s1, t1) dark creases.
        """
        rows = np.asarray(rows, float)
        t = np.linspace(0, 1, 11)
        x, y, z, half = (np.interp(t, np.linspace(0, 1, len(rows)), column) for column in rows.T)
        centre, scale = self.place(x, y, z)
        along = np.gradient(centre, axis=0) + (0, 1e-3)
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        across = np.stack([along[:, 1], -along[:, 0]], -1) * half[:, None] * scale
        radius = np.linalg.norm(across, axis=1, keepdims=True)
        for i, end, sign in ((0, ends[0], -1), (-1, ends[1], 1)):
            tip = centre[i] + np.outer((.5, .85, 1), sign * end * radius[i] * along[i]) * 0.8
            caps = across[i] * np.array((.86, .5, .1))[:, None]
            if end:
                parts = (tip[::-1], centre), (caps[::-1], across), (-.001 * np.arange(3, 0, -1), t)
                if sign > 0:
                    parts = (centre, tip), (across, caps), (t, 1 + .001 * np.arange(1, 4))
                centre, across, t = (np.concatenate(part) for part in parts)

        def points(s, at) -> list[tuple[float, float]]:
            return list(zip(*(np.interp(at, t, centre[:, i]) + s * np.interp(at, t, across[:, i]) for i in (0, 1))))

        def outline(s0: float, s1: float, t0: float = -1, t1: float = 2) -> list[tuple[float, float]]:
            at = np.concatenate([[max(t0, t[0])], t[(t > t0) & (t < t1)], [min(t1, t[-1])]])
            return points(s0, at) + points(s1, at)[::-1]

        whole = outline(-1, 1)
        self.pens[0].polygon(whole, colour)
        self.pens[2].polygon(whole, 255 if part == "person" else PARTS.index(part) + 1)
        for s0, s1, t0, t1, patch in bands:
            self.pens[0].polygon(outline(s0, s1, t0, t1), patch)
        if shaded:
            for level, half, shift in ((0.5, 1, 0), (0.8, 0.86, 0.08), (1, 0.62, 0.22), (1.12, 0.28, 0.34)):
                s0, s1 = max(-1, self.lit * shift - half), min(1, self.lit * shift + half)
                self.pens[1].polygon(outline(s0, s1), int(200 * (1 + self.relief * (level - 1))))
        for s0, t0, s1, t1 in folds:
            self.pens[1].line(points(np.array((s0, s1)), np.array((t0, t1))), int(200 - 110 * self.relief), 4)

    def wide(self, side: float, deep: float) -> float:
        """Half the width seen of something with half-axes `side` and `deep`."""
        return math.hypot(side * self.cos, deep * self.sin)

    def near(self, x: float, z: float) -> float:
        return z * self.cos - x * self.sin


def rgb(colour: str, factor: float = 1.0) -> tuple[int, int, int]:
    """A named colour; its accent with factor < 1: darker, or lighter where it is dark."""
    values = np.array(COLOURS[colour], float)
    values = values * factor if values.max() > 90 else values + 150 * (1 - factor)
    return tuple(int(v) for v in values)


def draw(figure: Figure, person: Person, pose: Pose) -> None:
    """The whole person, from the farthest part to the nearest."""
    strokes = [*_legs(figure, person, pose), *_torso(figure, person), *_arms(figure, person, pose),
               *_head(figure, person), *_bag(figure, person), *_carried(figure, person)]
    for _, rows, colour, part, options in sorted(strokes, key=lambda stroke: stroke[0]):
        figure.tube(rows, colour, part, **options)


def _stroke(depth: float, rows, colour, part: str, **options) -> tuple:
    return depth, rows, colour, part, options


def _stout(person: Person) -> float:
    return {"slim": 0.84, "average": 1.0, "heavy": 1.24}[person.build]


def _legs(figure: Figure, person: Person, pose: Pose) -> list[tuple]:
    colour, strokes, stout = rgb(person.lower_colour), [], _stout(person)
    widths = {"trousers": (.070, .056, .050), "jeans": (.064, .046, .038), "leggings": (.054, .037, .025),
              "shorts": (.068, .068)}.get(person.lower)
    for side in (1, -1):
        angle = 0.42 * math.sin(pose.phase) * side
        shin = angle - 0.1 - max(0.0, -angle) * 0.7
        hip = np.array((side * .052, .48, 0))
        knee = hip + (side * .004, .240 * math.cos(angle), .240 * math.sin(angle))
        ankle = knee + (0, .230 * math.cos(shin), .230 * math.sin(shin))
        depth = -10 + figure.near(side * .05, knee[2])

        def limb(stops, sizes) -> list:
            return [(*stop, size * stout) for stop, size in zip(stops, sizes)]

        strokes.append(_stroke(depth, limb((hip, knee, ankle), (.05, .042, .026)), SKINS[person.skin], "person"))
        if widths:
            stops = (hip, hip * .08 + knee * .92) if person.lower == "shorts" else (hip, knee, ankle)
            worn = [(-.4, .5, .12, .42, rgb(person.lower_colour, .72)), (-1, 1, .92, 2, rgb(person.lower_colour, .6))]
            folds = [(-1, .46, .1, .52), (1, .5, -.1, .56), (-.9, .9, .2, .94), (side, .04, -side * .5, .14)]
            strokes.append(_stroke(depth + .001, limb(stops, widths), colour, "lower", ends=(1, 0),
                                   folds=folds, bands=worn if person.lower == "jeans" else ()))
        over = .002 if person.shoes == "boots" else .0005
        if person.shoes == "boots":
            strokes.append(_stroke(depth + .0015, limb((knee * .55 + ankle * .45, ankle), (.046, .038)),
                                   rgb(person.shoes_colour), "shoes", ends=(0, 1)))
        sole = [(-1, -.45, -1, 2, (250, 250, 250) if person.shoes_colour != "white" else (150, 150, 155))]
        foot = [(*(ankle + (0, .008, -.015)), .030), (*(ankle + (side * .008, .030, .075)), .031)]
        strokes.append(_stroke(depth + over, foot, rgb(person.shoes_colour), "shoes",
                               bands=sole if person.shoes == "sneakers" else ()))
    if widths:
        seat = [(0, .46, 0, figure.wide(.092, .075) * stout), (0, .56, 0, figure.wide(.062, .066) * stout)]
        strokes.append(_stroke(-9.85, seat, colour, "lower", ends=(0, 1), shaded=figure.cos ** 2 < .3))
    else:
        end, flare = (.70, .135) if person.lower == "skirt" else (.90, .16)
        rows = [(0, .46, 0, figure.wide(.088, .07) * stout), (0, end, 0, figure.wide(flare, flare * .9))]
        folds = [(s * .8, .2, s, 1) for s in (-.7, -.35, 0, .35, .7)]
        strokes.append(_stroke(-5, rows, colour, "lower", folds=folds, ends=(0, 0)))
    return strokes


def _pattern(person: Person) -> list[tuple]:
    """The patches of the upper garment's pattern, torso and sleeves alike; coarse enough for a small image."""
    second = rgb(person.pattern_colour) if person.pattern_colour else None
    rows = [(-1, 1, t, t + .11, second) for t in np.arange(.08, 1, .22)]
    columns = [(s, s + .24, -1, 2, second) for s in (-.8, -.12, .56)]
    return {"striped": rows, "checked": columns + [(a, b, t, t + .07, c) for a, b, t, _, c in rows],
            "two-tone": [(-1, 1, .5, 2, second)]}.get(person.pattern, [])


def _torso(figure: Figure, person: Person) -> list[tuple]:
    stout, front = _stout(person), figure.cos > .3
    shoulder, waist = (.104, .090) if person.gender == "man" else (.092, .076)
    hem = .65 if person.upper == "coat" else .53
    ys = (.158, .172, .20, .30, .42, .50, hem)
    sides = (.046, .070, shoulder, shoulder, waist, .096, .120 if person.upper == "coat" else .098)
    rows = [(0, y, 0, figure.wide(side, .074) * (1 if i < 3 else stout)) for i, (y, side) in enumerate(zip(ys, sides))]
    dark = rgb(person.upper_colour, .6)
    details = {"jacket": [(-.05, .05, -1, 2, dark)] * front + [(-1, 1, .92, 2, dark)],
               "coat": [(-.04, .04, -1, 2, dark)] * front + [(-1, 1, .62, .66, dark)],
               "shirt": [(-.05, .05, -1, 2, rgb(person.upper_colour, .8))] * front, "sweater": [(-1, 1, .9, 2, dark)],
               "vest": [(-1, 1, t, t + .03, dark) for t in (.2, .4, .6, .8)] + [(-.05, .05, -1, 2, dark)] * front,
               "hoodie": [(-.5, .5, .68, .88, dark)] * front}.get(person.upper, [])
    strokes = [_stroke(-.001, [(0, .11, .005, .034), (0, .19, 0, .036)], SKINS[person.skin], "person"),
               _stroke(0, rows, rgb(person.upper_colour), "upper", ends=(0, 0), bands=_pattern(person) + details,
                       folds=[(-.8, .62, -.1, .70), (.85, .58, .2, .68), (-.7, .84, .1, .80), (.9, .3, .5, .42)])]
    if person.upper == "hoodie":
        hood = [(0, .125, -.035, figure.wide(.06, .03)), (0, .215, -.06, figure.wide(.085, .035))]
        strokes.append(_stroke(figure.near(0, -.05), hood, rgb(person.upper_colour, .85), "upper"))
    if person.upper == "shirt" and front:
        strokes += [_stroke(.2, [(side * .008, .168, .05, .004), (side * .05, .20, .06, .018)],
                            rgb(person.upper_colour, .8), "upper", ends=(0, 0)) for side in (1, -1)]
    if person.inner_colour and person.upper != "vest" and front:
        strokes.append(_stroke(.19, [(0, .165, .05, .034), (0, .20, .05, .046), (0, hem, .05, .050)],
                               rgb(person.inner_colour), "inner", ends=(0, 0)))
    if person.pattern == "logo" and front:
        strokes.append(_stroke(.19, [(0, .25, .06, .048), (0, .35, .06, .048)],
                               rgb(person.pattern_colour), "logo", ends=(0, 0)))
    return strokes


def _hand(pose_phase: float, side: int, still: bool) -> np.ndarray:
    """Shoulder, elbow and hand, (3, 3); an arm that carries hangs straight."""
    angle = 0.0 if still else -0.5 * math.sin(pose_phase) * side
    shoulder = np.array((side * .096, .200, 0))
    elbow = shoulder + (side * .024, .155 * math.cos(angle), .155 * math.sin(angle))
    bend = angle + (0.05 if still else 0.35)
    return np.stack([shoulder, elbow, elbow + (side * .002, .150 * math.cos(bend), .150 * math.sin(bend))])


def _sides(person: Person) -> tuple[int, int]:
    """Which side the bag is on and which hand carries: 1 is the person's left."""
    return (1, -1) if person.bag_side == "left" else (-1, 1)


def _arms(figure: Figure, person: Person, pose: Pose) -> list[tuple]:
    stout, strokes, (bag, carry) = _stout(person), [], _sides(person)
    for side in (1, -1):
        still = person.bag == "handbag" and side == bag or bool(person.carried) and side == carry
        joints = _hand(pose.phase, side, still)
        depth = figure.near(side * .14, joints[2][2]) + .02

        def limb(stops, sizes) -> list:
            return [(*stop, size * (stout + 1) / 2) for stop, size in zip(stops, sizes)]

        strokes += [_stroke(depth, limb(joints, (.034, .029, .023)), SKINS[person.skin], "person"),
                    _stroke(depth + .001, [(*joints[2], .02), (*(joints[2] + (0, .035, .006)), .022)],
                            SKINS[person.skin], "person")]
        colour, part, pattern = rgb(person.upper_colour), "upper", _pattern(person)
        if person.upper == "vest":
            colour, part = rgb(person.inner_colour), "inner"
        if person.upper == "t-shirt":
            strokes.append(_stroke(depth + .002, limb((joints[0], joints[1] * .8 + joints[0] * .2), (.038, .042)),
                                   colour, part, ends=(1, 0), bands=pattern))
        elif person.upper != "tank top":
            loose = {"coat": .043, "jacket": .042, "hoodie": .042}.get(person.upper, .037)
            strokes.append(_stroke(depth + .002, limb(joints, (loose, loose * .95, loose * .8)), colour, part,
                                   ends=(1, 0), folds=[(-.9, .45, .4, .52), (.9, .5, 0, .56)], bands=pattern if person.pattern != "two-tone" else ()))
    return strokes


def _egg(figure: Figure, top: float, bottom: float, z: float, side: float, deep: float, whole: bool = True) -> list:
    """An upright oval, or the upper half of one."""
    t = np.linspace(0, 1, 11)
    w = (1 - np.abs(2 * t - 1 if whole else 1 - t) ** 2.3) ** (1 / 2.3)
    return [(0, top + (bottom - top) * u, z, figure.wide(side, deep) * v) for u, v in zip(t, w)]


def _head(figure: Figure, person: Person) -> list[tuple]:
    hair, skin, flat = HAIR_COLOURS[person.hair_colour], SKINS[person.skin], {"ends": (0, 0)}
    strokes = [_stroke(.30, _egg(figure, 0, .160, .004, .055, .060), skin, "person", **flat),
               _stroke(.31, _egg(figure, -.014, .128, -.014, .066, .062), hair, "hair", **flat)]
    if figure.cos > -.35:
        strokes.append(_stroke(.32, _egg(figure, .028, .162, .026, .051, .038), skin, "person", **flat))
        strokes += [_stroke(.33, [(x, .080, .054, .006), (x, .090, .054, .006)], (40, 30, 30), "person", shaded=False)
                    for x in (-.020, .020) if figure.near(x, .054) > .012]
        strokes.append(_stroke(.33, [(0, .128, .054, .014 * max(figure.cos, .3)), (0, .132, .054, .008)], (170, 84, 80),
                               "person", ends=(0, 0), shaded=False))
    if person.hair == "long":
        strokes.append(_stroke(figure.near(0, -.1) * 3, [(0, .03, -.030, figure.wide(.060, .04)),
                       (0, .15, -.045, figure.wide(.074, .04)), (0, .27, -.05, figure.wide(.066, .03))], hair, "hair"))
        strokes += [_stroke(.29 + .1 * (figure.near(x, .02) > 0), [(x * .85, .06, .0, .014), (x * 1.05, .16, .02, .018),
                    (x * 1.1, .25, .04, .012)], hair, "hair") for x in (-.060, .060)]
    if person.hair == "ponytail":
        strokes.append(_stroke(.28 - figure.cos * .1 if figure.cos > 0 else .34, [(0, .04, -.065, .018),
                               (0, .10, -.10, .030), (0, .23, -.085, .014)], hair, "hair"))
    return strokes + _headgear(figure, person)


def _headgear(figure: Figure, person: Person) -> list[tuple]:
    if not person.headgear:
        return []
    colour, dark, flat = rgb(person.headgear_colour), rgb(person.headgear_colour, .7), {"ends": (0, 0)}
    top, bottom = {"cap": (-.026, .048), "hat": (-.050, .040), "beanie": (-.034, .056)}[person.headgear]
    dome = _stroke(.36, _egg(figure, top, bottom, -.006, .064, .068, False), colour, "headgear", **flat)
    if person.headgear == "cap":
        brim = [(0, .040, .04, figure.wide(.060, .008)), (0, .056, .13, figure.wide(.050, .008))]
        return [dome, _stroke(.37 if figure.cos > -.35 else .29, brim, dark, "headgear", **flat)]
    if person.headgear == "hat":
        return [dome, _stroke(.37, [(0, .026, 0, .104), (0, .042, 0, .112)], dark, "headgear", **flat)]
    return [dome, _stroke(.37, [(0, .030, -.006, figure.wide(.066, .070)), (0, .058, -.006, figure.wide(.064, .068))],
                          dark, "headgear", **flat),
            _stroke(.35, [(0, -.052, 0, .016), (0, -.034, 0, .018)], dark, "headgear")]


def _bag(figure: Figure, person: Person) -> list[tuple]:
    if not person.bag:
        return []
    colour, dark, (side, _) = rgb(person.bag_colour), rgb(person.bag_colour, .7), _sides(person)
    front = 1 if figure.cos > 0 else -1
    if person.bag == "backpack":
        straps = [_stroke(.25, [(x, .165, .05, .014), (x * 1.1, .36, .065, .014)], colour, "bag") for x in (-.068, .068)]
        body = [(0, .19, -.10, figure.wide(.098, .05)), (0, .45, -.11, figure.wide(.112, .065))]
        return [_stroke(figure.near(0, -.3), body, colour, "bag", bands=[(-.6, .6, .55, .9, dark)]),
                *straps * (figure.cos > .2)]
    if person.bag == "shoulder bag":
        strap = [(-side * .075, .165, .03 * front, .011), (0, .32, .075 * front, .011), (side * .11, .45, .05 * front, .011)]
        rows = [(side * .135, .43, .01, figure.wide(.055, .075)), (side * .135, .58, .01, figure.wide(.062, .085))]
        return [_stroke(.24, strap, dark, "bag"),
                _stroke(figure.near(side * .2, .0) + .08, rows, colour, "bag", bands=[(-1, 1, .0, .4, dark)], ends=(0, 0))]
    if person.bag == "handbag":
        x = side * .142
        rows = [(x, .565, 0, figure.wide(.045, .06)), (x, .67, 0, figure.wide(.062, .08))]
        return [_stroke(figure.near(x, 0) + .1, [(x, .515, 0, .010), (x, .57, 0, .022)], dark, "bag"),
                _stroke(figure.near(x, 0) + .11, rows, colour, "bag", bands=[(-.2, .2, .0, .3, dark)])]
    belt = [(0, .445, 0, figure.wide(.104, .075) * _stout(person)), (0, .468, 0, figure.wide(.104, .075) * _stout(person))]
    pouch = [(side * .035, .43, .09, figure.wide(.06, .03)), (side * .035, .505, .09, figure.wide(.056, .03))]
    return [_stroke(.21, belt, dark, "bag", ends=(0, 0)), _stroke(figure.near(0, .2), pouch, colour, "bag", ends=(0, 1))]


def _carried(figure: Figure, person: Person) -> list[tuple]:
    if not person.carried:
        return []
    colour, dark, (_, side) = rgb(person.carried_colour), rgb(person.carried_colour, .7), _sides(person)
    x = side * .145
    depth = figure.near(x, 0) + .1
    shapes = {
        "umbrella": [([(x, .46, .02, .008), (x, .54, .02, .008)], dark), ([(x, .54, .02, .030), (x, .92, .02, .008)], colour)],
        "suitcase": [([(x * 1.15, .52, -.03, .008), (x * 1.2, .70, -.06, .008)], dark),
                     ([(x * 1.2, .68, -.06, figure.wide(.078, .06)), (x * 1.2, .94, -.06, figure.wide(.078, .06))], colour)],
        "shopping bag": [([(x, .515, 0, .012), (x, .56, 0, .024)], dark),
                         ([(x, .555, 0, figure.wide(.066, .05)), (x, .74, 0, figure.wide(.07, .055))], colour)],
        "book": [([(side * .10, .40, .085, figure.wide(.055, .03)), (side * .10, .51, .085, figure.wide(.055, .03))], colour)],
        "skateboard": [([(x * 1.1, .36, .02, figure.wide(.030, .05)), (x * 1.1, .80, .02, figure.wide(.030, .05))], colour)],
    }[person.carried]
    return [_stroke(depth + .01 * i, rows, tint, "carried", ends=(int(person.carried == "skateboard"),) * 2)
            for i, (rows, tint) in enumerate(shapes)]


@lru_cache(maxsize=256)
def backdrop(domain: str, camera: int, variant: int) -> Image.Image:
    """An empty place with some people far off, (HEIGHT, 3 WIDTH): each camera has a few, panned for each image."""
    rng, cam = random.Random(f"{domain}/{camera}/{variant}"), camera_of(domain, camera).domain
    size = 6 * WIDTH, 2 * HEIGHT
    horizon = size[1] * (0.66 - 0.45 * cam.height + rng.uniform(-.04, .04))
    def tone(low: int, high: int, tint: int = 14) -> tuple[int, int, int]:
        grey = rng.randint(low, high)
        return tuple(min(255, max(0, grey + rng.randint(-tint, tint))) for _ in range(3))

    wall, ground = tone(130, 215), tone(110, 180)
    image = Image.new("RGB", size, wall)
    pen = ImageDraw.Draw(image)
    _wall(pen, cam.scene, size[0], horizon, tone, rng)
    pen.rectangle((0, horizon, *size), ground)
    joint = tuple(v - 18 for v in ground)
    if cam.scene != "plain":
        for x in range(-size[0], 2 * size[0], 70):
            pen.line((size[0] / 2 + (x - size[0] / 2) * .5, horizon, x * 1.6 - size[0] * .3, size[1]), joint, 2)
        for i in range(1, 9):
            y = horizon + (size[1] - horizon) * (i / 8) ** 1.8
            pen.line((0, y, size[0], y), joint, 2)
        for _ in range(rng.randint(2, 5)):
            _passer_by(pen, rng.uniform(0, size[0]), horizon + rng.uniform(5, 40), rng.uniform(90, 190), tone)
    pen.line((0, horizon, size[0], horizon), tuple(v - 40 for v in ground), 4)
    return image.reduce(2).filter(ImageFilter.GaussianBlur(0.8))


def _wall(pen: ImageDraw.ImageDraw, scene: str, width: int, horizon: float, tone, rng: random.Random) -> None:
    if scene == "plain":
        for x in range(0, width, 190):
            pen.line((x, 0, x, horizon), tone(150, 200, 4), 3)
        return
    if scene == "campus":
        for y in range(0, int(horizon), 16):
            pen.line((0, y, width, y), tone(120, 150, 6), 1)
    x = rng.uniform(-60, 0)
    while x < width:
        wide = rng.uniform(60, 150)
        if scene == "campus" and rng.random() < .4:
            pen.rectangle((x + wide / 2 - 5, 0, x + wide / 2 + 5, horizon + 6), (96, 74, 56))
            for _ in range(14):
                cx, cy, r = x + rng.uniform(0, wide), rng.uniform(-20, horizon * .55), rng.uniform(14, 34)
                pen.ellipse((cx - r, cy - r, cx + r, cy + r), (rng.randint(50, 90), rng.randint(100, 140), 60))
        elif scene == "street":
            pen.rectangle((x, horizon * .25, x + wide, horizon - 6), tone(60, 230, 40), tone(40, 80), 4)
            pen.rectangle((x, horizon * .08, x + wide, horizon * .22), tone(90, 220, 60))
        else:
            pen.rectangle((x, horizon * .12, x + wide * .8, horizon * .7), tone(90, 230, 16), tone(70, 120), 4)
            pen.line((x + wide * .4, horizon * .12, x + wide * .4, horizon * .7), tone(80, 120), 3)
        x += wide + rng.uniform(10, 70)


def _passer_by(pen: ImageDraw.ImageDraw, x: float, feet: float, tall: float, tone) -> None:
    top, bottom = tone(40, 210, 40), tone(40, 160, 30)
    for side in (-.05, .05):
        pen.line((x, feet - tall * .5, x + side * tall * 1.6, feet), bottom, int(tall * .08))
    pen.rounded_rectangle((x - tall * .12, feet - tall * .86, x + tall * .12, feet - tall * .45), tall * .06, top)
    pen.ellipse((x - tall * .06, feet - tall, x + tall * .06, feet - tall * .85), tone(110, 200, 25))


def render(person: Person, pose: Pose, domain: str, camera: int, seed: int) -> Picture:
    """Draw `person`, (HEIGHT, WIDTH), as camera number `camera` of a domain sees it. A pure function."""
    rng, camera_now = random.Random(seed), camera_of(domain, camera)
    cam = camera_now.domain
    figure = Figure(pose, camera_now, rng)
    draw(figure, person, pose)
    cover = figure.part.point(lambda v: 255 * (v > 0)).reduce(SCALE)
    pan = rng.randrange(2 * WIDTH)
    scene = _array(backdrop(domain, camera, rng.randrange(6)).crop((pan, 0, pan + WIDTH, HEIGHT)))
    scene *= 1 - cam.shadow * _array(_shadow(cover, figure))[..., None]
    alpha = _array(cover)[..., None]
    pixels = _array(figure.colour.reduce(SCALE)) * (_array(figure.light.reduce(SCALE)) * 1.275)[..., None]
    pixels = pixels + scene * (1 - alpha)
    parts = np.array(figure.part.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST))
    if rng.random() < cam.occlusion:
        _occlude(pixels, parts, rng)
    return Picture(_expose(pixels, camera_now, rng), _boxes(parts))


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _shadow(cover: Image.Image, figure: Figure) -> Image.Image:
    """The figure (H, W) laid on the ground, away from the light."""
    feet, flat, lean = (figure.top + figure.tall * .97) * HEIGHT, 0.22, figure.lit * 0.5
    shape = cover.transform(cover.size, Image.Transform.AFFINE,
                            (1, -lean / flat, lean * feet / flat, 0, 1 / flat, feet - feet / flat), Image.Resampling.BILINEAR)
    return shape.filter(ImageFilter.GaussianBlur(1.5))


def _occlude(pixels: np.ndarray, parts: np.ndarray, rng: random.Random) -> None:
    """A post beside the person or a barrier before the feet, over pixels (H, W, 3) and parts (2H, 2W)."""
    tint = np.float32([rng.uniform(.2, .7)] * 3)
    if rng.random() < 0.5:
        left = int(WIDTH * rng.choice((rng.uniform(.12, .3), rng.uniform(.62, .8))))
        area = (slice(None), slice(left, left + rng.randint(5, 9)))
    else:
        area = (slice(int(HEIGHT * rng.uniform(.80, .90)), None), slice(None))
    pixels[area] = tint * np.linspace(1.2, .7, pixels[area].shape[1], dtype=np.float32)[:, None]
    parts[tuple(slice(side.start and side.start * 2, side.stop and side.stop * 2) for side in area)] = 0


def _expose(pixels: np.ndarray, camera: Camera, rng: random.Random) -> Image.Image:
    """What light, lens, sensor and compression make of the scene (H, W, 3)."""
    cam, noise = camera.domain, np.random.default_rng(rng.getrandbits(64))
    across = np.linspace(-1, 1, WIDTH, dtype=np.float32)[:, None]
    pixels = pixels * (1 + 0.25 * cam.relief * camera.light * across)
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * 2 ** cam.saturation
    pixels = pixels * np.float32([2 ** (cam.exposure + stop) for stop in cam.cast])
    pixels = cam.haze + (1 - cam.haze) * np.clip(pixels, 0, 1) ** (2 ** cam.gamma)
    smear = round(cam.motion)
    if smear > 1:
        pixels = sum(np.roll(pixels, i - smear // 2, 1) for i in range(smear)) / smear
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + .5).astype(np.uint8))
    if cam.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(cam.blur))
    grain = noise.standard_normal((HEIGHT, WIDTH, 4), np.float32)
    pixels = _array(image) + cam.noise * (0.8 * grain[..., :1] + 0.5 * grain[..., 1:])
    packed = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255 + .5).astype(np.uint8)).save(packed, "JPEG", quality=round(95 - cam.jpeg))
    return Image.open(packed).convert("RGB")


def _boxes(parts: np.ndarray) -> dict[str, Box]:
    """(2H, 2W) part numbers -> the box of every part of which enough is seen."""
    height, width = parts.shape
    seen = {part: parts == i for i, part in enumerate(PARTS, 1)}
    seen |= {"upper": seen["upper"] | seen["inner"] | seen["logo"], "person": parts > 0}
    boxes = {}
    for part, mask in seen.items():
        if mask.sum() < 160:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        (top, bottom), (left, right) = ((int(v[0]), int(v[-1]) + 1) for v in (rows, columns))
        boxes[part] = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width,
                       (bottom - top) / height)
    return boxes


@dataclass(frozen=True)
class TownSizes:
    """People of each split and images of each person. ICFG-PEDES has no val split: those people train."""
    source_train: tuple[int, int] = (3000, 2)
    source_test: tuple[int, int] = (200, 3)
    target_train: tuple[int, int] = (400, 4)
    target_val: tuple[int, int] = (100, 3)
    target_test: tuple[int, int] = (240, 3)

    def times(self, factor: float) -> "TownSizes":
        """The same town with `factor` times the people."""
        return TownSizes(**{field.name: (max(2, round(getattr(self, field.name)[0] * factor)),
                                         getattr(self, field.name)[1]) for field in fields(self)})

    def splits(self, set_name: str) -> list[tuple[str, int, int]]:
        """(split as written, people, images of each)."""
        if set_name == "source":
            return [("train", *self.source_train), ("test", *self.source_test)]
        val = ("train" if set_name == "icfg" else "val", *self.target_val)
        return [("train", *self.target_train), val, ("test", *self.target_test)]


DEFAULT = TownSizes()
TINY = TownSizes((6, 2), (4, 3), (4, 3), (2, 2), (6, 3))
FOLDERS = {"source": "SDA", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
CUHK_CAMERAS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market")
TWIN_SHARE = 0.3    # of the test identities are one of a pair that differs in one attribute
PART_RECORDS, CHUNK = 5000, 20


class Shot(NamedTuple):
    """All that an image is made of; `path` is relative to the image folder imgs."""
    split: str
    identity: int
    person: Person
    pose: Pose
    camera: int
    seed: int
    path: str


def shots(set_name: str, sizes: TownSizes, seed: int, start: int = 0, stop: int | None = None) -> Iterator[Shot]:
    """The shots of people start to stop of a set, counted over its splits; pure, any part alone."""
    first = 0
    for part, (split, people, images) in enumerate(sizes.splits(set_name)):
        for number in range(max(0, start - first), min(people, (stop or first + people) - first)):
            place = f"{seed}/{set_name}/{part}/"
            person = sample_person(random.Random(f"{place}{number}"))
            if _twin(split, people, number):
                person = twin_of(sample_person(random.Random(f"{place}{number - 1}")), random.Random(f"{place}{number}"))
            yield from _shots_of(set_name, split, first + number, person, images, random.Random(f"{place}{number}/shots"))
        first += people


def _twin(split: str, people: int, number: int) -> bool:
    return split == "test" and number % 2 == 1 and number <= TWIN_SHARE * people


def _shots_of(set_name: str, split: str, number: int, person: Person, images: int, rng: random.Random) -> Iterator[Shot]:
    domain = DOMAINS[set_name]
    order = rng.sample(range(domain.cameras), domain.cameras)
    identity = number + (set_name == "cuhk")
    for i in range(images):
        camera = order[i % len(order)]
        yaw = rng.choices((0, 180, 270, 90), domain.views)[0] + rng.uniform(-20, 20)
        seed, name = rng.getrandbits(48), f"{identity:04d}_c{camera + 1}_{i:04d}.jpg"
        folder = {"source": f"{number // 1000:03d}/", "cuhk": f"{CUHK_CAMERAS[camera % 5]}/", "rstp": "",
                  "icfg": f"{split}/{identity:04d}/"}[set_name]
        yield Shot(split, identity, person, Pose(yaw % 360, rng.uniform(0, 2 * math.pi)), camera, seed, folder + name)


def build(root: Path, set_name: str, sizes: TownSizes, seed: int, workers: int, say=print) -> None:
    """Write a set under root in its real layout, unless its manifest says that it is there already.

    The manifest town.json comes last, by renaming: a set without it is drawn again. Raises UserError when the
    folder holds anything that was not drawn here.
    """
    folder = Path(root) / FOLDERS[set_name]
    people = sum(count for _, count, _ in sizes.splits(set_name))
    manifest = {"drawn": NOTE.strip(), "version": VERSION, "set": set_name, "seed": seed,
                "sizes": {name: list(value) for name, value in dataclasses.asdict(sizes).items()},
                "twins": _twins(set_name, sizes)}
    images = sum(count * each for _, count, each in sizes.splits(set_name))
    say(f"{folder}: drawn data, not photographs: {images} computer drawings of {people} people who do not exist")
    if (folder / "town.json").is_file() and json.loads((folder / "town.json").read_text()) == manifest:
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / "DRAWN.txt").is_file():
        raise UserError(f"{folder} holds files that were not drawn here; choose another root for the demo town")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "imgs").mkdir(parents=True)
    (folder / "DRAWN.txt").write_text(NOTE)
    _write_records(folder, set_name, _drawn(folder, set_name, sizes, seed, people, workers, images, say))
    (folder / "town.part").write_text(json.dumps(manifest, indent=1))
    os.replace(folder / "town.part", folder / "town.json")


def _twins(set_name: str, sizes: TownSizes) -> list[list[int]]:
    *before, (split, people, _) = sizes.splits(set_name)
    first = sum(count for _, count, _ in before) + (set_name == "cuhk")
    return [[first + i - 1, first + i] for i in range(people) if _twin(split, people, i)]


def _drawn(folder, set_name, sizes, seed, people, workers, images, say) -> Iterator[tuple[Shot, list[Words]]]:
    """Draw everything in several processes; yields in order, whatever their number."""
    tasks = [(folder, set_name, sizes, seed, start, min(people, start + CHUNK)) for start in range(0, people, CHUNK)]
    done = 0
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else _Alone() as pool:
        for chunk in pool.imap(_draw_chunk, tasks):
            if (done + len(chunk)) // 5000 > done // 5000:
                say(f"  {done + len(chunk)} of {images} images drawn")
            done += len(chunk)
            yield from chunk


class _Alone:
    """A pool of this process only."""
    imap = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


def _draw_chunk(task) -> list[tuple[Shot, list[Words]]]:
    folder, set_name, sizes, seed, start, stop = task
    made = []
    for shot in shots(set_name, sizes, seed, start, stop):
        picture = render(shot.person, shot.pose, set_name, shot.camera, shot.seed)
        path = folder / "imgs" / shot.path
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.image.save(path, quality=95)
        count = 1 if set_name == "icfg" or set_name == "source" and shot.split == "train" else 2
        made.append((shot, [describe(shot.person, shot.pose.view, picture.boxes, random.Random(f"{shot.seed}/{i}"))
                            for i in range(count)]))
    return made


def _write_records(folder: Path, set_name: str, made: Iterator[tuple[Shot, list[Words]]]) -> None:
    """Annotations in the set's own format, written as they come."""
    name = {"cuhk": "reid_raw.json", "icfg": "ICFG-PEDES.json", "rstp": "data_captions.json"}.get(set_name)
    file, current, opened = None, None, 0
    for number, (shot, words) in enumerate(made):
        wanted = name or (f"sda_{number // PART_RECORDS * PART_RECORDS}_{(number // PART_RECORDS + 1) * PART_RECORDS}.json"
                          if shot.split == "train" else "finetune/sda_test.json")
        if wanted != current:
            if file:
                file.write("\n]\n")
                file.close()
            (folder / wanted).parent.mkdir(exist_ok=True)
            file, current, opened = open(folder / wanted, "w", encoding="utf-8"), wanted, number
        file.write(("[\n" if number == opened else ",\n") + json.dumps(_record(set_name, shot, words)))
    file.write("\n]\n")
    file.close()


def _record(set_name: str, shot: Shot, words: list[Words]) -> dict:
    captions = [one.caption for one in words]
    if set_name == "source" and shot.split == "train":
        rng = random.Random(f"{shot.seed}/logits")
        return {"image": shot.path, "boxes": [[round(v, 4) for v in box] for box in words[0].boxes],
                "logits": [round(rng.uniform(0.35, 0.9), 4) for _ in words[0].boxes], "phrases": list(words[0].phrases),
                "caption": captions[0], "image_id": shot.identity}
    if set_name == "source":
        return {"image": shot.path, "caption": captions, "image_id": shot.identity}
    path = "img_path" if set_name == "rstp" else "file_path"
    record = {"split": shot.split, "captions": captions, path: shot.path, "id": shot.identity}
    tokens = [caption.replace(",", "").replace(".", "").split() for caption in captions]
    return record | ({"processed_tokens": tokens} if set_name == "cuhk" else {})
