"""The image of a person from a camera of one of four domains: `render`, a pure function.

The source looks synthetic. Three targets, each with its own cameras, differ from it in light, colour and viewpoint, by
the strengths in the table DOMAINS. This is the domain gap of the MRA paper. Read next: sets.py.
"""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mra.data.records import Box
from mra.town.figure import Pose, Stroke, strokes
from mra.town.people import Person

VERSION = 1                     # of the drawing, in the manifest of a set
HEIGHT, WIDTH, SCALE = 192, 96, 4      # pixels of a file; the figure is drawn SCALE times as large
PARTS = ("hair", "headgear", "upper", "inner", "logo", "lower", "shoes", "bag", "carried", "person")  # numbered from 1
T = (np.arange(17) - 3) / 10    # t of the points of a stroke
SHADES = ((0.5, 1, 0), (0.8, 0.86, 0.08), (1, 0.62, 0.22), (1.12, 0.28, 0.34))   # brightness, half width, shift


@dataclass(frozen=True)
class Domain:
    """The look of a set. The fields from exposure on are strengths: 0 does nothing, and `strength` multiplies all."""
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


@cache
def camera_of(domain: str, camera: int) -> Domain:
    """The domain's look in camera number `camera`: a pure function of the table."""
    base, rng = DOMAINS[domain], random.Random(f"{domain}/{camera}")
    names = [field.name for field in fields(Domain)]
    strengths = {name: getattr(base, name) * (base.strength * (1 + base.spread * rng.uniform(-1, 1)))
                 for name in names[names.index("exposure"):]}
    return replace(base, light=rng.choice((-1, 1)) * rng.uniform(0.4, 1), **strengths)


@lru_cache(128)
def backdrop(place: str, cam: Domain, variant: int) -> Image.Image:
    """A scene with people far off, (HEIGHT, 3 WIDTH). Each camera has a few and pans over them."""
    rng = random.Random(f"{place}/{variant}")
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
        if cam.scene == "plain":
            continue
        top, bottom, tint = {"campus": (.1, .6, 16), "street": (.25, .97, 40), "hall": (.15, 1, 16)}[cam.scene]
        pen.rectangle((x, horizon * top, x + wide, horizon * bottom), tone(70, 230, tint), tone(60, 110), 4)
        pen.line((x + wide / 2, horizon * top, x + wide / 2, horizon * bottom), tone(80, 120), 3)
        if cam.scene == "street":
            pen.rectangle((x, horizon * .08, x + wide, horizon * .2), tone(90, 220, 60))
        if cam.scene == "campus" and wide < 100:
            pen.line((x + 110, 0, x + 110, horizon + 8), (96, 74, 56), 10)
            for i in range(9):
                left, top = x + 60 + i % 3 * 26, -50 + i // 3 * horizon * .2
                red, green, blue = tone(70, 100, 10)
                pen.ellipse((left, top, left + 56, top + 60), (red - 20, green + 30, blue - 30))
    if cam.scene != "plain":
        for i in range(16):                                     # tiles of the ground
            x, y = (i - 7.5) * 70, horizon + (height - horizon) * (i / 12) ** 1.8
            pen.line((width / 2 + x * .6, horizon, width / 2 + x * 2, height), joint, 2)
            pen.line((0, y, width, y), joint, 2)
        for _ in range(rng.randint(2, 5)):                      # people: legs, coat and head, u is a tenth of one
            x, feet, u = rng.uniform(0, width), horizon + rng.uniform(5, 40), rng.uniform(9, 19)
            for side in (-.8, .8):
                pen.line((x, feet - 5 * u, x + side * u, feet), tone(60, 90), int(u * .8))
            coat = x - 1.2 * u, feet - 8.6 * u, x + 1.2 * u, feet - 4.5 * u
            pen.rounded_rectangle(coat, u / 2, tone(40, 210, 40))
            pen.ellipse((x - .6 * u, feet - 10 * u, x + .6 * u, feet - 8.5 * u), tone(110, 200, 25))
    return image.reduce(2).filter(ImageFilter.GaussianBlur(0.8))


def render(person: Person, pose: Pose, domain: str, camera: int, seed: int) -> tuple[Image.Image, dict[str, Box]]:
    """The image of `person` in a camera of a domain, (HEIGHT, WIDTH) RGB, and the boxes of the PARTS that it shows."""
    cam = camera_of(domain, camera)
    return render_in(person, pose, cam, partial(backdrop, f"{domain}/{camera}", cam), seed)


def render_in(person: Person, pose: Pose, cam: Domain, backdrop_of: Callable[[int], Image.Image],
              seed: int) -> tuple[Image.Image, dict[str, Box]]:
    """As `render`, of a camera with any look and six backdrops, each (HEIGHT, 3 WIDTH)."""
    rng = random.Random(seed)
    # the figure's height, its middle and the top of its head, as shares of the image's height
    tall = 0.90 - cam.distance * rng.uniform(0.3, 1)
    middle = 0.5 * WIDTH / HEIGHT + cam.crop * rng.uniform(-1, 1)
    top = (1 - tall) * rng.uniform(0.5, 0.75) + cam.crop * rng.uniform(-1, 1)
    size = WIDTH * SCALE, HEIGHT * SCALE
    colour, light, part = Image.new("RGB", size), Image.new("L", size, 200), Image.new("L", size)
    pens = [ImageDraw.Draw(image) for image in (colour, light, part)]
    for stroke in strokes(person, pose):
        _draw(pens, stroke, cam, *_project(stroke, pose, cam.height, (tall, middle, top)))
    cover = part.point(lambda number: 255 if number else 0).reduce(SCALE)
    pan = rng.randrange(2 * WIDTH)
    scene = backdrop_of(rng.randrange(6)).crop((pan, 0, pan + WIDTH, HEIGHT))
    # the shadow: the figure laid on the ground, away from the light
    feet, flat, lean = (top + tall * .97) * HEIGHT, 0.22, cam.light * 2.3
    matrix = 1, -lean, lean * feet, 0, 1 / flat, feet - feet / flat
    shadow = cover.transform(cover.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    shadow = shadow.filter(ImageFilter.GaussianBlur(1.5))
    ground = _array(scene) * (1 - cam.shadow * _array(shadow))                                          # (H, W, 3)
    light = light.reduce(SCALE).filter(ImageFilter.BoxBlur(1))
    pixels = ground * (1 - _array(cover)) + _array(colour.reduce(SCALE)) * (_array(light) * 1.275)
    parts = np.array(part.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST))                    # (2H, 2W)
    if rng.random() < cam.occlusion:        # a post beside the person, or a barrier before the feet
        left = int(WIDTH * rng.choice((rng.uniform(.12, .3), rng.uniform(.62, .8))))
        post = slice(0, HEIGHT), slice(left, left + rng.randint(5, 9))
        barrier = slice(int(HEIGHT * rng.uniform(.82, .92)), HEIGHT), slice(0, WIDTH)
        rows, columns = rng.choice((post, barrier))
        pixels[rows, columns] = rng.uniform(.2, .7)
        pixels[rows, columns] *= np.linspace(1.3, .7, columns.stop - columns.start, dtype=np.float32)[:, None]
        parts[rows.start * 2:, columns.start * 2:columns.stop * 2] = 0
    return _expose(pixels, cam, rng), _boxes(parts)


def _project(stroke: Stroke, pose: Pose, high: float, place: tuple) -> tuple[np.ndarray, np.ndarray]:
    """(K, 2) pixels: the points of a stroke's centre line at T, and the vectors from them to the stroke's side."""
    tall, middle, top = place
    rows, at, unit = np.asarray(stroke.rows, float), np.linspace(0, 1, 11), HEIGHT * SCALE
    x, y, z, half, deep = (np.interp(at, np.linspace(0, 1, len(rows)), rows[:, i]) for i in (0, 1, 2, 3, -1))
    # from a high camera, near points are lower in the image, and upper ones larger
    y = y + 0.3 * high * pose.near(x, z)
    zoom = (1 + high * (0.5 - y)) * tall * unit
    centre = np.stack([middle * unit + (x * pose.cos + z * pose.sin) * zoom,
                       (top + (y + high * 0.5 * y * (1 - y)) * tall) * unit], -1)
    along = np.gradient(centre, axis=0) + (0, 1e-3)
    along *= (np.hypot(half * pose.cos, deep * pose.sin) * zoom / np.hypot(*along.T))[:, None]
    across = np.stack([along[:, 1], -along[:, 0]], -1)
    # three points more at each end make it round
    first, last = np.outer((.8, .68, .4), along[0]), np.outer((.4, .68, .8), along[-1])
    centre = np.concatenate([centre[0] - first, centre, centre[-1] + last])
    across = np.concatenate([np.outer((.1, .5, .86), across[0]), across, np.outer((.86, .5, .1), across[-1])])
    return centre, across


def _draw(pens: list, stroke: Stroke, cam: Domain, centre: np.ndarray, across: np.ndarray) -> None:
    """Draw a stroke: colour and bands, light in four steps from dark to bright, and dark folds."""
    first, last = stroke.ends

    def line(s: float, t0: float = -1, t1: float = 2) -> np.ndarray:
        """(K, 2) pixels at s across the stroke; points before t0 or after t1 are moved to t0 or t1."""
        t = np.clip(T, max(t0, first), min(t1, last))
        return np.stack([np.interp(t, T, values) for values in (centre + s * across).T], -1)

    def patch(s0: float, s1: float, *ends: float) -> list[float]:
        return np.concatenate([line(s0, *ends), line(s1, *ends)[::-1]]).ravel().tolist()

    colour, light, part = pens
    colour.polygon(patch(-1, 1), stroke.colour)
    part.polygon(patch(-1, 1), PARTS.index(stroke.part) + 1)
    for *corners, paint in stroke.bands:
        colour.polygon(patch(*corners), paint)
    for brightness, half, shift in SHADES:
        middle = cam.light * shift
        lit = patch(max(-1, middle - half), min(1, middle + half))
        light.polygon(lit, int(200 * (1 + cam.relief * (brightness - 1))))
    for s0, t0, s1, t1 in stroke.folds:
        light.line((*line(s0, t0, t0)[0], *line(s1, t1, t1)[0]), int(200 - 110 * cam.relief), 4)


def _array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) from 0 to 1; (H, W, 1) for a grey image."""
    return np.asarray(image, np.float32).reshape(image.height, image.width, -1) / 255


def _expose(pixels: np.ndarray, cam: Domain, rng: random.Random) -> Image.Image:
    """The scene (H, W, 3) after light, lens, sensor and compression."""
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
    """(2H, 2W) part numbers -> the box of every part that is large enough; of upper and lower in any case."""
    (height, width), boxes = parts.shape, {}
    seen = {part: parts == number for number, part in enumerate(PARTS, 1)}
    seen |= {"upper": seen["upper"] | seen["inner"] | seen["logo"], "person": parts > 0}
    for part, mask in seen.items():
        rows, columns = (np.flatnonzero(mask.sum(axis) > 1) for axis in (1, 0))    # no stray pixels
        if len(rows) and len(columns) and (mask.sum() >= 160 or part in ("upper", "lower")):
            left, right = int(columns[0]), int(columns[-1]) + 1
            top, bottom = int(rows[0]), int(rows[-1]) + 1
            boxes[part] = ((left + right) / 2 / width, (top + bottom) / 2 / height,
                           (right - left) / width, (bottom - top) / height)
    return boxes
