"""Images and JSON read and written, and text made fit for a terminal. Read next: records.py."""

import io
import json
import multiprocessing
import os
import reprlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps
from safetensors import SafetensorError

from mra.config import UserError

PIXEL_LIMIT = 50_000_000            # a larger image is no pedestrian crop and may not fit in memory
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")


def quoted(value) -> str:
    """A value in a sentence for a terminal: quoted, control characters escaped, cut at 80 characters unless a Path."""
    if isinstance(value, Path):
        return repr(str(value))
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def printable(text) -> str:
    """A sentence for a terminal: characters that do not print are escaped, and it is cut at 2,000."""
    text = str(text)
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:2000])
    return safe if len(text) <= 2000 else safe + "..."


def in_processes(function: Callable, items: Sequence, workers: int, chunk: int) -> Iterator:
    """`function` of every item, in their order. Each of `workers` processes takes `chunk` items at a time."""
    if workers < 2 or len(items) <= chunk:
        yield from map(function, items)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(function, items, chunksize=chunk)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file to write. At the end it is renamed to `path`. Raises UserError."""
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:     # a full disk
        with suppress(OSError):         # of a read-only folder
            scratch.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); what was saved before it is kept.") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict | list, indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path, kind: type = dict) -> dict | list:
    """What `write_json` wrote, a dict or a list as `kind` says. Raises UserError if the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        return found
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to have it made anew.") from error


def open_image(path) -> Image.Image:
    """The first frame of a file, named or open, as RGB, upright, on white where transparent. Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode.startswith(("F", "I")):
                raise ValueError("its pixels have more than 8 bits a channel")
            image.load()
            with suppress(Exception):       # broken EXIF does not spoil the pixels
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:      # decoders raise almost every type on broken data
        if hasattr(path, "read"):   # an open file, without a name
            raise UserError("The picture cannot be read: it is damaged, of an unknown format or too large.") from error
        raise UserError(f"the image {quoted(Path(path))} cannot be read: {quoted(str(error))}") from error


def examined(path: str) -> tuple[str, int, int]:
    """Why an image does not decode ("" if it does), its width and height in pixels (0 if it does not)."""
    try:
        return "", *open_image(path).size
    except UserError as error:
        return str(error), 0, 0


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Write a PNG or JPEG file. Pillow itself does not notice a full disk."""
    packed = io.BytesIO()
    image.save(packed, {".png": "PNG", ".jpg": "JPEG"}[path.suffix], **options)
    with replacing(path) as scratch:
        scratch.write_bytes(packed.getvalue())
