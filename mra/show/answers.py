"""Answers to sentences: the first images of a gallery for each of them, printed and drawn.

evaluate.py calls `answer` for --query and --queries, and `examples` for the queries of a test split.
"""

from pathlib import Path

import torch
from torch import Tensor

from mra.config import EvalConfig, UserError
from mra.data.files import shown
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.ranking import FIRST, Found
from mra.retriever import Retriever
from mra.show import pictures

PICTURED = 20    # sentences shown in query.png
EXAMPLES = 6     # queries of a split shown in ranking.png; the first half of them with heat maps


def sentences(config: EvalConfig, dataset: str) -> list[str]:
    """--query, then the lines of the file --queries that are not blank. Raises UserError for one without a word."""
    asked = {}       # the place of each sentence, and the sentence
    if config.query:
        asked["--query"] = config.query
    if config.queries:
        try:
            lines = Path(config.queries).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--queries {config.queries}: no readable UTF-8 text ({error}).") from error
        asked |= {f"{config.queries}, line {number}:": line.strip() for number, line in enumerate(lines, 1)
                  if line.strip()}
    for place, sentence in asked.items() or [(f"--queries {config.queries}:", "")]:
        if not any(map(str.isalnum, clean(sentence, dataset))):
            raise UserError(f"{place} {shown(sentence)}: there is no word in it that the model could know.")
    return list(asked.values())


def answer(model: Retriever, tokenizer: Tokenizer, asked: list[str], paths: list[str], found: Found, order: Tensor,
           picture: Path) -> list[dict]:
    """Print the first images of every sentence, draw them, and return them; order (Q, K) is the last stage's."""
    answers, rows = [], []
    for q, sentence in enumerate(asked):
        print(f"{shown(sentence)}:")
        first, candidates = [], found.candidates[q].tolist()
        for g in order[q, :FIRST].tolist():
            place, match = candidates.index(g), ""
            hit = {"path": paths[g], "similarity": found.similarity[q, place].item()}
            if place < found.logits.shape[1]:       # it was re-scored
                hit["match"] = found.logits[q, place].item()
                match = f"match {hit['match']:6.2f}  "
            first.append(hit)
            print(f"{len(first):3}  similarity {hit['similarity']:.3f}  {match}{shown(Path(paths[g]))}")
        answers.append({"query": sentence, "first": first})
        if q < PICTURED:
            framed = [(hit["path"], pictures.GREY) for hit in first]
            rows.append(pictures.ranked(model, tokenizer, sentence, framed, heat=True))
    pictures.table(rows, picture)
    return answers


def examples(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], order: Tensor,
             right: Tensor) -> list[pictures.Row]:
    """Evenly spaced queries with their first images of order (Q, K), framed green where `right` (Q, K), else red."""
    rows = []
    for q in torch.linspace(0, len(captions) - 1, min(EXAMPLES, len(captions))).long().tolist():
        framed = [(paths[g], pictures.GREEN if correct else pictures.RED)
                  for g, correct in zip(order[q, :FIRST].tolist(), right[q].tolist())]
        rows.append(pictures.ranked(model, tokenizer, captions[q], framed, heat=len(rows) < EXAMPLES // 2))
    return rows
