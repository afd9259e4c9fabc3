"""A folder of one's own photographs: found, decoded, encoded once and remembered.

`encode` keeps the embeddings in a safetensors file; a photograph is encoded again only where its path, size, time of
change, the model or its precision are others. Before: ranking.py, checkpoint.py. After: evaluate.py (`--gallery`).
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra import checkpoint, ranking
from mra.config import UserError
from mra.data.check import trouble
from mra.data.records import IMAGE_FORMATS, shown
from mra.retriever import Retriever

PART = 2000     # photographs encoded between two writings of the cache
PICTURES = ("query.png", "ranking.png")


def photographs(folder: Path, say: Callable = print, results: Path | None = None) -> list[str]:
    """Paths of the files below `folder` with an image's suffix, sorted; other files are counted, hidden ones not.

    Links to folders are not followed, and pictures that evaluate.py wrote in the folder `results` are left out.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    found = sorted(path for path in folder.rglob("*")
                   if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = [path for path in found if path.is_file()
             and not (results and path.name in PICTURES and path.parent.resolve() == results.resolve())]
    others = Counter(shown(path.suffix.lower()) for path in files if path.suffix.lower() not in suffixes)
    others |= Counter("links to folders" for path in found if path.is_symlink() and path.is_dir())
    if others:
        say("Not read as images: " + ", ".join(f"{n} {kind}" for kind, n in sorted(others.items())))
    return [str(path) for path in files if path.suffix.lower() in suffixes]


def encode(folder: Path, model: Retriever, cache: Path, batch: int, workers: int = 0,
           say: Callable = print) -> tuple[list[str], Tensor, list[str]]:
    """Paths (G) of the readable photographs, features (G, 2, E) as of `encode_gallery`, and why others are left out.

    `cache` is the file of embeddings, and the features are its own, mapped and not held in memory; it is written where
    something changed, for this folder alone. Raises UserError for a folder without a readable image.
    """
    stamps, broken = {path: stamp(path) for path in photographs(folder, say, cache.parent)}, []
    owner = {"weights": checkpoint.digest(model), "model": asdict(model.config),
             "bf16": torch.is_autocast_enabled(next(model.parameters()).device.type)}
    files, features = remembered(cache, owner, model.config.embed)
    known = set(files)
    new = [path for path, mark in stamps.items() if mark not in known]
    say(f"{shown(folder)}: {len(stamps)} files, {len(new)} of them to encode, the others known from {cache}.")
    done = 0
    while done < len(new):
        part = new[done:done + max(PART, len(files) // 4)]      # the more there is to write again, the more rarely
        fresh = ranking.encode_gallery(model, Photographs(part, model.config), batch, workers).cpu()
        well = fresh.isfinite().all(-1).all(-1)                                     # (g,): it was decoded
        for path in (path for path, fine in zip(part, well) if not fine):
            broken.append(trouble(path) or f"the image {shown(Path(path))}: the model's features of it are not finite")
            say(f"Left out: {broken[-1]}")
            del stamps[path]
        if well.any():
            features, files = torch.cat([features, fresh[well]]), files + [stamps[p] for p in part if p in stamps]
            write(cache, features, files, owner)
        done += len(part)
        if len(new) > PART:
            say(f"  {done:,} of {len(new):,} encoded")
    if not stamps:
        raise UserError(f"--gallery {folder}: no such folder, or no readable image in it.")
    place, kept = {mark: number for number, mark in enumerate(files)}, list(stamps.values())
    if files != kept:
        write(cache, features[[place[mark] for mark in kept]], kept, owner)
    files, features = remembered(cache, owner, model.config.embed)
    if files != kept:
        raise UserError(f"{cache} cannot be read again as it was written: does another run write there? Give another "
                        "--out.")
    return list(stamps), features, broken


class Photographs(ranking.Images):
    """Image files as model input; nan for one that cannot be read, so that each is decoded once."""

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except UserError:
            return torch.full((3, *self.size), torch.nan)


def stamp(path: str) -> str:
    """What tells whether a file is still the same: where it is, its bytes, when it was changed."""
    facts = os.stat(path)
    return f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"


def write(cache: Path, features: Tensor, files: list[str], owner: dict) -> None:
    """Features (G, 2, E) and stamps (G), these as bytes: a safetensors header takes 100 MB at most."""
    stamps = torch.frombuffer(bytearray(os.fsencode("\0".join(files))), dtype=torch.uint8)
    checkpoint.save(cache, {"features": features, "stamps": stamps}, owner)


def remembered(cache: Path, owner: dict, width: int) -> tuple[list[str], Tensor]:
    """Stamps (G) and features (G, 2, E) of a cache that this very model wrote; else none."""
    try:
        tensors, facts = checkpoint.load(cache)
        files, features = os.fsdecode(tensors["stamps"].numpy().tobytes()).split("\0"), tensors["features"]
        fits = features.dtype == torch.float32 and features.shape == (len(files), 2, width)
        if fits and {name: facts.get(name) for name in owner} == owner:
            return files, features
    except (UserError, KeyError, TypeError):       # there is none, or it is of no use: written anew
        pass
    return [], torch.empty(0, 2, width)
