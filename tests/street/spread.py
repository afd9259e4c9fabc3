"""How well retrievers find the street's people, and how much that depends on who writes the sentence.

    python -m tests.street.spread OUTDIR CHECKPOINT [CHECKPOINT ...]        OUTDIR: see cut.py

Every sentence is asked once, of all test crops; evaluate.py asks it once for each crop of its person. Set i is the i-th
sentence of each person.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mra import ranking
from mra.run.command import run
from mra.weights.retrievers import load_retriever
from tests.street.cut import STREET

SHOWN = [ranking.METRICS.index(name) for name in ("R@1", "mAP")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    given = parser.parse_args()
    people, paths, gallery_ids = test_crops(given.out)
    print(f"{len(people)} people, {len(paths)} crops\n")
    print("| checkpoint | sentences | stage | R@1 | mAP | " + " | ".join(f"person {p}" for p in people.tolist()) + " |")
    print("|---" * (5 + len(people)) + "|")
    asked = people.repeat(1000)
    chance = torch.rand(len(asked), len(paths), generator=torch.Generator().manual_seed(0)).argsort(1)
    print(line("chance", "", "", ranking.metric_rows(chance, asked, gallery_ids), len(people)))
    for kind in ("further", "first"):
        for checkpoint in given.checkpoints:
            for stage, rows in measure(checkpoint, kind, people, paths, gallery_ids).items():
                print(line(str(checkpoint), kind, stage, rows, len(people)), flush=True)


def test_crops(out: Path) -> tuple[Tensor, list[str], Tensor]:
    """The people of test (P,), the paths of its crops, and whom each shows (G,)."""
    folder = out / "CUHK-PEDES"
    crops = [one for one in json.loads((folder / "reid_raw.json").read_text()) if one["split"] == "test"]
    gallery_ids = torch.tensor([one["id"] for one in crops])
    return gallery_ids.unique(), [str(folder / "imgs" / one["file_path"]) for one in crops], gallery_ids


def measure(checkpoint: Path, kind: str, people: Tensor, paths: list[str], gallery_ids: Tensor) -> dict[str, Tensor]:
    """METRICS of each sentence (S * P, 5) of both stages; sentence 0 of all people (P,) comes first, then 1, ..."""
    model, tokenizer, facts = load_retriever(checkpoint, torch.device("cpu"), "")
    texts = [STREET["captions"][str(person)][kind] for person in people.tolist()]
    asked = [sentence for one_of_each in zip(*texts) for sentence in one_of_each]
    query_ids = people.repeat(len(texts[0]))                                            # (S * P,)
    fused = "weight" in facts["val"]
    settings = ranking.Settings(model.config.rerank if fused else 0, facts.get("mirror", True))
    found = ranking.search(model, tokenizer, asked, paths, settings)
    rows = {"embeddings": rows_of(found, found.candidates, query_ids, gallery_ids)}
    if fused:
        rows["re-ranked"] = rows_of(found, found.reranked(facts["val"]["weight"]), query_ids, gallery_ids)
    return rows


def rows_of(found: ranking.Found, first: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """METRICS of each query (Q, 5); `first` (Q, K) is an order of the candidates, other images follow by similarity."""
    scores = (found.queries @ found.gallery.T).scatter(1, first, torch.inf)             # (Q, G)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order[:, :first.shape[1]] = first
    return ranking.metric_rows(order, query_ids, gallery_ids)


def line(checkpoint: str, kind: str, stage: str, rows: Tensor, people: int) -> str:
    """A row of the table: mean, and standard deviation over the sets; for each person R@1 and mAP."""
    sets = 100 * rows[:, SHOWN].unflatten(0, (-1, people))                              # (S, P, 2)
    cells = [checkpoint, kind, stage]
    for mean, spread in zip(sets.mean((0, 1)).tolist(), sets.mean(1).std(0).tolist()):
        cells.append(f"{mean:.1f} +- {spread:.1f}")
    cells += [f"{r1:.0f}, {average:.0f}" for r1, average in sets.mean(0).tolist()]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run(main)
