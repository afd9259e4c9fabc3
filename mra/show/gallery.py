"""A gallery of photographs searched for sentences and pictures: encoded and cached, the answers printed and drawn.

The cache is a safetensors file with the features of each photograph. Their name is a stamp, a digest of the
photograph's path, size and time of last change. The model and the precision are the cache key.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mra import ranking
from mra.config import EvalConfig, UserError
from mra.data.augment import tensor_of
from mra.data.files import IMAGE_FORMATS, examined, quoted
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.show import pictures

PART = 2000     # photographs encoded between two writings of the cache
PICTURED = 20   # queries shown in query.png
MEANING = {     # of a hit's numbers
    "similarity": "the cosine of the embeddings of query and image, -1 to 1, comparable within one model alone",
    "match": "the fusion encoder's probability that sentence and image belong together, 0 to 1, for the most similar "
             "images, which it re-ranks together with the similarity"}


class Hit(NamedTuple):
    """A photograph that was found. MEANING says what the numbers are."""
    path: str
    similarity: float
    match: float | None = None      # None beyond the `settings.k` most similar, and in a search by pictures


@dataclass(frozen=True)
class Gallery:
    """Encoded photographs to search. Several threads may search at once."""

    model: Retriever
    tokenizer: Tokenizer
    dataset: str            # its rules clean the sentences; empty: none do
    paths: list[str]
    features: Tensor        # (G, passes, E) of ranking.encode_gallery
    settings: ranking.Settings
    weight: float           # of the similarity beside the match

    def search(self, sentences: list[str], image: Image.Image | None = None, listed: int = ranking.FIRST,
               threshold: float = -1.0) -> list[list[Hit]]:
        """The first `listed` hits of each sentence, best first, without those of a similarity below the threshold.

        With a picture `image` similarity alone ranks: nothing matches two images. Call it under the model's autocast.
        """
        settings, example = replace(self.settings, listed=listed), None
        if image:
            settings, size = replace(settings, k=0), (self.model.config.height, self.model.config.width)
            example = ranking.encode_gallery(self.model, [tensor_of(image, size)], settings)[0]     # (passes, E)
        cleaned = [self.tokenizer.clean(sentence, self.dataset) for sentence in sentences]
        found = ranking.search(self.model, self.tokenizer, cleaned, self.paths, settings, self.features, example)
        results = []
        for q, order in enumerate(found.reranked(self.weight).tolist()):
            candidates = found.candidates[q].tolist()
            similarity = dict(zip(candidates, found.similarity[q].tolist()))
            match = dict(zip(candidates, found.match_logit[q].sigmoid().tolist()))          # of the first k alone
            hits = [Hit(self.paths[g], similarity[g], match.get(g)) for g in order]
            results.append([hit for hit in hits if hit.similarity >= threshold][:listed])
        return results


def unread(sentence: str, tokenizer: Tokenizer, dataset: str, longest: int, name: str = "The sentence") -> list[str]:
    """Sentences on what the model, which reads `longest` ids, does not read. Raises UserError if it knows no word."""
    pieces, words = tokenizer.encode(sentence)[1:-1], tokenizer.clean(sentence, dataset).split()
    unknown = pieces.count(tokenizer.unk_id)
    spelt = [tokenizer.pieces[i].removesuffix("</w>").strip("#") for i in pieces if i != tokenizer.unk_id]
    if not any(map(str.isalnum, spelt)) or not any(map(str.isalnum, "".join(words))):
        raise UserError(f"{name}: there is no word in it that the model knows.")
    ends = accumulate(len(tokenizer.encode(word, longest + 1)) - 2 for word in words)       # [CLS] and [SEP] are 2 ids
    beyond = sum(end > longest - 2 for end in ends)
    said = []
    if unknown:
        said.append(f"{name}: the model does not know {unknown} of its {len(pieces)} word pieces.")
    if beyond:
        said.append(f"{name}: the model does not read the last {beyond} of its {len(words)} words.")
    return said


def sentences_of(config: EvalConfig, dataset: str, tokenizer: Tokenizer, longest: int) -> list[str]:
    """The sentences of --query, then the lines of the file --queries; an empty one for a picture alone.

    Prints what the model does not read. Raises UserError, also for a sentence without a known word.
    """
    asked = [("--query", sentence) for sentence in config.query]        # where a sentence stands, and the sentence
    if config.queries:
        try:
            lines = Path(config.queries).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--queries {config.queries}: no readable UTF-8 text ({error}).") from error
        asked += [(f"{config.queries}, line {number}:", line.strip()) for number, line in enumerate(lines, 1)
                  if line.strip()]
        if not asked:
            raise UserError(f"--queries {config.queries}: there is no word in it.")
    for place, sentence in asked:
        for line in unread(sentence, tokenizer, dataset, longest, f"{place} {quoted(sentence)}"):
            print(line)
    return [sentence for _, sentence in asked] or [""]


def photographs(folder: Path, say: Callable = print) -> list[str]:
    """Images below `folder`, without hidden ones, linked folders and the query.png of an earlier search."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    found, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        earlier = path.name == "query.png" and path.with_suffix(".json").exists()
        if hidden or earlier or not path.is_file():
            continue
        if path.suffix.lower() in suffixes:
            found.append(str(path))
        else:
            others[quoted(path.suffix.lower())] += 1
    if others:
        say("Not read as images: " + ", ".join(f"{n} {kind}" for kind, n in sorted(others.items())))
    return found


def encode(name: str, every: list[str], model: Retriever, cache: Path, settings: ranking.Settings,
           say: Callable = print) -> tuple[list[str], Tensor, list[str]]:
    """Of `every` photograph: paths (G) of the readable ones, features (G, 2, E), and why others are left out."""
    key = {"weights": checkpoint.digest(model), "model": asdict(model.config), "mirror": settings.mirror,
           "bf16": torch.is_autocast_enabled(next(model.parameters()).device.type)}
    try:
        cached, written_with = checkpoint.load(cache)
    except UserError:       # it is missing or damaged
        cached, written_with = {}, {}
    stamps = {}
    for path in every:
        facts = os.stat(path)
        stamp = f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"
        stamps[path] = checkpoint.digest_of([os.fsencode(stamp)])
    known = {stamp: cached[stamp] for stamp in stamps.values() if written_with == key and stamp in cached}
    new = [path for path, stamp in stamps.items() if stamp not in known]
    say(f"{quoted(Path(name))}: {len(stamps)} files, {len(new)} of them to encode, the others known from {cache}.")
    for start in range(0, len(new), PART):
        part = new[start:start + PART]
        features = ranking.encode_gallery(model, Photographs(part, model.config), settings).cpu()
        fresh = {stamps[path]: pair for path, pair in zip(part, features) if pair.isfinite().all()}
        if fresh:
            known |= fresh
            checkpoint.save(cache, known, key)
        say(f"  {start + len(part):,} of {len(new):,} encoded")
    paths = [path for path in stamps if stamps[path] in known]
    broken = [examined(path)[0] or f"the image {quoted(Path(path))}: its features are not finite"
              for path in new if stamps[path] not in known]
    for trouble in broken:
        say(f"Left out: {trouble}")
    if not paths:
        raise UserError(f"{quoted(Path(name))}: no such folder, or no readable image in it.")
    return paths, torch.stack([known[stamps[path]] for path in paths]), broken


class Photographs(ranking.Images):
    """Image files as model input; NaN for one that cannot be read, so none is decoded twice to be checked first."""

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except UserError:
            return torch.full((3, *self.size), torch.nan)


def answer(config: EvalConfig, searched: Gallery, sentences: list[str], image: Image.Image | None,
           picture: Path) -> list[dict]:
    """Search for every sentence and the picture `image`; print the first images, draw them, and return them."""
    answers, rows = [], []
    for sentence, hits in zip(sentences, searched.search(sentences, image, threshold=config.threshold)):
        print(f"{quoted(sentence or Path(config.query_image))}:")
        for rank, hit in enumerate(hits, 1):
            match = "" if hit.match is None else f"  match {hit.match:.3f}"
            print(f"{rank:3}  similarity {hit.similarity:.3f}{match}  {quoted(Path(hit.path))}")
        answers.append({"query": sentence, "first": [
            {name: value for name, value in hit._asdict().items() if value is not None} for hit in hits]})
        if not hits:
            answers[-1]["note"] = f"no image has a similarity of {config.threshold} or more"
            print(f"  {answers[-1]['note']}")
        if len(rows) < PICTURED:
            framed = [(hit.path, pictures.GREY) for hit in hits]
            rows.append(pictures.ranked(searched.model, searched.tokenizer, sentence, framed))
            if image:
                rows[-1][1].insert(0, (image.resize(pictures.CELL), pictures.INK, "query"))
    for name, meaning in MEANING.items():
        if any(name in hit for one in answers for hit in one["first"]):
            print(f"{name}: {meaning}.")
    pictures.table(rows, picture)
    return answers
