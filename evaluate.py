"""Evaluate a retriever on test splits, or ask it for a person in words.

    python evaluate.py                                        the newest checkpoint, on its own dataset's test split
    python evaluate.py --dataset icfg cuhk rstp               cross-domain rows
    python evaluate.py --checkpoint out/icfg-demo-s0/best.safetensors --k 64
    python evaluate.py --query "a woman in a red coat" --gallery DIR     rank any folder of images
    python evaluate.py --checkpoint ft_cuhk.pth --dataset cuhk --data-root DIR     a released checkpoint

The released code's score depends on the number of processes it runs on: `--fusion published` gives that of one,
`--fusion published --weight 0.008` about that of four. The clean score of a released checkpoint, which knows no val,
is the matching logit alone unless --weight is given.
Every field of EvalConfig is a flag. Prints the metrics of both stages and writes results.json and ranking.png.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mra import checkpoint, figures, ranking, released
from mra.config import UserError, parse, run
from mra.data import records, town
from mra.data.words import clean, noun_phrases
from mra.training import choose_device, make_folder, queries_of

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and how."""

    checkpoint: str = ""              # ours, or a released one (.pth); empty: the newest best.safetensors under out/
    vocab: str = ""                   # BERT's vocab.txt for a released checkpoint; empty: the one beside it
    dataset: tuple[str, ...] = ()     # empty: the one that the checkpoint was trained on
    split: str = "test"               # train, val or test
    data_root: str = ""               # folder of the real sets; empty: the demo town
    k: int = -1                       # candidates that the fusion encoder re-scores; -1: the preset's; 0: none
    mirror: bool = True               # average over the mirror image
    fusion: str = "clean"             # clean: a pair's score depends on that pair; published: as the released code
    weight: float = -1.0              # of the similarity; -1: clean, chosen on val; published, 0.002 a process
    query: str = ""                   # a sentence: rank a gallery for it instead
    gallery: str = ""                 # a folder of images for --query; empty: the test images
    out: str = ""                     # folder of results.json and ranking.png; empty: the checkpoint's
    batch: int = 64                   # images encoded at a time
    workers: int = 0                  # image decoding processes
    allow_missing: bool = False       # drop records whose image is missing
    device: str = ""                  # cuda or cpu; empty: cuda where there is one


def main() -> None:
    config = parse(EvalConfig, __doc__)
    check(config)
    device = choose_device(config.device)
    path = Path(config.checkpoint) if config.checkpoint else newest()
    model, tokenizer, facts = released.load_retriever(path, device, config.vocab)
    datasets = config.dataset or (facts["train"]["dataset"],)
    if not datasets[0] and not config.gallery:
        raise UserError(f"{path} does not say what it was trained on; give --dataset.")
    print(f"{path}: trained on {facts['train']['dataset'] or 'an unnamed set'}, pretrained on "
          f"{facts['pretrained_on']}, seed {facts['train']['seed']}; evaluating on {device}.")
    out = Path(config.out) if config.out else path.parent
    make_folder(out)
    if config.query:
        return answer(config, model, tokenizer, facts, datasets[0], out)

    rows, results = [], {}
    print(f"{'':24}" + "".join(f"{name:>8}" for name in METRICS))
    for dataset in datasets:
        started = time.perf_counter()
        source = records.load(dataset, config.split, data_root(config, facts, dataset), config.allow_missing)
        captions, query_ids, paths, gallery_ids = queries_of(source)
        found, order = rank(config, model, tokenizer, facts, captions, paths)
        stages = {"embeddings": found.first_order()} | ({} if order is None else {"re-ranked": order})
        metrics = {stage: ranking.order_metrics(ranked, query_ids, gallery_ids) for stage, ranked in stages.items()}
        for stage, values in metrics.items():
            print(f"{source.name + ' ' + stage:24}" + "".join(f"{values[name]:8.2f}" for name in METRICS))
        results[dataset] = metrics | {"queries": len(captions), "gallery": len(paths),
                                      "identities": len(set(gallery_ids.tolist())),
                                      "seconds": round(time.perf_counter() - started, 1)}
        rows += picture_rows(model, tokenizer, captions, query_ids, paths, gallery_ids, list(stages.values())[-1])
    checkpoint.write_json(out / "results.json", {
        "results": results, "evaluation": asdict(config), "checkpoint": str(path), "versions": checkpoint.VERSIONS,
        "pretrained_on": facts["pretrained_on"], "train": facts["train"], "weight": weight_of(config, facts)})
    figures.ranking_picture(rows, out / "ranking.png")
    print(f"Wrote {out / 'results.json'} and {out / 'ranking.png'}.")


def check(config: EvalConfig) -> None:
    """Raise UserError for values that no run can use."""
    if config.fusion not in ("clean", "published"):
        raise UserError(f"--fusion {config.fusion}: choose clean or published.")
    if config.k < -1:
        raise UserError(f"--k {config.k}: give the number of candidates to re-rank, 0 for none.")
    if config.batch < 1 or config.workers < 0:
        raise UserError(f"--batch {config.batch} --workers {config.workers}: give at least 1 and 0.")
    if config.weight != -1 and not 0 <= config.weight < float("inf"):
        raise UserError(f"--weight {config.weight}: give 0 or more, or leave it out.")
    if config.query and len(config.dataset) > 1:
        raise UserError("--query ranks one gallery: give one --dataset.")
    if config.split not in records.SPLITS:
        raise UserError(f"--split {config.split}: choose one of {', '.join(records.SPLITS)}.")
    for dataset in config.dataset:
        if dataset not in records.DATASETS and not Path(dataset).is_dir():
            raise UserError(f"--dataset {dataset}: choose from {', '.join(records.DATASETS)}, or give a set's folder.")
    if config.gallery and not config.query:
        raise UserError("--gallery needs --query: the sentence to rank its images for.")


def newest() -> Path:
    """The last written checkpoint under out/."""
    found = sorted(Path("out").glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("There is no checkpoint under out/ yet; `python train.py --dataset icfg` makes one.")
    return found[-1]


def data_root(config: EvalConfig, facts: dict, dataset: str) -> Path:
    """The folder given, or the demo town, drawn where it is missing."""
    if dataset in records.DATASETS and not config.data_root and facts["train"]["data_root"]:
        raise UserError(f"This checkpoint was trained on {facts['train']['data_root']}; say which --data-root to use.")
    return Path(config.data_root) if config.data_root else town.ready(dataset, facts["train"]["preset"] == "tiny")


def weight_of(config: EvalConfig, facts: dict) -> float:
    """The weight of the similarity beside the matching score."""
    if config.weight >= 0:
        return config.weight
    return 0.002 if config.fusion == "published" else facts["val"].get("weight", 0.0)


def rank(config: EvalConfig, model, tokenizer, facts: dict, captions: list[str],
         paths: list[str]) -> tuple[ranking.Search, torch.Tensor | None]:
    """Both stages for every caption; the order (Q, G) of the second is None where the fusion encoder is untrained."""
    k = model.config.rerank if config.k < 0 else config.k
    if "weight" not in facts["val"]:
        k = 0
    clean_score = config.fusion == "clean"
    found = ranking.search(model, tokenizer, captions, paths, k, config.mirror, config.batch, config.workers,
                           swap=clean_score)
    if k == 0:
        return found, None
    weight = weight_of(config, facts)
    return found, (found.order(weight) if clean_score else
                   found.published_scores(weight).argsort(dim=1, descending=True, stable=True))


def picture_rows(model, tokenizer, captions, query_ids, paths, gallery_ids, order, count: int = 6) -> list[figures.Row]:
    """Evenly spaced queries with their first ten photographs; the first half with heat maps of two phrases."""
    rows = []
    for number, q in enumerate(torch.linspace(0, len(captions) - 1, min(count, len(captions))).long().tolist()):
        first = order[q, :10].tolist()
        phrases = noun_phrases(captions[q])[-2:] if number < count // 2 else []
        heat = tuple((phrase, figures.heat_map(model, tokenizer, paths[first[0]], phrase)) for phrase in phrases)
        rows.append(figures.Row(captions[q], [paths[g] for g in first],
                                [bool(gallery_ids[g] == query_ids[q]) for g in first], heat))
    return rows


def readable(paths: list[str]) -> list[str]:
    """The images that decode; the others are named and left out."""
    good = []
    for path in paths:
        try:
            records.open_image(path)
            good.append(path)
        except UserError as error:
            print(f"Left out: {error}")
    return good


def answer(config: EvalConfig, model, tokenizer, facts: dict, dataset: str, out: Path) -> None:
    """Rank a folder of images, or the test images, for one sentence."""
    sentence = clean(config.query, dataset)
    if not any(map(str.isalnum, sentence)):
        raise UserError(f"--query {records.shown(config.query)}: there is no word in it that the model could know.")
    if config.gallery:
        folder = Path(config.gallery)
        paths = readable(sorted(str(path) for path in folder.rglob("*")
                                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()))
        if not paths:
            raise UserError(f"--gallery {folder}: no such folder, or no readable image in it.")
    else:
        paths = [record.path for record in records.load(
            dataset, config.split, data_root(config, facts, dataset), config.allow_missing).records]
    found, order = rank(config, model, tokenizer, facts, [sentence], paths)
    first = (found.first_order() if order is None else order)[0, :10].tolist()
    for place, g in enumerate(first, 1):
        match = "".join(f"match {logit:6.2f}  " for logit in found.logits[0, found.candidates[0] == g].tolist())
        print(f"{place:3}  similarity {found.similarity[0, g]:.3f}  {match}{records.shown(paths[g])}")
    heat = tuple((phrase, figures.heat_map(model, tokenizer, paths[first[0]], phrase))
                 for phrase in noun_phrases(config.query)[-2:])
    figures.ranking_picture([figures.Row(config.query, [paths[g] for g in first], [None] * len(first), heat)],
                            out / "query.png")
    checkpoint.write_json(out / "query.json", {"query": config.query, "first": [paths[g] for g in first]})
    print(f"Wrote {out / 'query.png'} and {out / 'query.json'}.")


if __name__ == "__main__":
    run(main)
