"""Sentences asked of a folder of photographs: its images encoded once and remembered, the answers printed and drawn.

`encode` keeps the embeddings in a safetensors file. A photograph is encoded again only where its path, its size, the
time of its last change, the model or the precision has changed.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra import ranking
from mra.config import EvalConfig, UserError
from mra.data.files import IMAGE_FORMATS, examined, shown
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.show import pictures

PART = 2000     # photographs encoded between two writings of the cache
PICTURED = 20   # sentences shown in query.png
WRITTEN = "query", "ranking"     # first words of the names of pictures that evaluate.py writes


def sentences(config: EvalConfig, dataset: str, tokenizer: Tokenizer, say: Callable = print) -> list[str]:
    """--query, then the lines of the file --queries that are not blank. Raises UserError for one without a known word.

    Says how many of a sentence's word pieces the vocabulary lacks.
    """
    asked = [("--query", sentence) for sentence in config.query]        # where a sentence stands, and the sentence
    if config.queries:
        try:
            lines = Path(config.queries).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--queries {config.queries}: no readable UTF-8 text ({error}).") from error
        asked += [(f"{config.queries}, line {number}:", line.strip()) for number, line in enumerate(lines, 1)
                  if line.strip()]
    for place, sentence in asked or [(f"--queries {config.queries}:", "")]:
        pieces = tokenizer.encode(sentence)[1:-1]
        unknown = pieces.count(tokenizer.unk_id)
        known = [i for i in pieces if i != tokenizer.unk_id and tokenizer.pieces[i].strip("#").isalnum()]
        if not known or not any(map(str.isalnum, clean(sentence, dataset))):
            raise UserError(f"{place} {shown(sentence)}: there is no word in it that the model knows.")
        if unknown:
            say(f"{place} {shown(sentence)}: the model does not know {unknown} of its {len(pieces)} word pieces.")
    return [sentence for _, sentence in asked]


def photographs(folder: Path, say: Callable = print, results: Path | None = None) -> list[str]:
    """Sorted paths of the files below `folder` with an image's suffix. Others are counted, unless they are hidden.

    Links to folders are not followed. Pictures that evaluate.py wrote to the folder `results` are left out.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    found, others, own = [], Counter(), results and results.resolve()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and path.is_dir():
            others["links to folders"] += 1
        elif path.is_file() and path.suffix.lower() not in suffixes:
            others[shown(path.suffix.lower())] += 1
        elif path.is_file() and (path.stem.split("-")[0] not in WRITTEN or path.parent.resolve() != own):
            found.append(str(path))
    if others:
        say("Not read as images: " + ", ".join(f"{n} {kind}" for kind, n in sorted(others.items())))
    return found


def encode(folder: Path, model: Retriever, cache: Path, plan: ranking.Plan,
           say: Callable = print) -> tuple[list[str], Tensor, list[str]]:
    """Paths (G) of the readable photographs, features (G, 2, E) as of `encode_gallery`, and why others are left out.

    `cache` is the file of embeddings of one folder, written only if something changed. The features are mapped from it
    and not held in memory. Raises UserError for a folder without a readable image.
    """
    stamps = {path: stamp(path) for path in photographs(folder, say, cache.parent)}
    owner = {"weights": checkpoint.digest(model), "model": asdict(model.config),
             "bf16": torch.is_autocast_enabled(next(model.parameters()).device.type)}
    files, features = remembered(cache, owner, model.config.embed)
    known = set(files)
    new = [path for path, mark in stamps.items() if mark not in known]
    say(f"{shown(folder)}: {len(stamps)} files, {len(new)} of them to encode, the others known from {cache}.")
    broken, size = [], max(PART, len(stamps) // 10)         # a large cache is written less often
    for start in range(0, len(new), size):
        part = new[start:start + size]
        fresh = ranking.encode_gallery(model, Photographs(part, model.config), replace(plan, mirror=True)).cpu()
        well = fresh.isfinite().flatten(1).all(1)               # (g,) False where it was not decoded
        for path, fine in zip(part, well.tolist()):
            if fine:
                files.append(stamps[path])
                continue
            trouble, _, _ = examined(path)
            broken.append(trouble or f"the image {shown(Path(path))}: the model's features of it are not finite")
            say(f"Left out: {broken[-1]}")
            del stamps[path]
        if well.any():
            features = torch.cat([features, fresh[well]])
            write(cache, features, files, owner)
        if len(new) > PART:
            say(f"  {start + len(part):,} of {len(new):,} encoded")
    if not stamps:
        raise UserError(f"--gallery {folder}: no such folder, or no readable image in it.")
    kept = list(stamps.values())
    if files != kept:
        rows = {mark: row for row, mark in enumerate(files)}
        write(cache, features[[rows[mark] for mark in kept]], kept, owner)
    files, features = remembered(cache, owner, model.config.embed)
    if files != kept:
        raise UserError(f"{cache} is not as it was written: does another run write there? Give another --out.")
    return list(stamps), features, broken


class Photographs(ranking.Images):
    """Image files as model input; nan for one that cannot be read, so that none is decoded only to be checked."""

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except UserError:
            return torch.full((3, *self.size), torch.nan)


def stamp(path: str) -> str:
    """A file's path, size and time of change, by which it is known again."""
    facts = os.stat(path)
    return f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"


def write(cache: Path, features: Tensor, files: list[str], owner: dict) -> None:
    """Write features (G, 2, E) and stamps (G). Stamps are stored as bytes: a safetensors header has 100 MB at most."""
    stamps = torch.frombuffer(bytearray(os.fsencode("\0".join(files))), dtype=torch.uint8)
    checkpoint.save(cache, {"features": features, "stamps": stamps}, owner)


def remembered(cache: Path, owner: dict, width: int) -> tuple[list[str], Tensor]:
    """Stamps (G) and features (G, 2, E) of the cache; none where another model wrote it."""
    try:
        tensors, facts = checkpoint.load(cache)
        files, features = os.fsdecode(tensors["stamps"].numpy().tobytes()).split("\0"), tensors["features"]
        fits = features.dtype == torch.float32 and features.shape == (len(files), 2, width)
        if fits and {name: facts.get(name) for name in owner} == owner:
            return files, features
    except (UserError, KeyError, TypeError):
        pass        # there is none, or it is damaged: it is written anew
    return [], torch.empty(0, 2, width)


def answer(model: Retriever, tokenizer: Tokenizer, asked: list[str], paths: list[str], found: ranking.Found,
           order: Tensor, picture: Path) -> list[dict]:
    """Print the first images of every sentence, draw them, and return them; order (Q, K) is the last stage's."""
    answers, rows = [], []
    for q, sentence in enumerate(asked):
        print(f"{shown(sentence)}:")
        first, candidates = [], found.candidates[q].tolist()
        for g in order[q, :ranking.FIRST].tolist():
            place = candidates.index(g)
            hit = {"path": paths[g], "similarity": found.similarity[q, place].item()}
            said = f"similarity {hit['similarity']:.3f}"
            if place < found.match.shape[1]:       # it was re-scored
                hit["match"] = found.match[q, place].item()
                said += f"  match {hit['match']:6.2f}"
            first.append(hit)
            print(f"{len(first):3}  {said}  {shown(Path(paths[g]))}")
        answers.append({"query": sentence, "first": first})
        if q < PICTURED:
            framed = [(hit["path"], pictures.GREY) for hit in first]
            rows.append(pictures.ranked(model, tokenizer, sentence, framed, heat=True))
    pictures.table(rows, picture)
    return answers
