"""The study's charts: bars with a dot for each run, and a curve."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mra.data.files import save_image
from mra.show.pictures import GAP, GREEN, GREY, INK

FONT = 15           # points
NAMES = 160         # width of the bars' names, pixels
BAR = (640, 24)     # length of the longest bar and height of each, pixels
CURVE = (600, 300)  # width and height of a curve, pixels
DOT = 3             # radius of a run's dot, pixels


def bars(groups: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """Write a chart with one horizontal bar per name in each group: the mean of its values, and each value as a dot."""
    font, (long, high) = ImageFont.load_default(FONT), BAR
    shown = {name: group for name, group in groups.items() if group}
    lines = sum(len(group) + 2 for group in shown.values())
    picture = Image.new("RGB", (NAMES + long + 80, high * (lines + 1) + GAP), "white")
    pen = ImageDraw.Draw(picture)
    most = largest([values for group in shown.values() for values in group.values()])
    pen.text((GAP, GAP), title, INK, font)
    top = high + GAP
    for name, group in shown.items():
        pen.text((GAP, top + high // 2), name, INK, font)
        top += 2 * high
        for bar, values in group.items():
            mean = sum(values) / len(values)
            pen.text((GAP, top), bar, INK, font)
            pen.rectangle((NAMES, top + 2, NAMES + long * mean / most, top + high - 4), GREY)
            for value in values:
                dot(pen, NAMES + long * value / most, top + high // 2 - 1)
            pen.text((NAMES + long + GAP, top), f"{mean:.1f}", INK, font)
            top += high
    save_image(picture, path)


def curve(points: dict[float, list[float]], title: str, path: Path) -> None:
    """Write a chart of values over shares 0..1: a line through the mean at each share, and each value as a dot."""
    font, (wide, high) = ImageFont.load_default(FONT), CURVE
    left, above = 60, 40
    picture = Image.new("RGB", (left + wide + 40, high + 80), "white")
    pen = ImageDraw.Draw(picture)
    most = largest(list(points.values()))

    def place(share: float, value: float) -> tuple[float, float]:
        return left + wide * share, above + high * (1 - value / most)

    pen.text((GAP, GAP), title, INK, font)
    pen.line([place(0, most), place(0, 0), place(1, 0)], GREY, 2)
    means = {share: sum(values) / len(values) for share, values in points.items()}
    pen.line([place(share, mean) for share, mean in means.items()], GREEN, 3)
    for share, values in points.items():
        for value in values:
            dot(pen, *place(share, value))
        x, highest = place(share, max(values))
        pen.text((x - 12, high + 48), f"{share:.0%}", INK, font)
        pen.text((x - 12, highest - 22), f"{means[share]:.1f}", INK, font)
    save_image(picture, path)


def dot(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), GREEN)


def largest(many: list[list[float]]) -> float:
    """The largest value of all; 1 where there is none above 0, so that one can divide by it."""
    most = max((max(values) for values in many), default=1)
    return most or 1
