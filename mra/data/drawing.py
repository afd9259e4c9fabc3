"""A person drawn as a camera of one of four domains sees them: `render`, a pure function.

One source with the look of synthetic data and three targets, each with cameras of its own, that differ from it in
light, colour and viewpoint: the domain gap of the MRA paper. Every strength stands in the table DOMAINS. A figure is
drawn from strokes in body coordinates, then lit, put into a place, and exposed.
Before: people.py (who is drawn). After: town.py, which draws whole sets.
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
from mra.data.people import Person

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
FLAT, OPEN, ROUND = (0, 0), (1, 0), (1, 1)     # the ends of a stroke


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


class Picture(NamedTuple):
    """An image, (HEIGHT, WIDTH) RGB, and the boxes of what it shows: of PARTS, and "person" for the whole."""
    image: Image.Image
    boxes: dict[str, Box]


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
        self.colour, self.light, self.part = (Image.new(mode, size, fill) for mode, fill in
                                              (("RGB", 0), ("L", 200), ("L", 0)))
        self.pens = [ImageDraw.Draw(image) for image in (self.colour, self.light, self.part)]
        self.sin, self.cos = math.sin(math.radians(pose.yaw)), math.cos(math.radians(pose.yaw))
        self.tall = 0.90 - cam.distance * rng.uniform(0.3, 1)
        self.left = 0.5 * WIDTH / HEIGHT + cam.crop * rng.uniform(-1, 1)
        self.top = (1 - self.tall) * rng.uniform(0.5, 0.75) + cam.crop * rng.uniform(-1, 1)
        self.high, self.relief, self.lit, self.phase = cam.height, cam.relief, cam.light, pose.phase

    def near(self, x: float, z: float) -> float:
        return z * self.cos - x * self.sin

    def draw(self, stroke: Stroke) -> None:
        centre, across = self._shape(stroke)
        t = (np.arange(len(centre)) - 3 * stroke.ends[0]) / 10

        def lines(at) -> list[np.ndarray]:      # of both, (len(at), 2) each
            return [np.stack([np.interp(at, t, values) for values in line.T], -1) for line in (centre, across)]

        def patch(s0: float, s1: float, middle=centre, side=across) -> list[float]:
            return np.concatenate([middle + s0 * side, (middle + s1 * side)[::-1]]).ravel().tolist()

        colour, light, part = self.pens
        whole = patch(-1, 1)
        colour.polygon(whole, stroke.colour)
        part.polygon(whole, 255 if stroke.part == "person" else PARTS.index(stroke.part) + 1)
        for s0, s1, t0, t1, paint in stroke.bands:
            at = np.concatenate([[max(t0, t[0])], t[(t > t0) & (t < t1)], [min(t1, t[-1])]])
            colour.polygon(patch(s0, s1, *lines(at)), paint)
        for level, half, shift in ((0.5, 1, 0), (0.8, 0.86, 0.08), (1, 0.62, 0.22), (1.12, 0.28, 0.34)):
            s0, s1 = max(-1, self.lit * shift - half), min(1, self.lit * shift + half)
            light.polygon(patch(s0, s1), int(200 * (1 + self.relief * (level - 1))))
        for s0, t0, s1, t1 in stroke.folds:
            middle, side = lines((t0, t1))
            light.line((middle + np.array([[s0], [s1]]) * side).ravel().tolist(), int(200 - 110 * self.relief), 4)

    def _shape(self, stroke: Stroke) -> tuple[np.ndarray, np.ndarray]:
        """Centre line of a stroke and the vector to one side, (K, 2) pixels each; higher up is larger."""
        rows = np.asarray(stroke.rows, float)
        at, knots = np.linspace(0, 1, 11), np.linspace(0, 1, len(rows))
        x, y, z, side, deep = (np.interp(at, knots, rows[:, i]) for i in (0, 1, 2, 3, -1))
        y = y + 0.3 * self.high * self.near(x, z)
        zoom = (1 + self.high * (0.5 - y)) * self.tall * HEIGHT * SCALE
        centre = np.stack([self.left * HEIGHT * SCALE + (x * self.cos + z * self.sin) * zoom,
                           (self.top + (y + self.high * 0.5 * y * (1 - y)) * self.tall) * HEIGHT * SCALE], -1)
        along = np.gradient(centre, axis=0) + (0, 1e-3)
        along *= (np.hypot(side * self.cos, deep * self.sin) * zoom / np.hypot(*along.T))[:, None]
        across = np.stack([along[:, 1], -along[:, 0]], -1)
        for end, sign in zip(stroke.ends[::-1], (1, -1)):       # a round end is three points more
            if end:
                centre = np.concatenate([centre, centre[-1] + sign * np.outer((.4, .68, .8), along[-1])])
                across = np.concatenate([across, np.outer((.86, .5, .1), across[-1])])
            centre, across, along = centre[::-1], across[::-1], along[::-1]
        return centre, across


def paint(colour: str, factor: float = 1.0) -> tuple[int, int, int]:
    """A named colour; with factor < 1 its accent: darker, or lighter where it is dark."""
    values = PAINT[colour]
    return tuple(int(v * factor if max(values) > 90 else v + 120 * (1 - factor)) for v in values)


def _legs(figure: Figure, person: Person) -> Groups:
    cloth, shoe, stout = paint(person.lower_colour), paint(person.shoes_colour), STOUT[person.build]
    widths = {"trousers": (.070, .056, .050), "jeans": (.064, .046, .038), "leggings": (.054, .037, .025),
              "shorts": (.068, .068)}.get(person.lower)
    worn = [(-.4, .5, .12, .42, paint(person.lower_colour, .85)),
            (-1, 1, .92, 2, paint(person.lower_colour, .6))] * (person.lower == "jeans")
    edge = paint("grey" if person.shoes_colour == "white" else "white")
    sole = [(-1, -.45, -1, 2, edge)] * (person.shoes == "sneakers")
    for side in (1, -1):
        thigh = 0.42 * math.sin(figure.phase) * side
        shin = thigh - 0.1 - max(0.0, -thigh) * 0.7
        hip = np.array((side * .052, .48, 0))
        knee = hip + (side * .004, .240 * math.cos(thigh), .240 * math.sin(thigh))
        ankle = knee + (0, .230 * math.cos(shin), .230 * math.sin(shin))
        heel, toe = ankle + (0, .008, -.015), ankle + (side * .008, .030, .075)
        stops = (hip, knee * .9 + ankle * .1) if person.lower == "shorts" else (hip, knee, ankle)
        folds = [(-1, .46, .1, .52), (1, .5, -.1, .56), (-.9, .9, .2, .94), (side, .04, -side * .5, .14)]
        bare = _limb((hip, knee, ankle), (.05, .042, .026), stout)
        leg = [Stroke("lower", cloth, _limb(stops, widths, stout), OPEN, worn, folds)] if widths else []
        foot = [Stroke("shoes", shoe, _limb((heel, toe), (.030, .031)), ROUND, sole)]
        if person.shoes == "boots":
            shaft = _limb((knee * .55 + ankle * .45, ankle), (.046, .038), stout)
            leg, foot = foot, [*leg, Stroke("shoes", shoe, shaft, (0, 1))]
        skin = Stroke("person", SKINS[person.skin], bare, ROUND)
        yield -10 + figure.near(side * .05, knee[2]), [skin, *foot, *leg]
    flare, hem = {"skirt": (.135, .70), "long skirt": (.16, .90)}.get(person.lower, (.062, .56))
    rows = [(0, .46, 0, .09 * stout, .075 * stout), (0, hem, 0, flare, flare * .9)]
    pleats = [(s * .8, .2, s, 1) for s in (-.7, -.35, 0, .35, .7)] * ("skirt" in person.lower)
    yield -5, [Stroke("lower", cloth, rows, folds=pleats)]


def _limb(stops, widths, stout: float = 1.0) -> list:
    return [(*stop, width * stout) for stop, width in zip(stops, widths)]


def _pattern(person: Person) -> list[tuple]:
    """The patches of the upper garment's pattern, on torso and sleeves; coarse enough for a small image."""
    second = PAINT[person.pattern_colour]
    checks = [(s, s + .24, -1, 2, second) for s in (-.8, -.12, .56)]
    checks += [(-1, 1, t, t + .07, second) for t in (.08, .30, .52, .74, .96)]
    return {"striped": [(-1, 1, t, t + .11, second) for t in (.08, .30, .52, .74, .96)], "checked": checks,
            "two-tone": [(-1, 1, .5, 2, second)]}.get(person.pattern, [])


def _torso(figure: Figure, person: Person) -> Groups:
    colour, dark = paint(person.upper_colour), paint(person.upper_colour, .6)
    stout, front = STOUT[person.build], figure.cos > .3
    shoulder, waist = (.104, .090) if person.gender == "man" else (.092, .076)
    hem, wide = (.63, .120) if person.upper == "coat" else (.53, .098)
    rows = [(0, .158, 0, .046, .05), (0, .172, 0, .070, .06), (0, .20, 0, shoulder, .074)]
    rows += [(0, y, 0, side * stout, .074 * stout)
             for y, side in ((.30, shoulder), (.42, waist), (.50, .096), (hem, wide))]
    middle = [(-.05, .05, -1, 2, dark)] * front
    details = {"jacket": [*middle, (-1, 1, .92, 2, dark)], "coat": [*middle, (-1, 1, .62, .66, dark)],
               "vest": [*middle, *((-1, 1, t, t + .03, dark) for t in (.2, .4, .6, .8))], "shirt": middle,
               "sweater": [(-1, 1, .9, 2, dark)], "hoodie": [(-.5, .5, .68, .88, dark)] * front}.get(person.upper, [])
    folds = [(-.8, .62, -.1, .70), (.85, .58, .2, .68), (-.7, .84, .1, .80), (.9, .3, .5, .42)]
    group = [Stroke("person", SKINS[person.skin], [(0, .11, .005, .034), (0, .19, 0, .036)]),
             Stroke("upper", colour, rows, FLAT, _pattern(person) + details, folds)]
    if person.inner_colour and person.upper != "vest" and front:
        inner = [(0, .160, .05, .034), (0, .20, .05, .046), (0, hem, .05, .050)]
        group.append(Stroke("inner", PAINT[person.inner_colour], inner))
    if person.pattern == "logo" and front:
        group.append(Stroke("logo", PAINT[person.pattern_colour], [(0, .25, .06, .048), (0, .35, .06, .048)]))
    yield 0, group
    if person.upper == "hoodie":
        hood = [(0, .125, -.035, .06, .03), (0, .215, -.06, .085, .035)]
        yield figure.near(0, -.05), [Stroke("upper", paint(person.upper_colour, .85), hood, ROUND)]


def _arms(figure: Figure, person: Person) -> Groups:
    stout, skin = (STOUT[person.build] + 1) / 2, SKINS[person.skin]
    part, colour = ("inner", person.inner_colour) if person.upper == "vest" else ("upper", person.upper_colour)
    loose = .042 if person.upper in ("coat", "jacket", "hoodie") else .037
    for side in (1, -1):
        beside_bag = (person.bag_side == "left") == (side > 0)
        still = person.bag == "handbag" if beside_bag else bool(person.carried)
        swing = 0.0 if still else -0.5 * math.sin(figure.phase) * side
        bend = swing + (0.05 if still else 0.35)
        shoulder = np.array((side * .096, .200, 0))
        elbow = shoulder + (side * .024, .155 * math.cos(swing), .155 * math.sin(swing))
        wrist = elbow + (side * .002, .150 * math.cos(bend), .150 * math.sin(bend))
        arm = [Stroke("person", skin, _limb((shoulder, elbow, wrist), (.034, .029, .023), stout), ROUND),
               Stroke("person", skin, [(*wrist, .02), (*(wrist + (0, .035, .006)), .022)], ROUND)]
        if person.upper == "t-shirt":
            sleeve = _limb((shoulder, elbow * .8 + shoulder * .2), (.038, .042), stout)
            arm.append(Stroke("upper", PAINT[colour], sleeve, OPEN, _pattern(person)))
        elif person.upper != "tank top":
            sleeve = _limb((shoulder, elbow, wrist), (loose, loose * .95, loose * .8), stout)
            pattern = _pattern(person) * (person.pattern != "two-tone")
            folds = [(-.9, .45, .4, .52), (.9, .5, 0, .56)]
            arm.append(Stroke(part, PAINT[colour], sleeve, OPEN, pattern, folds))
        yield figure.near(side * .14, wrist[2]) + .02, arm


def _egg(top: float, bottom: float, z: float, side: float, deep: float, whole: bool = True) -> list:
    """An upright oval, or the upper half of one."""
    t = np.linspace(0, 1, 11)
    w = (1 - np.abs(2 * t - 1 if whole else 1 - t) ** 2.3) ** (1 / 2.3)
    return [(0, top + (bottom - top) * u, z, side * v, deep * v) for u, v in zip(t, w)]


def _head(figure: Figure, person: Person) -> Groups:
    hair, skin = HAIR_PAINT[person.hair_colour], SKINS[person.skin]
    face = [Stroke("person", skin, _egg(.028, .162, .026, .051, .038)),
            Stroke("person", (170, 84, 80), [(0, .128, .054, .014, .004), (0, .132, .054, .008, .003)]),
            *(Stroke("person", (40, 30, 30), [(x, .080, .054, .006), (x, .090, .054, .006)], ROUND)
              for x in (-.020, .020) if figure.near(x, .054) > .012)]
    yield 3, [Stroke("person", skin, _egg(0, .160, .004, .055, .060)),
              Stroke("hair", hair, _egg(-.014, .128, -.014, .066, .062)), *face * (figure.cos > -.35)]
    if person.hair == "long":
        fall = [(0, .03, -.030, .060, .04), (0, .15, -.045, .074, .04), (0, .27, -.05, .066, .03)]
        yield figure.near(0, -3.5), [Stroke("hair", hair, fall, ROUND)]
        for x in (-.060, .060):
            lock = [(x * .85, .06, -.02, .014), (x * 1.05, .16, -.01, .018), (x * 1.1, .25, .01, .012)]
            yield 2.9 + .2 * (figure.near(x, .02) > 0), [Stroke("hair", hair, lock, ROUND)]
    if person.hair == "ponytail":
        tail = [(0, .04, -.065, .018), (0, .10, -.10, .030), (0, .23, -.085, .014)]
        yield 2.8 if figure.cos > 0 else 3.1, [Stroke("hair", hair, tail, ROUND)]


def _headgear(figure: Figure, person: Person) -> Groups:
    if not person.headgear:
        return
    kinds = {"cap": (-.026, .048, [(0, .040, .04, .060, .008), (0, .056, .13, .050, .008)]),
             "hat": (-.050, .040, [(0, .026, 0, .104), (0, .042, 0, .112)]),
             "beanie": (-.034, .056, [(0, .030, 0, .066, .070), (0, .058, 0, .064, .068)])}
    top, bottom, brim = kinds[person.headgear]
    hidden = person.headgear == "cap" and figure.cos < -.35
    yield 4, [Stroke("headgear", paint(person.headgear_colour), _egg(top, bottom, -.006, .064, .068, False))]
    yield 2.7 if hidden else 4.1, [Stroke("headgear", paint(person.headgear_colour, .7), brim)]


def _bag(figure: Figure, person: Person) -> Groups:
    if not person.bag:
        return
    dark, wide, ahead = paint(person.bag_colour, .7), STOUT[person.build], 1 if figure.cos > 0 else -1
    x = .14 if person.bag_side == "left" else -.14
    straps, body, pocket, near = {
        "backpack": ([[(s, .165, .05, .014), (s, .36, .065, .014)] for s in (-.07, .07)] * (figure.cos > .2),
                     [(0, .20, -.10, .074, .05), (0, .43, -.11, .084, .065)], (-.6, .6, .55, .9), (0, -.3)),
        "shoulder bag": ([[(-x / 2, .165, .03 * ahead, .011), (0, .32, .075 * ahead, .011),
                           (x * .8, .45, .05 * ahead, .011)]],
                         [(x, .43, .01, .055, .075), (x, .58, .01, .062, .085)], (-1, 1, 0, .4), (x * 2, 0)),
        "handbag": ([[(x, .515, 0, .010), (x, .57, 0, .022)]],
                    [(x, .565, 0, .045, .05), (x, .67, 0, .062, .06)], (-.2, .2, 0, .3), (x * 2, 0)),
        "waist bag": ([[(0, y, 0, .104 * wide, .079 * wide) for y in (.445, .468)]],
                      [(x / 4, .43, .09, .06, .03), (x / 4, .51, .09, .056, .03)], (-1, 1, .2, .3), (0, .22)),
    }[person.bag]
    over = figure.near(*near) if person.bag == "handbag" else .24
    yield over, [Stroke("bag", dark, rows) for rows in straps]
    yield figure.near(*near), [Stroke("bag", paint(person.bag_colour), body, (0, 1), [(*pocket, dark)])]


def _carried(figure: Figure, person: Person) -> Groups:
    x = -.145 if person.bag_side == "left" else .145
    things = {
        "umbrella": ([(x, .46, .02, .008), (x, .54, .02, .008)], [(x, .54, .02, .030), (x, .92, .02, .008)]),
        "suitcase": ([(x * 1.15, .52, -.03, .008), (x * 1.2, .70, -.06, .008)],
                     [(x * 1.2, .68, -.06, .078, .06), (x * 1.2, .94, -.06, .078, .06)]),
        "shopping bag": ([(x, .515, 0, .012), (x, .56, 0, .024)], [(x, .555, 0, .066, .05), (x, .74, 0, .07, .055)]),
        "book": ([(x * .7, .44, .085, .03)] * 2, [(x * .7, .40, .085, .055, .03), (x * .7, .51, .085, .055, .03)]),
        "skateboard": ([(x * 1.1, .36, .03, .042, .04), (x * 1.1, .60, .03, .042, .04)],
                       [(x * 1.1, .32, .02, .030, .04), (x * 1.1, .64, .02, .030, .04)])}
    if person.carried:
        handle, body = things[person.carried]
        yield figure.near(x, 0) + .1, [Stroke("carried", paint(person.carried_colour, .7), handle),
                                       Stroke("carried", paint(person.carried_colour), body)]


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
    for x in range(rng.randint(-60, 0), width, 150):
        _shop_front(pen, cam.scene, x, rng.randint(70, 140), horizon, tone)
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


def _shop_front(pen: ImageDraw.ImageDraw, scene: str, x: int, wide: int, horizon: float, tone) -> None:
    """What stands at x along the wall: panels, or doors, or shop windows, or windows and trees."""
    pen.line((x, 0, x, horizon), tone(140, 190, 4), 3)
    if scene != "plain":
        top, bottom, tint = {"campus": (.1, .6, 16), "street": (.25, .97, 40), "hall": (.15, 1, 16)}[scene]
        pen.rectangle((x, horizon * top, x + wide, horizon * bottom), tone(70, 230, tint), tone(60, 110), 4)
        pen.line((x + wide / 2, horizon * top, x + wide / 2, horizon * bottom), tone(80, 120), 3)
    if scene == "street":
        pen.rectangle((x, horizon * .08, x + wide, horizon * .2), tone(90, 220, 60))
    if scene == "campus" and wide < 100:
        pen.line((x + 110, 0, x + 110, horizon + 8), (96, 74, 56), 10)
        for i in range(9):
            left, top, green = x + 60 + i % 3 * 26, -50 + i // 3 * horizon * .2, tone(70, 100, 10)
            pen.ellipse((left, top, left + 56, top + 60), (green[0] - 20, green[1] + 30, green[2] - 30))


def render(person: Person, pose: Pose, domain: str, camera: int, seed: int) -> Picture:
    """Draw `person`, (HEIGHT, WIDTH), as camera number `camera` of a domain sees it. A pure function."""
    rng, cam = random.Random(seed), camera_of(domain, camera)
    figure = Figure(pose, cam, rng)
    groups = [group for draw in (_legs, _arms, _torso, _head, _headgear, _bag, _carried)
              for group in draw(figure, person)]
    for _, strokes in sorted(groups, key=lambda group: group[0]):       # from the farthest to the nearest
        for stroke in strokes:
            figure.draw(stroke)
    cover = figure.part.point(lambda v: 255 * (v > 0)).reduce(SCALE)
    pan = rng.randrange(2 * WIDTH)
    scene = _array(backdrop(domain, camera, rng.randrange(6)).crop((pan, 0, pan + WIDTH, HEIGHT)))
    dim = 1 - cam.shadow * _array(_shadow(cover, figure))[..., None]
    light = _array(figure.light.reduce(SCALE).filter(ImageFilter.BoxBlur(1)))[..., None] * 1.275
    pixels = scene * dim * (1 - _array(cover)[..., None]) + _array(figure.colour.reduce(SCALE)) * light
    parts = np.array(figure.part.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST))
    if rng.random() < cam.occlusion:
        _occlude(pixels, parts, rng)
    return Picture(_expose(pixels, cam, rng), _boxes(parts))


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _shadow(cover: Image.Image, figure: Figure) -> Image.Image:
    """The figure (H, W) laid on the ground, away from the light."""
    feet, flat, lean = (figure.top + figure.tall * .97) * HEIGHT, 0.22, figure.lit * 2.3
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
            left, right, top, bottom = (int(v) for v in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
            boxes[part] = ((left + right) / 2 / width, (top + bottom) / 2 / height,
                           (right - left) / width, (bottom - top) / height)
    return boxes
