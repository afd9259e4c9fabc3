"""A person drawn as a camera of one of four domains sees them: `render`, a pure function.

The source has the look of synthetic data. Three targets, each with cameras of its own, differ from it in light, colour
and viewpoint: the domain gap of the MRA paper. Every strength stands in the table DOMAINS. A figure is drawn from
strokes in body coordinates, then lit, put into a place, and exposed. Read next: sets.py, which draws whole sets.
"""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mra.data import Box
from mra.town.people import Person

VERSION = 1                     # of the drawing: sets of another version are drawn again
HEIGHT, WIDTH, SCALE = 192, 96, 4      # pixels of a file; the figure is drawn SCALE times as large
PARTS = ("hair", "headgear", "upper", "inner", "logo", "lower", "shoes", "bag", "carried")
PAINT = {"": (0, 0, 0), "black": (30, 30, 34), "white": (240, 240, 236), "grey": (134, 136, 140), "red": (206, 30, 38),
         "blue": (48, 112, 222), "navy": (28, 36, 104), "green": (34, 140, 62), "yellow": (244, 208, 40),
         "orange": (242, 124, 24), "purple": (122, 52, 160), "pink": (244, 138, 180), "brown": (112, 66, 34)}
HAIR_PAINT = {"black": (26, 22, 24), "brown": (92, 54, 28), "blond": (232, 196, 108), "grey": (168, 168, 172),
              "red": (172, 70, 24)}
SKINS = ((246, 212, 188), (222, 176, 140), (166, 114, 80), (104, 68, 50))
STOUT = {"slim": 0.84, "average": 1.0, "heavy": 1.24}
FLAT, BOTH = (0, 0), (1, 1)     # which ends of a stroke are round
FIRST, LAST = (1, 0), (0, 1)
SHADES = ((0.5, 1, 0), (0.8, 0.86, 0.08), (1, 0.62, 0.22), (1.12, 0.28, 0.34))   # brightness, half width, shift


@dataclass(frozen=True)
class Domain:
    """How a set looks. From exposure on: strengths, 0 where they do nothing, all times `strength`."""
    cameras: int
    scene: str                  # plain, campus, street or hall
    views: tuple[float, float, float, float]    # chances of front, back, left, right
    strength: float = 1.0
    spread: float = 0.0         # how much cameras differ: a strength v varies by v * spread
    light: float = 0.0          # of a camera: where the light comes from, -1 left to 1 right
    exposure: float = 0.0       # stops; > 0 is brighter
    gamma: float = 0.0          # log2 of the exponent; > 0 is darker in the middle
    saturation: float = 0.0     # log2 of the factor
    red: float = 0.0            # white balance: stops of red, and of blue
    blue: float = 0.0
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
    "source": Domain(6, "plain", (0.7, 0.1, 0.1, 0.1), spread=0.3, saturation=0.1, relief=0.5, shadow=0.2,
                     jpeg=3, distance=0.06, crop=0.01),
    "cuhk": Domain(5, "campus", (0.3, 0.3, 0.2, 0.2), 0.9, spread=0.4, exposure=0.5, gamma=-0.3,
                   saturation=-0.5, red=0.2, blue=-0.5, haze=0.10, relief=0.7, shadow=0.5, noise=0.02,
                   blur=0.6, jpeg=30, height=0.15, distance=0.12, crop=0.06, occlusion=0.2),
    "icfg": Domain(6, "street", (0.2, 0.4, 0.2, 0.2), 0.5, spread=0.4, exposure=-0.9, gamma=0.25,
                   saturation=-0.3, red=-0.4, blue=0.5, haze=0.02, relief=0.8, shadow=0.6, noise=0.03,
                   blur=0.7, jpeg=25, height=0.55, distance=0.16, crop=0.03, occlusion=0.2),
    "rstp": Domain(7, "hall", (0.25, 0.25, 0.25, 0.25), 0.8, spread=0.5, exposure=-0.2, gamma=-0.2,
                   saturation=-0.9, red=-0.45, blue=-0.5, haze=0.16, relief=0.5, shadow=0.3, noise=0.03,
                   blur=0.5, motion=3.0, jpeg=35, height=0.3, distance=0.2, crop=0.04, occlusion=0.25)}


@dataclass(frozen=True, slots=True)
class Pose:
    """`yaw` in degrees: 0 faces the camera, 90 the right of the picture; `phase` of the step in radians."""
    yaw: float
    phase: float

    @property
    def view(self) -> str:
        return ("front", "right", "back", "left")[round(self.yaw / 90) % 4]


class Stroke(NamedTuple):
    """A limb or anything like one, in body coordinates (see Figure).

    rows: (x, y, z, half its width[, half its depth]). With s from -1 to 1 across and t from 0 to 1 along it,
    bands (s0, s1, t0, t1, colour) are the patches of a pattern, folds (s0, t0, s1, t1) are dark creases.
    """
    part: str
    colour: tuple[int, int, int]
    rows: list
    ends: tuple[int, int] = FLAT
    bands: list = []
    folds: list = []


Groups = Iterator[tuple[float, list[Stroke]]]      # strokes that lie on each other, with how near they are


@lru_cache(maxsize=64)
def camera_of(domain: str, camera: int) -> Domain:
    """The domain as its camera number `camera` sees it: a pure function of the table."""
    base, rng = DOMAINS[domain], random.Random(f"{domain}/{camera}")
    names = [field.name for field in fields(Domain)]
    strengths = {name: getattr(base, name) * (base.strength * (1 + base.spread * rng.uniform(-1, 1)))
                 for name in names[names.index("exposure"):]}
    return replace(base, light=rng.choice((-1, 1)) * rng.uniform(0.4, 1), **strengths)


class Figure:
    """A person being drawn: colour, light and part number, each SCALE times the image.

    Body coordinates: x to the person's left, y down from 0 (head) to 1 (soles), z forward.
    """

    def __init__(self, pose: Pose, cam: Domain, rng: random.Random):
        size = WIDTH * SCALE, HEIGHT * SCALE
        self.colour, self.light, self.part = Image.new("RGB", size), Image.new("L", size, 200), Image.new("L", size)
        self.pens = [ImageDraw.Draw(image) for image in (self.colour, self.light, self.part)]
        self.sin, self.cos = math.sin(math.radians(pose.yaw)), math.cos(math.radians(pose.yaw))
        self.tall = 0.90 - cam.distance * rng.uniform(0.3, 1)
        self.left = 0.5 * WIDTH / HEIGHT + cam.crop * rng.uniform(-1, 1)
        self.top = (1 - self.tall) * rng.uniform(0.5, 0.75) + cam.crop * rng.uniform(-1, 1)
        self.cam, self.phase = cam, pose.phase

    def near(self, x: float, z: float) -> float:
        return z * self.cos - x * self.sin

    def draw(self, stroke: Stroke) -> None:
        centre, across = self._shape(stroke)
        t = (np.arange(len(centre)) - 3 * stroke.ends[0]) / 10

        def along(places) -> list[np.ndarray]:      # centre and side there, (len(places), 2) each
            return [np.stack([np.interp(places, t, values) for values in line.T], -1) for line in (centre, across)]

        def patch(s0: float, s1: float, middle=centre, side=across) -> list[float]:
            return np.concatenate([middle + s0 * side, (middle + s1 * side)[::-1]]).ravel().tolist()

        colour, light, part = self.pens
        whole = patch(-1, 1)
        colour.polygon(whole, stroke.colour)
        part.polygon(whole, 255 if stroke.part == "person" else PARTS.index(stroke.part) + 1)
        for s0, s1, t0, t1, paint in stroke.bands:
            places = np.concatenate([[max(t0, t[0])], t[(t > t0) & (t < t1)], [min(t1, t[-1])]])
            colour.polygon(patch(s0, s1, *along(places)), paint)
        for level, half, shift in SHADES:
            s0, s1 = max(-1, self.cam.light * shift - half), min(1, self.cam.light * shift + half)
            light.polygon(patch(s0, s1), int(200 * (1 + self.cam.relief * (level - 1))))
        for s0, t0, s1, t1 in stroke.folds:
            middle, side = along((t0, t1))
            light.line((middle + np.array([[s0], [s1]]) * side).ravel().tolist(), int(200 - 110 * self.cam.relief), 4)

    def _shape(self, stroke: Stroke) -> tuple[np.ndarray, np.ndarray]:
        """Centre line of a stroke and the vector to one side, (K, 2) pixels each; higher up is larger."""
        rows, high = np.asarray(stroke.rows, float), self.cam.height
        at, knots = np.linspace(0, 1, 11), np.linspace(0, 1, len(rows))
        x, y, z, side, deep = (np.interp(at, knots, rows[:, i]) for i in (0, 1, 2, 3, -1))
        y = y + 0.3 * high * self.near(x, z)
        zoom = (1 + high * (0.5 - y)) * self.tall * HEIGHT * SCALE
        centre = np.stack([self.left * HEIGHT * SCALE + (x * self.cos + z * self.sin) * zoom,
                           (self.top + (y + high * 0.5 * y * (1 - y)) * self.tall) * HEIGHT * SCALE], -1)
        along = np.gradient(centre, axis=0) + (0, 1e-3)
        along *= (np.hypot(side * self.cos, deep * self.sin) * zoom / np.hypot(*along.T))[:, None]
        across = np.stack([along[:, 1], -along[:, 0]], -1)
        first, last = stroke.ends
        if first:       # a round end is three points more
            centre = np.concatenate([centre[0] - np.outer((.8, .68, .4), along[0]), centre])
            across = np.concatenate([np.outer((.1, .5, .86), across[0]), across])
        if last:
            centre = np.concatenate([centre, centre[-1] + np.outer((.4, .68, .8), along[-1])])
            across = np.concatenate([across, np.outer((.86, .5, .1), across[-1])])
        return centre, across


def paint(colour: str, factor: float = 1.0) -> tuple[int, int, int]:
    """A named colour; with factor < 1 its accent: darker, or lighter where it is dark."""
    values = PAINT[colour]
    if max(values) > 90:
        return tuple(int(v * factor) for v in values)
    return tuple(int(v + 120 * (1 - factor)) for v in values)


def _limb(stops, widths, stout: float = 1.0) -> list:
    return [(*stop, width * stout) for stop, width in zip(stops, widths)]


def _egg(top: float, bottom: float, z: float, side: float, deep: float, whole: bool = True) -> list:
    """An upright oval, or the upper half of one."""
    t = np.linspace(0, 1, 11)
    w = (1 - np.abs(2 * t - 1 if whole else 1 - t) ** 2.3) ** (1 / 2.3)
    return [(0, top + (bottom - top) * u, z, side * v, deep * v) for u, v in zip(t, w)]


def _legs(figure: Figure, person: Person) -> Groups:
    cloth, shoe, stout = paint(person.lower_colour), paint(person.shoes_colour), STOUT[person.build]
    widths = {"trousers": (.070, .056, .050), "jeans": (.064, .046, .038), "leggings": (.054, .037, .025),
              "shorts": (.068, .068)}.get(person.lower)
    worn, sole, pleats = [], [], []
    if person.lower == "jeans":
        worn = [(-.4, .5, .12, .42, paint(person.lower_colour, .85)), (-1, 1, .92, 2, paint(person.lower_colour, .6))]
    if person.shoes == "sneakers":
        sole = [(-1, -.45, -1, 2, paint("grey" if person.shoes_colour == "white" else "white"))]
    if "skirt" in person.lower:
        pleats = [(s * .8, .2, s, 1) for s in (-.7, -.35, 0, .35, .7)]
    for side in (1, -1):
        thigh = 0.42 * math.sin(figure.phase) * side
        shin = thigh - 0.1 - max(0.0, -thigh) * 0.7
        hip = np.array((side * .052, .48, 0))
        knee = hip + (side * .004, .240 * math.cos(thigh), .240 * math.sin(thigh))
        ankle = knee + (0, .230 * math.cos(shin), .230 * math.sin(shin))
        heel, toe = ankle + (0, .008, -.015), ankle + (side * .008, .030, .075)
        stops = (hip, knee * .9 + ankle * .1) if person.lower == "shorts" else (hip, knee, ankle)
        folds = [(-1, .46, .1, .52), (1, .5, -.1, .56), (-.9, .9, .2, .94), (side, .04, -side * .5, .14)]
        skin = Stroke("person", SKINS[person.skin], _limb((hip, knee, ankle), (.05, .042, .026), stout), BOTH)
        leg = [Stroke("lower", cloth, _limb(stops, widths, stout), FIRST, worn, folds)] if widths else []
        foot = Stroke("shoes", shoe, _limb((heel, toe), (.030, .031)), BOTH, sole)
        parts = [skin, foot, *leg]
        if person.shoes == "boots":     # over the leg
            shaft = Stroke("shoes", shoe, _limb((knee * .55 + ankle * .45, ankle), (.046, .038), stout), LAST)
            parts = [skin, *leg, shaft, foot]
        yield -10 + figure.near(side * .05, knee[2]), parts
    flare, hem = {"skirt": (.135, .70), "long skirt": (.16, .90)}.get(person.lower, (.062, .56))
    rows = [(0, .46, 0, .09 * stout, .075 * stout), (0, hem, 0, flare, flare * .9)]
    yield -5, [Stroke("lower", cloth, rows, folds=pleats)]


def _pattern(person: Person) -> list[tuple]:
    """The bands of the upper garment's pattern, on torso and sleeves; coarse enough for a small image."""
    second, places = paint(person.pattern_colour), (.08, .30, .52, .74, .96)
    if person.pattern == "striped":
        return [(-1, 1, t, t + .11, second) for t in places]
    if person.pattern == "checked":
        return ([(s, s + .24, -1, 2, second) for s in (-.8, -.12, .56)]
                + [(-1, 1, t, t + .07, second) for t in places])
    return [(-1, 1, .5, 2, second)] if person.pattern == "two-tone" else []


def _torso(figure: Figure, person: Person) -> Groups:
    colour, dark = paint(person.upper_colour), paint(person.upper_colour, .6)
    stout, front = STOUT[person.build], figure.cos > .3
    shoulder, waist = (.104, .090) if person.gender == "man" else (.092, .076)
    hem, wide = (.63, .120) if person.upper == "coat" else (.53, .098)
    rows = [(0, .158, 0, .046, .05), (0, .172, 0, .070, .06), (0, .20, 0, shoulder, .074)]
    rows += [(0, y, 0, side * stout, .074 * stout)
             for y, side in ((.30, shoulder), (.42, waist), (.50, .096), (hem, wide))]
    middle = [(-.05, .05, -1, 2, dark)] if front else []
    details = {"jacket": [*middle, (-1, 1, .92, 2, dark)], "coat": [*middle, (-1, 1, .62, .66, dark)],
               "vest": [*middle, *((-1, 1, t, t + .03, dark) for t in (.2, .4, .6, .8))], "shirt": middle,
               "sweater": [(-1, 1, .9, 2, dark)], "hoodie": [(-.5, .5, .68, .88, dark)] if front else []}
    folds = [(-.8, .62, -.1, .70), (.85, .58, .2, .68), (-.7, .84, .1, .80), (.9, .3, .5, .42)]
    bands = _pattern(person) + details.get(person.upper, [])
    group = [Stroke("person", SKINS[person.skin], [(0, .11, .005, .034), (0, .19, 0, .036)]),
             Stroke("upper", colour, rows, FLAT, bands, folds)]
    if person.inner_colour and person.upper != "vest" and front:
        inner = [(0, .160, .05, .034), (0, .20, .05, .046), (0, hem, .05, .050)]
        group.append(Stroke("inner", paint(person.inner_colour), inner))
    if person.pattern == "logo" and front:
        group.append(Stroke("logo", paint(person.pattern_colour), [(0, .25, .06, .048), (0, .35, .06, .048)]))
    yield 0, group
    if person.upper == "hoodie":
        hood = [(0, .125, -.035, .06, .03), (0, .215, -.06, .085, .035)]
        yield figure.near(0, -.05), [Stroke("upper", paint(person.upper_colour, .85), hood, BOTH)]


def _arms(figure: Figure, person: Person) -> Groups:
    stout, skin, pattern = (STOUT[person.build] + 1) / 2, SKINS[person.skin], _pattern(person)
    part, colour = ("inner", person.inner_colour) if person.upper == "vest" else ("upper", person.upper_colour)
    loose = .042 if person.upper in ("coat", "jacket", "hoodie") else .037
    for side in (1, -1):
        beside_bag = (person.bag_side == "left") == (side > 0)
        still = person.bag == "handbag" if beside_bag else person.carried != ""
        swing = 0.0 if still else -0.5 * math.sin(figure.phase) * side
        bend = swing + (0.05 if still else 0.35)
        shoulder = np.array((side * .096, .200, 0))
        elbow = shoulder + (side * .024, .155 * math.cos(swing), .155 * math.sin(swing))
        wrist = elbow + (side * .002, .150 * math.cos(bend), .150 * math.sin(bend))
        arm = [Stroke("person", skin, _limb((shoulder, elbow, wrist), (.034, .029, .023), stout), BOTH),
               Stroke("person", skin, _limb((wrist, wrist + (0, .035, .006)), (.02, .022)), BOTH)]
        if person.upper == "t-shirt":
            sleeve = _limb((shoulder, elbow * .8 + shoulder * .2), (.038, .042), stout)
            arm.append(Stroke("upper", paint(colour), sleeve, FIRST, pattern))
        elif person.upper != "tank top":
            sleeve = _limb((shoulder, elbow, wrist), (loose, loose * .95, loose * .8), stout)
            bands = [] if person.pattern == "two-tone" else pattern
            folds = [(-.9, .45, .4, .52), (.9, .5, 0, .56)]
            arm.append(Stroke(part, paint(colour), sleeve, FIRST, bands, folds))
        yield figure.near(side * .14, wrist[2]) + .02, arm


def _head(figure: Figure, person: Person) -> Groups:
    hair, skin = HAIR_PAINT[person.hair_colour], SKINS[person.skin]
    group = [Stroke("person", skin, _egg(0, .160, .004, .055, .060)),
             Stroke("hair", hair, _egg(-.014, .128, -.014, .066, .062))]
    if figure.cos > -.35:
        eyes = [[(x, .080, .054, .006), (x, .090, .054, .006)] for x in (-.020, .020) if figure.near(x, .054) > .012]
        group += [Stroke("person", skin, _egg(.028, .162, .026, .051, .038)),
                  Stroke("person", (170, 84, 80), [(0, .128, .054, .014, .004), (0, .132, .054, .008, .003)]),
                  *(Stroke("person", (40, 30, 30), eye, BOTH) for eye in eyes)]
    yield 3, group
    if person.hair == "long":
        fall = [(0, .03, -.030, .060, .04), (0, .15, -.045, .074, .04), (0, .27, -.05, .066, .03)]
        yield figure.near(0, -3.5), [Stroke("hair", hair, fall, BOTH)]
        for x in (-.060, .060):
            lock = [(x * .85, .06, -.02, .014), (x * 1.05, .16, -.01, .018), (x * 1.1, .25, .01, .012)]
            yield 3.1 if figure.near(x, .02) > 0 else 2.9, [Stroke("hair", hair, lock, BOTH)]
    if person.hair == "ponytail":
        tail = [(0, .04, -.065, .018), (0, .10, -.10, .030), (0, .23, -.085, .014)]
        yield 2.8 if figure.cos > 0 else 3.1, [Stroke("hair", hair, tail, BOTH)]


def _things(figure: Figure, person: Person) -> Groups:
    """What is worn on the head, the bag and what is carried."""
    wide, ahead = STOUT[person.build], 1 if figure.cos > 0 else -1
    x, hand = (.14, -.145) if person.bag_side == "left" else (-.14, .145)
    straps = [[(s, .165, .05, .014), (s, .36, .065, .014)] for s in (-.07, .07)] if figure.cos > .2 else []
    beside, held = figure.near(x * 2, 0), figure.near(hand, 0) + .1
    kinds = {       # darker parts, how near they are | body, how near it is | a bag's darker band
        "cap": ([[(0, .040, .04, .060, .008), (0, .056, .13, .050, .008)]], 2.7 if figure.cos < -.35 else 4.1,
                _egg(-.026, .048, -.006, .064, .068, whole=False), 4),
        "hat": ([[(0, .026, 0, .104), (0, .042, 0, .112)]], 4.1,
                _egg(-.050, .040, -.006, .064, .068, whole=False), 4),
        "beanie": ([[(0, .030, 0, .066, .070), (0, .058, 0, .064, .068)]], 4.1,
                   _egg(-.034, .056, -.006, .064, .068, whole=False), 4),
        "backpack": (straps, .24, [(0, .20, -.10, .074, .05), (0, .43, -.11, .084, .065)], figure.near(0, -.3),
                     (-.6, .6, .55, .9)),
        "shoulder bag": ([[(-x / 2, .165, .03 * ahead, .011), (0, .32, .075 * ahead, .011),
                           (x * .8, .45, .05 * ahead, .011)]], .24,
                         [(x, .43, .01, .055, .075), (x, .58, .01, .062, .085)], beside, (-1, 1, 0, .4)),
        "handbag": ([[(x, .515, 0, .010), (x, .57, 0, .022)]], beside,
                    [(x, .565, 0, .045, .05), (x, .67, 0, .062, .06)], beside, (-.2, .2, 0, .3)),
        "waist bag": ([[(0, y, 0, .104 * wide, .079 * wide) for y in (.445, .468)]], .24,
                      [(x / 4, .43, .09, .06, .03), (x / 4, .51, .09, .056, .03)], figure.near(0, .22),
                      (-1, 1, .2, .3)),
        "umbrella": ([[(hand, .46, .02, .008), (hand, .54, .02, .008)]], held,
                     [(hand, .54, .02, .030), (hand, .92, .02, .008)], held),
        "suitcase": ([[(hand * 1.15, .52, -.03, .008), (hand * 1.2, .70, -.06, .008)]], held,
                     [(hand * 1.2, .68, -.06, .078, .06), (hand * 1.2, .94, -.06, .078, .06)], held),
        "shopping bag": ([[(hand, .515, 0, .012), (hand, .56, 0, .024)]], held,
                         [(hand, .555, 0, .066, .05), (hand, .74, 0, .07, .055)], held),
        "book": ([], held, [(hand * .7, .40, .085, .055, .03), (hand * .7, .51, .085, .055, .03)], held),
        "skateboard": ([[(hand * 1.1, .36, .03, .042, .04), (hand * 1.1, .60, .03, .042, .04)]], held,
                       [(hand * 1.1, .32, .02, .030, .04), (hand * 1.1, .64, .02, .030, .04)], held)}
    for part in ("headgear", "bag", "carried"):
        if getattr(person, part):
            colour = getattr(person, f"{part}_colour")
            dark_rows, dark_near, rows, near, *bands = kinds[getattr(person, part)]
            yield dark_near, [Stroke(part, paint(colour, .7), dark) for dark in dark_rows]
            yield near, [Stroke(part, paint(colour), rows, LAST if part == "bag" else FLAT,
                                [(*band, paint(colour, .7)) for band in bands])]


@lru_cache(maxsize=256)
def backdrop(domain: str, camera: int, variant: int) -> Image.Image:
    """A place with people far off, (HEIGHT, 3 WIDTH); each camera has a few, and pans over them."""
    rng, cam = random.Random(f"{domain}/{camera}/{variant}"), camera_of(domain, camera)
    width, height = 6 * WIDTH, 2 * HEIGHT
    horizon = height * (0.66 - 0.45 * cam.height + rng.uniform(-.04, .04))

    def tone(low: int, high: int, tint: int = 14) -> tuple[int, int, int]:
        grey = rng.randint(low, high)
        return tuple(min(255, max(0, grey + rng.randint(-tint, tint))) for _ in range(3))

    image = Image.new("RGB", (width, height), tone(130, 215))
    pen, ground = ImageDraw.Draw(image), tone(110, 180)
    joint = tuple(v - 18 for v in ground)
    pen.rectangle((0, horizon, width, height), ground, joint, 3)
    for x in range(rng.randint(-60, 0), width, 150):            # panels, doors, shop windows, or windows and trees
        wide = rng.randint(70, 140)
        pen.line((x, 0, x, horizon), tone(140, 190, 4), 3)
        if cam.scene != "plain":
            top, bottom, tint = {"campus": (.1, .6, 16), "street": (.25, .97, 40), "hall": (.15, 1, 16)}[cam.scene]
            pen.rectangle((x, horizon * top, x + wide, horizon * bottom), tone(70, 230, tint), tone(60, 110), 4)
            pen.line((x + wide / 2, horizon * top, x + wide / 2, horizon * bottom), tone(80, 120), 3)
        if cam.scene == "street":
            pen.rectangle((x, horizon * .08, x + wide, horizon * .2), tone(90, 220, 60))
        if cam.scene == "campus" and wide < 100:
            pen.line((x + 110, 0, x + 110, horizon + 8), (96, 74, 56), 10)
            for i in range(9):
                left, top, green = x + 60 + i % 3 * 26, -50 + i // 3 * horizon * .2, tone(70, 100, 10)
                pen.ellipse((left, top, left + 56, top + 60), (green[0] - 20, green[1] + 30, green[2] - 30))
    for i in range(0 if cam.scene == "plain" else 16):
        x, y = (i - 7.5) * 70, horizon + (height - horizon) * (i / 12) ** 1.8
        pen.line((width / 2 + x * .6, horizon, width / 2 + x * 2, height), joint, 2)
        pen.line((0, y, width, y), joint, 2)
    for _ in range(0 if cam.scene == "plain" else rng.randint(2, 5)):
        x, feet, u = rng.uniform(0, width), horizon + rng.uniform(5, 40), rng.uniform(9, 19)
        for side in (-.8, .8):
            pen.line((x, feet - 5 * u, x + side * u, feet), tone(60, 90), int(u * .8))
        coat = x - 1.2 * u, feet - 8.6 * u, x + 1.2 * u, feet - 4.5 * u
        pen.rounded_rectangle(coat, u / 2, tone(40, 210, 40))
        pen.ellipse((x - .6 * u, feet - 10 * u, x + .6 * u, feet - 8.5 * u), tone(110, 200, 25))
    return image.reduce(2).filter(ImageFilter.GaussianBlur(0.8))


def render(person: Person, pose: Pose, domain: str, camera: int, seed: int) -> tuple[Image.Image, dict[str, Box]]:
    """Draw `person` as camera number `camera` of a domain sees it. A pure function.

    Returns the image, (HEIGHT, WIDTH) RGB, and the boxes of what it shows: of PARTS, and "person" for the whole.
    """
    rng, cam = random.Random(seed), camera_of(domain, camera)
    figure = Figure(pose, cam, rng)
    groups = [group for draw in (_legs, _arms, _torso, _head, _things) for group in draw(figure, person)]
    for _, strokes in sorted(groups, key=lambda group: group[0]):       # from the farthest to the nearest
        for stroke in strokes:
            figure.draw(stroke)
    cover = figure.part.point(lambda v: 255 * (v > 0)).reduce(SCALE)
    pan = rng.randrange(2 * WIDTH)
    scene = _array(backdrop(domain, camera, rng.randrange(6)).crop((pan, 0, pan + WIDTH, HEIGHT)))
    dim = 1 - cam.shadow * _array(_shadow(cover, figure))[..., None]
    light = _array(figure.light.reduce(SCALE).filter(ImageFilter.BoxBlur(1)))[..., None] * 1.275
    pixels = scene * dim * (1 - _array(cover)[..., None]) + _array(figure.colour.reduce(SCALE)) * light    # (H, W, 3)
    parts = np.array(figure.part.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST))                # (2H, 2W)
    if rng.random() < cam.occlusion:
        _occlude(pixels, parts, rng)
    return _expose(pixels, cam, rng), _boxes(parts)


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _shadow(cover: Image.Image, figure: Figure) -> Image.Image:
    """The figure (H, W) laid on the ground, away from the light."""
    feet, flat, lean = (figure.top + figure.tall * .97) * HEIGHT, 0.22, figure.cam.light * 2.3
    matrix = 1, -lean, lean * feet, 0, 1 / flat, feet - feet / flat
    shape = cover.transform(cover.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return shape.filter(ImageFilter.GaussianBlur(1.5))


def _occlude(pixels: np.ndarray, parts: np.ndarray, rng: random.Random) -> None:
    """A post beside the person or a barrier before the feet, over pixels (H, W, 3) and parts (2H, 2W)."""
    left = int(WIDTH * rng.choice((rng.uniform(.12, .3), rng.uniform(.62, .8))))
    post = slice(0, HEIGHT), slice(left, left + rng.randint(5, 9))
    barrier = slice(int(HEIGHT * rng.uniform(.82, .92)), HEIGHT), slice(0, WIDTH)
    rows, columns = rng.choice((post, barrier))
    pixels[rows, columns] = rng.uniform(.2, .7)
    pixels[rows, columns] *= np.linspace(1.3, .7, columns.stop - columns.start, dtype=np.float32)[:, None]
    parts[rows.start * 2:, columns.start * 2:columns.stop * 2] = 0


def _expose(pixels: np.ndarray, cam: Domain, rng: random.Random) -> Image.Image:
    """What light, lens, sensor and compression make of the scene (H, W, 3)."""
    across = np.linspace(-1, 1, WIDTH, dtype=np.float32)[:, None]
    pixels = pixels * (1 + 0.25 * cam.relief * cam.light * across)
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * 2 ** cam.saturation
    pixels = pixels * np.float32([2 ** (cam.exposure + stops) for stops in (cam.red, 0, cam.blue)])
    pixels = cam.haze + (1 - cam.haze) * np.clip(pixels, 0, 1) ** (2 ** cam.gamma)
    smear = max(1, round(cam.motion))
    pixels = sum(np.roll(pixels, i - smear // 2, 1) for i in range(smear)) / smear
    image = _image(pixels).filter(ImageFilter.GaussianBlur(cam.blur))
    grain = np.random.default_rng(rng.getrandbits(64)).standard_normal((HEIGHT, WIDTH, 4), np.float32)
    packed = io.BytesIO()
    noisy = _array(image) + cam.noise * (0.8 * grain[..., :1] + 0.5 * grain[..., 1:])
    _image(noisy).save(packed, "JPEG", quality=round(95 - cam.jpeg))
    return Image.open(packed).convert("RGB")


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + .5).astype(np.uint8))


def _boxes(parts: np.ndarray) -> dict[str, Box]:
    """(2H, 2W) part numbers -> the box of every part that shows enough; of the garments, that shows."""
    (height, width), boxes = parts.shape, {}
    seen = {part: parts == i for i, part in enumerate(PARTS, 1)}
    seen |= {"upper": seen["upper"] | seen["inner"] | seen["logo"], "person": parts > 0}
    for part, mask in seen.items():
        rows, columns = (np.flatnonzero(mask.sum(axis) > 1) for axis in (1, 0))    # no stray pixels
        if len(rows) and len(columns) and (mask.sum() >= 160 or part in ("upper", "lower")):
            left, right = int(columns[0]), int(columns[-1]) + 1
            top, bottom = int(rows[0]), int(rows[-1]) + 1
            boxes[part] = ((left + right) / 2 / width, (top + bottom) / 2 / height,
                           (right - left) / width, (bottom - top) / height)
    return boxes
