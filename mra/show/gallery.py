"""Sentences asked of a folder of photographs: its images are encoded and cached, the answers printed and drawn.

The cache is a safetensors file. A photograph is encoded again only if its path, its size, the time of its last change,
the model or the precision has changed.
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
WRITTEN = "query", "ranking"     # first words in the names of evaluate.py's pictures


def sentences(config: EvalConfig, dataset: str, tokenizer: Tokenizer) -> list[str]:
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
        if not asked:
            raise UserError(f"--queries {config.queries}: there is no word in it.")
    for place, sentence in asked:
        pieces = tokenizer.encode(sentence)[1:-1]
        unknown = pieces.count(tokenizer.unk_id)
        known = [i for i in pieces if i != tokenizer.unk_id and tokenizer.pieces[i].strip("#").isalnum()]
        if not known or not any(map(str.isalnum, clean(sentence, dataset))):
            raise UserError(f"{place} {shown(sentence)}: there is no word in it that the model knows.")
        if unknown:
            print(f"{place} {shown(sentence)}: the model does not know {unknown} of its {len(pieces)} word pieces.")
    return [sentence for _, sentence in asked]


def photographs(folder: Path, results: Path, say: Callable = print) -> list[str]:
    """Sorted paths of the images below `folder`, but for hidden ones and pictures that evaluate.py wrote to `results`.

    Links to folders are not followed. Files whose suffix is no image's are counted.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    found, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        own = path.stem.split("-")[0] in WRITTEN and path.parent.resolve() == results.resolve()
        if hidden or own:
            continue
        if path.is_symlink() and path.is_dir():
            others["links to folders"] += 1
        elif path.is_file() and path.suffix.lower() in suffixes:
            found.append(str(path))
        elif path.is_file():
            others[shown(path.suffix.lower())] += 1
    if others:
        say("Not read as images: " + ", ".join(f"{n} {kind}" for kind, n in sorted(others.items())))
    return found


def encode(folder: Path, model: Retriever, cache: Path, plan: ranking.Plan,
           say: Callable = print) -> tuple[list[str], Tensor, list[str]]:
    """Paths (G) of the readable photographs, features (G, 2, E) as of `encode_gallery`, and why others are left out.

    `cache` is the file of one folder's embeddings. Raises UserError for a folder without a readable image.
    """
    stamps = {}         # by which photographs are known again
    for path in photographs(folder, cache.parent, say):
        facts = os.stat(path)
        stamps[path] = f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"
    owner = {"weights": checkpoint.digest(model), "model": asdict(model.config),
             "bf16": torch.is_autocast_enabled(next(model.parameters()).device.type)}
    cached = remembered(cache, owner, model.config.embed)
    known = {mark: cached[mark] for mark in stamps.values() if mark in cached}
    new = [path for path, mark in stamps.items() if mark not in known]
    say(f"{shown(folder)}: {len(stamps)} files, {len(new)} of them to encode, the others known from {cache}.")
    broken, size = [], max(PART, len(stamps) // 10)         # a large cache is written less often
    for start in range(0, len(new), size):
        part = new[start:start + size]
        features = ranking.encode_gallery(model, Photographs(part, model.config), replace(plan, mirror=True)).cpu()
        fresh = {stamps[path]: pair for path, pair in zip(part, features) if pair.isfinite().all()}
        for path in part:
            if stamps[path] not in fresh:
                trouble, _, _ = examined(path)
                broken.append(trouble or f"the image {shown(Path(path))}: the model's features of it are not finite")
                say(f"Left out: {broken[-1]}")
        if fresh:
            known |= fresh
            write(cache, known, owner)
        say(f"  {start + len(part):,} of {len(new):,} encoded")
    if not known:
        raise UserError(f"--gallery {folder}: no such folder, or no readable image in it.")
    paths = [path for path, mark in stamps.items() if mark in known]
    return paths, torch.stack([known[stamps[path]] for path in paths]), broken


class Photographs(ranking.Images):
    """Image files as model input; nan for one that cannot be read, so that none is decoded only to be checked."""

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except UserError:
            return torch.full((3, *self.size), torch.nan)


def write(cache: Path, known: dict[str, Tensor], owner: dict) -> None:
    """Write features (2, E) by stamp. Stamps are stored as bytes: a safetensors header has 100 MB at most."""
    stamps = torch.frombuffer(bytearray(os.fsencode("\0".join(known))), dtype=torch.uint8)
    checkpoint.save(cache, {"features": torch.stack(list(known.values())), "stamps": stamps}, owner)


def remembered(cache: Path, owner: dict, width: int) -> dict[str, Tensor]:
    """Features (2, E) by stamp; none where the cache is missing, damaged, or another model's."""
    try:
        tensors, facts = checkpoint.load(cache)
        stamps, features = os.fsdecode(tensors["stamps"].numpy().tobytes()).split("\0"), tensors["features"]
    except (UserError, KeyError, TypeError):
        return {}
    fits = facts == owner and features.dtype == torch.float32 and features.shape == (len(stamps), 2, width)
    return dict(zip(stamps, features)) if fits else {}


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
