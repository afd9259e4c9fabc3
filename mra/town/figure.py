"""A person as strokes: the places of body, clothes and things in space, before any camera.

Body coordinates are fractions of the person's height: x to the person's left, y down from 0 (head) to 1 (soles),
z forward. On a stroke, s runs from -1 to 1 across it (left to right in the image, if the stroke runs down), and t from
0 to 1 along it. Round ends lie beyond 0 and 1, so t from -1 to 2 is a whole stroke. Read next: drawing.py.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL.ImageColor import getrgb

from mra.town.people import FILE, Person

PAINT, HAIR_PAINT = FILE["paint"], FILE["hair paint"]
SKINS = ((246, 212, 188), (222, 176, 140), (166, 114, 80), (104, 68, 50))
STOUT = {"slim": 0.84, "average": 1.0, "heavy": 1.24}           # factor on widths
FLAT, FIRST, LAST, BOTH = (0, 1), (-1, 1), (0, 2), (-1, 2)      # t where a stroke ends, by which ends are round

# Patches of a garment: (s0, s1, t0, t1). Patches that do not go round it are seen from the front only.
HEIGHTS = (.08, .30, .52, .74, .96)
PATTERNS = {"striped": [(-1, 1, t, t + .11) for t in HEIGHTS], "two-tone": [(-1, 1, .5, 2)],
            "checked": [(s, s + .24, -1, 2) for s in (-.8, -.12, .56)] + [(-1, 1, t, t + .07) for t in HEIGHTS]}
ZIP, HEM = (-.05, .05, -1, 2), (-1, 1, .92, 2)
DETAILS = {"jacket": [ZIP, HEM], "coat": [ZIP, (-1, 1, .62, .66)], "shirt": [ZIP], "sweater": [(-1, 1, .9, 2)],
           "hoodie": [(-.5, .5, .68, .88)], "vest": [ZIP, *((-1, 1, t, t + .03) for t in (.2, .4, .6, .8))]}
LEGS = {"trousers": (.070, .056, .050), "jeans": (.064, .046, .038), "leggings": (.054, .037, .025),
        "shorts": (.068, .068)}                                 # half widths at hip, knee and ankle
SKIRTS = {"skirt": (.70, .135), "long skirt": (.90, .16)}       # y of the hem, half its width


class Pose(NamedTuple):
    """`yaw` in degrees: 0 faces the camera, 90 the right of the image; `phase` of the step in radians."""
    yaw: float
    phase: float

    @property
    def view(self) -> str:
        return ("front", "right", "back", "left")[round(self.yaw / 90) % 4]

    @property
    def cos(self) -> float:
        return math.cos(math.radians(self.yaw))

    @property
    def sin(self) -> float:
        return math.sin(math.radians(self.yaw))

    def near(self, x: float, z: float) -> float:
        """How far towards the camera a point of the body is."""
        return z * self.cos - x * self.sin


class Stroke(NamedTuple):
    """A limb or anything like one."""
    near: float                         # a nearer stroke is drawn over a farther one
    part: str                           # one of drawing.PARTS
    colour: tuple[int, int, int]
    rows: list[tuple]                   # points of its centre line: x, y, z, half width[, half depth, if different]
    ends: tuple[int, int] = FLAT
    bands: list[tuple] = []             # (s0, s1, t0, t1, colour) of patches in another colour
    folds: list[tuple] = []             # (s0, t0, s1, t1) of dark creases


def strokes(person: Person, pose: Pose) -> list[Stroke]:
    """All strokes of a person, from the farthest to the nearest."""
    found = [stroke for part in (_legs, _arms, _torso, _head, _things) for stroke in part(person, pose)]
    return sorted(found, key=lambda stroke: stroke.near)


def paint(colour: str, factor: float = 1.0) -> tuple[int, int, int]:
    """A named colour, black for ""; with factor < 1 a darker shade, or a lighter one of a dark colour."""
    values = getrgb(PAINT[colour]) if colour else (0, 0, 0)
    if max(values) > 90:
        return tuple(int(v * factor) for v in values)
    return tuple(int(v + 120 * (1 - factor)) for v in values)


def _limb(points: tuple, widths: tuple, stout: float = 1.0) -> list[tuple]:
    return [(*point, width * stout) for point, width in zip(points, widths)]


def _egg(top: float, bottom: float, z: float, side: float, deep: float, whole: bool = True) -> list[tuple]:
    """An upright oval, or the upper half of one."""
    t = np.linspace(0, 1, 11)
    w = (1 - np.abs(2 * t - 1 if whole else 1 - t) ** 2.3) ** (1 / 2.3)
    return [(0, top + (bottom - top) * u, z, side * v, deep * v) for u, v in zip(t, w)]


def _legs(person: Person, pose: Pose) -> Iterator[Stroke]:
    cloth, shoe, stout = paint(person.lower_colour), paint(person.shoes_colour), STOUT[person.build]
    bands, sole, pleats = [], [], []
    if person.lower == "jeans":
        bands = [(-.4, .5, .12, .42, paint(person.lower_colour, .85)), (-1, 1, .92, 2, paint(person.lower_colour, .6))]
    if person.shoes == "sneakers":
        sole = [(-1, -.45, -1, 2, paint("grey" if person.shoes_colour == "white" else "white"))]
    if person.lower in SKIRTS:
        pleats = [(s * .8, .2, s, 1) for s in (-.7, -.35, 0, .35, .7)]
    for side in (1, -1):                # the person's left, then right; angles in radians, > 0 is forward
        thigh = 0.42 * math.sin(pose.phase) * side
        shin = thigh - 0.1 - max(0.0, -thigh) * 0.7
        hip = np.array((side * .052, .48, 0))
        knee = hip + (side * .004, .240 * math.cos(thigh), .240 * math.sin(thigh))
        ankle = knee + (0, .230 * math.cos(shin), .230 * math.sin(shin))
        heel, toe = ankle + (0, .008, -.015), ankle + (side * .008, .030, .075)
        near = -10 + pose.near(side * .05, knee[2])
        yield Stroke(near, "person", SKINS[person.skin], _limb((hip, knee, ankle), (.05, .042, .026), stout), BOTH)
        foot = Stroke(near, "shoes", shoe, _limb((heel, toe), (.030, .031)), BOTH, sole)
        if person.shoes != "boots":
            yield foot
        if person.lower in LEGS:
            points = (hip, knee * .9 + ankle * .1) if person.lower == "shorts" else (hip, knee, ankle)
            folds = [(-1, .46, .1, .52), (1, .5, -.1, .56), (-.9, .9, .2, .94), (side, .04, -side * .5, .14)]
            yield Stroke(near, "lower", cloth, _limb(points, LEGS[person.lower], stout), FIRST, bands, folds)
        if person.shoes == "boots":     # over the leg
            shaft = _limb((knee * .55 + ankle * .45, ankle), (.046, .038), stout)
            yield Stroke(near, "shoes", shoe, shaft, LAST)
            yield foot
    hem, half = SKIRTS.get(person.lower, (.56, .062))
    rows = [(0, .46, 0, .09 * stout, .075 * stout), (0, hem, 0, half, half * .9)]
    yield Stroke(-5, "lower", cloth, rows, folds=pleats)


def _torso(person: Person, pose: Pose) -> Iterator[Stroke]:
    dark, second = paint(person.upper_colour, .6), paint(person.pattern_colour)
    stout, front = STOUT[person.build], pose.cos > .3
    shoulder, waist = (.104, .090) if person.gender == "man" else (.092, .076)
    hem, wide = (.63, .120) if person.upper == "coat" else (.53, .098)
    rows = [(0, .158, 0, .046, .05), (0, .172, 0, .070, .06), (0, .20, 0, shoulder, .074)]
    for y, half in ((.30, shoulder), (.42, waist), (.50, .096), (hem, wide)):
        rows.append((0, y, 0, half * stout, .074 * stout))
    bands = [(*patch, second) for patch in PATTERNS.get(person.pattern, [])]
    bands += [(*patch, dark) for patch in DETAILS.get(person.upper, []) if front or patch[0] == -1]
    folds = [(-.8, .62, -.1, .70), (.85, .58, .2, .68), (-.7, .84, .1, .80), (.9, .3, .5, .42)]
    yield Stroke(0, "person", SKINS[person.skin], [(0, .11, .005, .034), (0, .19, 0, .036)])
    yield Stroke(0, "upper", paint(person.upper_colour), rows, FLAT, bands, folds)
    if person.inner_colour and person.upper != "vest" and front:
        inner = [(0, .160, .05, .034), (0, .20, .05, .046), (0, hem, .05, .050)]
        yield Stroke(0, "inner", paint(person.inner_colour), inner)
    if person.pattern == "logo" and front:
        yield Stroke(0, "logo", second, [(0, .25, .06, .048), (0, .35, .06, .048)])
    if person.upper == "hoodie":
        hood = [(0, .125, -.035, .06, .03), (0, .215, -.06, .085, .035)]
        yield Stroke(pose.near(0, -.05), "upper", paint(person.upper_colour, .85), hood, BOTH)


def _arms(person: Person, pose: Pose) -> Iterator[Stroke]:
    stout, skin = (STOUT[person.build] + 1) / 2, SKINS[person.skin]
    part, colour = ("inner", person.inner_colour) if person.upper == "vest" else ("upper", person.upper_colour)
    loose = .042 if person.upper in ("coat", "jacket", "hoodie") else .037
    bands = [(*patch, paint(person.pattern_colour)) for patch in PATTERNS.get(person.pattern, [])]
    for side in (1, -1):
        of_bag = side == (1 if person.bag_side == "left" else -1)
        loaded = person.bag == "handbag" if of_bag else person.carried != ""
        upper = 0.0 if loaded else -0.5 * math.sin(pose.phase) * side
        lower = upper + (0.05 if loaded else 0.35)
        shoulder = np.array((side * .096, .200, 0))
        elbow = shoulder + (side * .024, .155 * math.cos(upper), .155 * math.sin(upper))
        wrist = elbow + (side * .002, .150 * math.cos(lower), .150 * math.sin(lower))
        near = pose.near(side * .14, wrist[2]) + .02
        yield Stroke(near, "person", skin, _limb((shoulder, elbow, wrist), (.034, .029, .023), stout), BOTH)
        yield Stroke(near, "person", skin, _limb((wrist, wrist + (0, .035, .006)), (.02, .022)), BOTH)
        if person.upper == "t-shirt":
            sleeve = _limb((shoulder, elbow * .8 + shoulder * .2), (.038, .042), stout)
            yield Stroke(near, part, paint(colour), sleeve, FIRST, bands)
        elif person.upper != "tank top":
            sleeve = _limb((shoulder, elbow, wrist), (loose, loose * .95, loose * .8), stout)
            folds = [(-.9, .45, .4, .52), (.9, .5, 0, .56)]
            yield Stroke(near, part, paint(colour), sleeve, FIRST, [] if person.pattern == "two-tone" else bands, folds)


def _head(person: Person, pose: Pose) -> Iterator[Stroke]:
    hair, skin = getrgb(HAIR_PAINT[person.hair_colour]), SKINS[person.skin]
    yield Stroke(3, "person", skin, _egg(0, .160, .004, .055, .060))
    yield Stroke(3, "hair", hair, _egg(-.014, .128, -.014, .066, .062))
    if pose.cos > -.35:                 # the face shows: its skin, mouth and eyes
        yield Stroke(3, "person", skin, _egg(.028, .162, .026, .051, .038))
        yield Stroke(3, "person", (170, 84, 80), [(0, .128, .054, .014, .004), (0, .132, .054, .008, .003)])
        for x in (-.020, .020):
            if pose.near(x, .054) > .012:
                yield Stroke(3, "person", (40, 30, 30), [(x, .080, .054, .006), (x, .090, .054, .006)], BOTH)
    if person.hair == "long":
        fall = [(0, .03, -.030, .060, .04), (0, .15, -.045, .074, .04), (0, .27, -.05, .066, .03)]
        yield Stroke(pose.near(0, -3.5), "hair", hair, fall, BOTH)
        for x in (-.060, .060):
            lock = [(x * .85, .06, -.02, .014), (x * 1.05, .16, -.01, .018), (x * 1.1, .25, .01, .012)]
            yield Stroke(3.1 if pose.near(x, .02) > 0 else 2.9, "hair", hair, lock, BOTH)
    if person.hair == "ponytail":
        tail = [(0, .04, -.065, .018), (0, .10, -.10, .030), (0, .23, -.085, .014)]
        yield Stroke(2.8 if pose.cos > 0 else 3.1, "hair", hair, tail, BOTH)


def _things(person: Person, pose: Pose) -> Iterator[Stroke]:
    """Headgear, bag and the thing carried: of each first the darker parts, then its body."""
    wide = STOUT[person.build]
    side = 1 if person.bag_side == "left" else -1
    x, hand = side * .14, side * -.145          # where a bag hangs, and the other hand
    beside, before, behind = pose.near(x * 2, 0), pose.near(0, .22), pose.near(0, -.3)
    held = pose.near(hand, 0) + .1
    ahead = 1 if pose.cos > 0 else -1           # a belt lies across the chest or across the back
    belt = [(-x / 2, .165, .03 * ahead, .011), (0, .32, .075 * ahead, .011), (x * .8, .45, .05 * ahead, .011)]
    peak = 2.7 if pose.cos < -.35 else 4.1
    straps = [[(s, .165, .05, .014), (s, .36, .065, .014)] for s in (-.07, .07)] if pose.cos > .2 else []
    kinds = {       # for each part: how near, how bright, rows; for some bags a darker patch
        "cap": [(peak, .7, [(0, .040, .04, .060, .008), (0, .056, .13, .050, .008)]),
                (4, 1, _egg(-.026, .048, -.006, .064, .068, whole=False))],
        "hat": [(4.1, .7, [(0, .026, 0, .104), (0, .042, 0, .112)]),
                (4, 1, _egg(-.050, .040, -.006, .064, .068, whole=False))],
        "beanie": [(4.1, .7, [(0, .030, 0, .066, .070), (0, .058, 0, .064, .068)]),
                   (4, 1, _egg(-.034, .056, -.006, .064, .068, whole=False))],
        "backpack": [*((.24, .7, strap) for strap in straps),
                     (behind, 1, [(0, .20, -.10, .074, .05), (0, .43, -.11, .084, .065)], (-.6, .6, .55, .9))],
        "shoulder bag": [(.24, .7, belt),
                         (beside, 1, [(x, .43, .01, .055, .075), (x, .58, .01, .062, .085)], (-1, 1, 0, .4))],
        "handbag": [(beside, .7, [(x, .515, 0, .010), (x, .57, 0, .022)]),
                    (beside, 1, [(x, .565, 0, .045, .05), (x, .67, 0, .062, .06)], (-.2, .2, 0, .3))],
        "waist bag": [(.24, .7, [(0, y, 0, .104 * wide, .079 * wide) for y in (.445, .468)]),
                      (before, 1, [(x / 4, .43, .09, .06, .03), (x / 4, .51, .09, .056, .03)], (-1, 1, .2, .3))],
        "umbrella": [(held, .7, [(hand, .46, .02, .008), (hand, .54, .02, .008)]),
                     (held, 1, [(hand, .54, .02, .030), (hand, .92, .02, .008)])],
        "suitcase": [(held, .7, [(hand * 1.15, .52, -.03, .008), (hand * 1.2, .70, -.06, .008)]),
                     (held, 1, [(hand * 1.2, .68, -.06, .078, .06), (hand * 1.2, .94, -.06, .078, .06)])],
        "shopping bag": [(held, .7, [(hand, .515, 0, .012), (hand, .56, 0, .024)]),
                         (held, 1, [(hand, .555, 0, .066, .05), (hand, .74, 0, .07, .055)])],
        "book": [(held, 1, [(hand * .7, .40, .085, .055, .03), (hand * .7, .51, .085, .055, .03)])],
        "skateboard": [(held, .7, [(hand * 1.1, .36, .03, .042, .04), (hand * 1.1, .60, .03, .042, .04)]),
                       (held, 1, [(hand * 1.1, .32, .02, .030, .04), (hand * 1.1, .64, .02, .030, .04)])]}
    for part in ("headgear", "bag", "carried"):
        colour = getattr(person, f"{part}_colour")
        for near, bright, rows, *patches in kinds.get(getattr(person, part), []):
            ends = LAST if part == "bag" and bright == 1 else FLAT
            bands = [(*patch, paint(colour, .7)) for patch in patches]
            yield Stroke(near, part, paint(colour, bright), rows, ends, bands)
