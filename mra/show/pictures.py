"""Pictures for people: ranked photographs with right and wrong ones marked, and heat maps of phrases in them."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mra.data.augment import tensor_of
from mra.data.files import open_image, save_image
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.ranking import FIRST, encode_queries
from mra.retriever import Retriever

CELL = (96, 192)     # width and height of a photograph in the picture, pixels
GAP = 8              # between photographs, pixels
TITLE = 40           # height of a row's sentence, pixels
EXAMPLES = 6         # queries of a split shown in ranking.png
WHITE, GREEN, RED, GREY, INK = (255, 255, 255), (30, 150, 60), (205, 40, 40), (150, 150, 150), (20, 20, 20)

Cell = tuple[Image.Image, tuple[int, int, int], str]     # an image of CELL pixels, the colour of its frame, its words
Row = tuple[str, list[Cell]]                             # a sentence and the images below it


def examples(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], order: Tensor,
             right: Tensor) -> list[Row]:
    """Evenly spaced queries with their first images of order (Q, K), framed green where `right` (Q, K), else red."""
    rows = []
    for q in torch.linspace(0, len(captions) - 1, min(EXAMPLES, len(captions))).long().tolist():
        framed = [(paths[g], GREEN if correct else RED)
                  for g, correct in zip(order[q, :FIRST].tolist(), right[q].tolist())]
        rows.append(ranked(model, tokenizer, captions[q], framed))
    return rows


def ranked(model: Retriever, tokenizer: Tokenizer, sentence: str, framed: list[tuple]) -> Row:
    """A sentence with its first images, (path, colour) each, and heat maps of two of its phrases in the first image."""
    cells = [(open_image(path).resize(CELL), colour, "") for path, colour in framed]
    phrases = noun_phrases(sentence)[-2:] if framed else []
    for phrase in phrases:
        cells.append((heat_map(model, tokenizer, framed[0][0], phrase), GREY, phrase))
    return sentence, cells


@torch.inference_mode()
def heat_map(model: Retriever, tokenizer: Tokenizer, path: str, phrase: str,
             size: tuple[int, int] = CELL) -> Image.Image:
    """The photograph, red where its patches are similar to the phrase in the space of the region losses."""
    config, device = model.config, next(model.parameters()).device
    picture = open_image(path)
    tokens, _ = model.encode_image(tensor_of(picture, (config.height, config.width))[None].to(device))
    patches = model.image_feature(tokens[0, 1:, None].expand(-1, 2, -1))     # (N, E): each patch as token 0
    _, _, feature = encode_queries(model, tokenizer, [phrase], fuse=False)                # (1, E)
    heat = (patches @ feature[0]).view(config.grid).float()                               # (rows, columns)
    heat = 0.6 * (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
    mask = Image.fromarray((255 * heat).byte().cpu().numpy()).resize(size)
    return Image.composite(Image.new("RGB", size, (255, 60, 0)), picture.resize(size), mask)


def sheet(rows: dict[str, Tensor], path: Path) -> None:
    """Write rows of uint8 images (N, 3, H, W), each under its title."""
    framed = []
    for title, images in rows.items():
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        framed.append((title, [(Image.fromarray(image).resize(CELL), WHITE, "") for image in pixels]))
    table(framed, path)


def table(rows: list[Row], path: Path) -> None:
    """Write rows of framed pictures, each row below its sentence."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    columns, high = max(len(cells) for _, cells in rows), TITLE + CELL[1] + 3 * GAP
    page = Image.new("RGB", (max(700, columns * (CELL[0] + GAP) + GAP), high * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for number, (sentence, cells) in enumerate(rows):
        top = number * high
        pen.multiline_text((GAP, top + 2), fitted(sentence, font, page.width - 2 * GAP), INK, font, spacing=1)
        for column, (image, colour, words) in enumerate(cells):
            x, y = GAP + column * (CELL[0] + GAP), top + TITLE
            pen.rectangle((x - 3, y - 3, x + CELL[0] + 2, y + CELL[1] + 2), fill=colour)
            page.paste(image, (x, y))
            pen.text((x, y + CELL[1] + 3), fitted(words, small, CELL[0]).split("\n")[0], INK, small)
    save_image(page, path)


def fitted(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """At most two lines of about `width` pixels. Unprintable characters become blank."""
    printable = "".join(character if character.isprintable() else " " for character in text[:1000])
    letters = int(width / font.getlength("n"))
    return "\n".join(textwrap.wrap(printable, letters, break_long_words=False, break_on_hyphens=False)[:2])
