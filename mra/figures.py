"""Pictures for people: ranked photographs with right and wrong marked, and where in them a phrase is found.

Before: ranking.py. After: evaluate.py, which draws them.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from mra.data.augment import tensor_of
from mra.data.records import open_image, save_image
from mra.data.tokenizer import Tokenizer, pad
from mra.retriever import Retriever

CELL = (96, 192)     # width and height of a photograph in the picture, pixels
GAP = 8              # between photographs, pixels
TITLE = 40           # height of a row's sentence, pixels
WHITE, GREEN, RED, GREY, INK = (255, 255, 255), (30, 150, 60), (205, 40, 40), (150, 150, 150), (20, 20, 20)

Cell = tuple[Image.Image, tuple[int, int, int], str]     # a picture of CELL pixels, the colour of its frame, its words


@torch.inference_mode()
def heat_map(model: Retriever, tokenizer: Tokenizer, path: str, phrase: str) -> Image.Image:
    """The photograph, coloured where its patches are similar to the phrase in the space of the region losses."""
    config, device = model.config, next(model.parameters()).device
    picture = open_image(path)
    tokens, _ = model.encode_image(tensor_of(picture, (config.height, config.width))[None].to(device))
    patches = model.image_feature(tokens[0, 1:, None].expand(-1, 2, -1))                  # (N, E)
    _, feature = model.encode_text(*(x.to(device) for x in pad([tokenizer.encode(phrase, config.max_tokens)],
                                                                     tokenizer.pad_id)))
    heat = (patches @ feature[0]).view(config.grid).float()                               # (rows, columns)
    heat = 0.6 * (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
    mask = Image.fromarray((255 * heat).byte().cpu().numpy()).resize(CELL, Image.Resampling.BICUBIC)
    photo = picture.resize(CELL, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", CELL, (255, 60, 0)), photo, mask)


def table(rows: list[tuple[str, list[Cell]]], path: Path) -> None:
    """Write rows of framed pictures, each row below its sentence."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    columns, high = max(len(cells) for _, cells in rows), TITLE + CELL[1] + 3 * GAP
    sheet = Image.new("RGB", (max(700, columns * (CELL[0] + GAP) + GAP), high * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (sentence, cells) in enumerate(rows):
        top = number * high
        pen.multiline_text((GAP, top + 2), _wrapped(sentence, font, sheet.width - 2 * GAP), INK, font, spacing=1)
        for column, (image, colour, words) in enumerate(cells):
            x, y = GAP + column * (CELL[0] + GAP), top + TITLE
            pen.rectangle((x - 3, y - 3, x + CELL[0] + 2, y + CELL[1] + 2), fill=colour)
            sheet.paste(image, (x, y))
            pen.text((x, y + CELL[1] + 3), _wrapped(words, small, CELL[0]).split("\n")[0], INK, small)
    save_image(sheet, path)


def sheet(rows: dict[str, torch.Tensor], path: Path) -> None:
    """Write rows of uint8 images (N, 3, H, W), each under its title."""
    table([(title, [(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(CELL, Image.Resampling.BICUBIC),
                     WHITE, "") for image in images]) for title, images in rows.items()], path)


def bars(groups: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """Write a chart with one horizontal bar per name in each group: the mean of its values, each of them a dot."""
    font, left, long, high = ImageFont.load_default(15), 160, 640, 24
    lines = sum(len(group) + 2 for group in groups.values() if group)
    picture = Image.new("RGB", (left + long + 80, high * (lines + 1) + GAP), "white")
    pen, top = ImageDraw.Draw(picture), high + GAP
    pen.text((GAP, GAP), title, INK, font)
    most = max((max(values) for group in groups.values() for values in group.values()), default=1) or 1
    for name, group in groups.items():
        if group:
            pen.text((GAP, top + high // 2), name, INK, font)
            top += 2 * high
        for bar, values in group.items():
            mean = sum(values) / len(values)
            pen.text((GAP, top), bar, INK, font)
            pen.rectangle((left, top + 2, left + long * mean / most, top + high - 4), GREY)
            for value in values:
                x, y = left + long * value / most, top + high // 2 - 1
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), GREEN)
            pen.text((left + long + GAP, top), f"{mean:.1f}", INK, font)
            top += high
    save_image(picture, path)


def curve(points: dict[float, list[float]], title: str, path: Path) -> None:
    """Write a chart of values over shares 0..1: a line through the mean at each share, each value a dot."""
    font, left, wide, high = ImageFont.load_default(15), 60, 600, 300
    picture = Image.new("RGB", (left + wide + 40, high + 80), "white")
    pen, most = ImageDraw.Draw(picture), max(max(values) for values in points.values()) or 1

    def place(share: float, value: float) -> tuple[float, float]:
        return left + wide * share, 40 + high * (1 - value / most)

    pen.text((GAP, GAP), title, INK, font)
    pen.line([place(0, most), place(0, 0), place(1, 0)], GREY, 2)
    means = {share: sum(values) / len(values) for share, values in points.items()}
    pen.line([place(*point) for point in means.items()], GREEN, 3)
    for share, values in points.items():
        for x, y in (place(share, value) for value in values):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), GREEN)
        pen.text((place(share, 0)[0] - 12, high + 48), f"{share:.0%}", INK, font)
        pen.text((place(share, 0)[0] - 12, place(share, max(values))[1] - 22), f"{means[share]:.1f}", INK, font)
    save_image(picture, path)


def photograph(path: str) -> Image.Image:
    return open_image(path).resize(CELL, Image.Resampling.BICUBIC)


def _wrapped(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """At most two lines of printable text, each at most `width` pixels where its words are short enough."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text[:1000]).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:2])
