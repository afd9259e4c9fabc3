"""Do the heat maps of query.png follow what a person wears, or show where such a thing usually is?

    python -m tests.street.maps OUTDIR CHECKPOINT        OUTDIR: see cut.py

For each phrase, over all test crops:

- position: the share of the variance within the maps that their mean over all crops explains; 1 = the same map for all
- stays: cosine of a crop's map with the map of the same crop upside down
- follows: the same after that map, too, is turned, so that clothes lie on clothes again

Writes OUTDIR/maps.png, one crop of each person with its maps.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mra.data.augment import tensor_of
from mra.data.files import open_image
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer, pad
from mra.formats.read import load
from mra.retriever import Retriever
from mra.run.command import run
from mra.show import pictures
from mra.weights.retrievers import load_retriever

PHRASES = ("a red jacket", "a black coat", "a black backpack", "blue jeans", "black trousers", "white sneakers",
           "long blond hair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoint", type=Path)
    given = parser.parse_args()
    source = load("cuhk", "test", given.out)
    model, tokenizer, _ = load_retriever(given.checkpoint, torch.device("cpu"), "")
    photographs = [open_image(record.path) for record in source.records]
    turned = [photograph.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for photograph in photographs]
    upright, upside_down = maps_of(model, tokenizer, photographs), maps_of(model, tokenizer, turned)
    print("| phrase | position | stays | follows |\n|---|---|---|---|")
    for phrase, maps, others in zip(PHRASES, upright, upside_down):                     # (G, rows, columns) each
        position = 1 - (maps - maps.mean(0)).square().sum() / maps.square().sum()
        cosines = [F.cosine_similarity(maps.flatten(1), other.flatten(1)).mean() for other in (others, others.flip(1))]
        print(f"| {phrase} | " + " | ".join(f"{value:.2f}" for value in (position, *cosines)) + " |")
    draw(model, tokenizer, source, given.out / "maps.png")


@torch.inference_mode()
def maps_of(model: Retriever, tokenizer: Tokenizer, photographs: list[Image.Image]) -> Tensor:
    """The maps (P, G, rows, columns) of PHRASES as in `pictures.heat_map`, each with mean 0."""
    config, found = model.config, []
    ids, keep = pad([tokenizer.encode(phrase, config.max_tokens) for phrase in PHRASES], tokenizer.pad_id)
    words = model.encode_text(ids, keep)[1]                                             # (P, E)
    for photograph in photographs:
        tokens, _ = model.encode_image(tensor_of(photograph, (config.height, config.width))[None])
        patches = model.image_feature(tokens[0, 1:, None].expand(-1, 2, -1))            # (N, E)
        heat = words @ patches.T                                                        # (P, N)
        found.append((heat - heat.mean(1, keepdim=True)).unflatten(1, config.grid))
    return torch.stack(found, 1)


def draw(model: Retriever, tokenizer: Tokenizer, source: RecordSet, picture: Path) -> None:
    """The middle crop of each person, then the map of each phrase in it."""
    rows = []
    for person in sorted({record.identity for record in source.records}):
        own = [record.path for record in source.records if record.identity == person]
        path = own[len(own) // 2]
        cells = [(open_image(path).resize(pictures.CELL), pictures.GREY, "")]
        cells += [(pictures.heat_map(model, tokenizer, path, phrase), pictures.GREY, phrase) for phrase in PHRASES]
        rows.append((Path(path).name, cells))
    pictures.table(rows, picture)


if __name__ == "__main__":
    run(main)
