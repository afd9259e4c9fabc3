"""Sentences asked of a folder of photographs: the photographs are encoded and cached, the answers printed and drawn.

The cache is a safetensors file with the features of each photograph. Their name is a stamp, a digest of the
photograph's path, size and time of last change. The model and the precision are the cache key.
"""

import hashlib
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
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.show import pictures

PART = 2000     # photographs encoded between two writings of the cache
PICTURED = 20   # sentences shown in query.png


def sentences(config: EvalConfig, dataset: str, tokenizer: Tokenizer) -> list[str]:
    """--query, then the lines of the file --queries. Raises UserError for a sentence without a known word."""
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
        words = [tokenizer.pieces[i].removesuffix("</w>").strip("#") for i in pieces if i != tokenizer.unk_id]
        known = [word for word in words if word.isalnum()]
        if not known or not any(map(str.isalnum, tokenizer.clean(sentence, dataset))):
            raise UserError(f"{place} {shown(sentence)}: there is no word in it that the model knows.")
        if unknown:
            print(f"{place} {shown(sentence)}: the model does not know {unknown} of its {len(pieces)} word pieces.")
    return [sentence for _, sentence in asked]


def photographs(folder: Path, results: Path, say: Callable = print) -> list[str]:
    """Images below `folder`, without hidden ones, linked folders and pictures that evaluate.py wrote to `results`."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    found, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        own = path.stem.split("-")[0] in ("query", "ranking") and path.parent.resolve() == results.resolve()
        if hidden or own or not path.is_file():
            continue
        if path.suffix.lower() in suffixes:
            found.append(str(path))
        else:
            others[shown(path.suffix.lower())] += 1
    if others:
        say("Not read as images: " + ", ".join(f"{n} {kind}" for kind, n in sorted(others.items())))
    return found


def encode(folder: Path, model: Retriever, cache: Path, plan: ranking.Plan,
           say: Callable = print) -> tuple[list[str], Tensor, list[str]]:
    """Paths (G) of the readable photographs, features (G, 2, E), and why others are left out. Raises UserError."""
    key = {"weights": checkpoint.digest(model), "model": asdict(model.config),
           "bf16": torch.is_autocast_enabled(next(model.parameters()).device.type)}
    try:
        cached, written_with = checkpoint.load(cache)
    except UserError:       # it is missing or damaged
        cached, written_with = {}, {}
    stamps, known = {}, {}
    for path in photographs(folder, cache.parent, say):
        facts = os.stat(path)
        stamp = f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"
        stamps[path] = hashlib.blake2b(os.fsencode(stamp), digest_size=16).hexdigest()
        if written_with == key and stamps[path] in cached:
            known[stamps[path]] = cached[stamps[path]]
    new = [path for path, stamp in stamps.items() if stamp not in known]
    say(f"{shown(folder)}: {len(stamps)} files, {len(new)} of them to encode, the others known from {cache}.")
    for start in range(0, len(new), PART):
        part = new[start:start + PART]
        features = ranking.encode_gallery(model, Photographs(part, model.config), replace(plan, mirror=True)).cpu()
        fresh = {stamps[path]: pair for path, pair in zip(part, features) if pair.isfinite().all()}
        if fresh:
            known |= fresh
            checkpoint.save(cache, known, key)
        say(f"  {start + len(part):,} of {len(new):,} encoded")
    paths = [path for path in stamps if stamps[path] in known]
    broken = [examined(path)[0] or f"the image {shown(Path(path))}: its features are not finite"
              for path in new if stamps[path] not in known]
    for trouble in broken:
        say(f"Left out: {trouble}")
    if not paths:
        raise UserError(f"--gallery {folder}: no such folder, or no readable image in it.")
    return paths, torch.stack([known[stamps[path]] for path in paths]), broken


class Photographs(ranking.Images):
    """Image files as model input; NaN for one that cannot be read, so none is decoded twice to be checked first."""

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except UserError:
            return torch.full((3, *self.size), torch.nan)


def answer(model: Retriever, tokenizer: Tokenizer, asked: list[str], paths: list[str], found: ranking.Found,
           order: Tensor, picture: Path) -> list[dict]:
    """Print the first images of every sentence, draw them, and return them; order (Q, K) is the last stage's."""
    answers, rows = [], []
    for q, sentence in enumerate(asked):
        print(f"{shown(sentence)}:")
        hits, candidates = [], found.candidates[q].tolist()
        for rank, g in enumerate(order[q, :ranking.FIRST].tolist(), 1):
            place = candidates.index(g)
            hit = {"path": paths[g], "similarity": found.similarity[q, place].item()}
            said = f"similarity {hit['similarity']:.3f}"
            if place < found.match.shape[1]:       # it was re-scored
                hit["match"] = found.match[q, place].item()
                said += f"  match {hit['match']:6.2f}"
            hits.append(hit)
            print(f"{rank:3}  {said}  {shown(Path(paths[g]))}")
        answers.append({"query": sentence, "first": hits})
        if q < PICTURED:
            framed = [(hit["path"], pictures.GREY) for hit in hits]
            rows.append(pictures.ranked(model, tokenizer, sentence, framed))
    pictures.table(rows, picture)
    return answers
