"""Evaluate a retriever on test splits, or ask it for a person in words.

    python evaluate.py                                        the newest checkpoint, on its own dataset's test split
    python evaluate.py --dataset icfg cuhk rstp               cross-domain rows
    python evaluate.py --checkpoint out/icfg-demo-s0/best.safetensors --k 64
    python evaluate.py --query "a woman in a red coat" --gallery DIR     rank any folder of photographs
    python evaluate.py --queries FILE --gallery DIR           for every line of a text file
    python evaluate.py --checkpoint ft_cuhk.pth --dataset cuhk --data-root DIR     a released checkpoint
    torchrun --nproc_per_node=2 evaluate.py ...               the images shared out

`--fusion published` gives the released code's score on one process, with `--weight 0.008` about that on four. The clean
score of a released checkpoint, which knows no val, is the matching logit alone unless --weight is given.
Every field of EvalConfig is a flag. Prints the metrics of both stages and writes results.json and ranking.png; for
sentences query.json, query.png and, with --gallery, gallery.safetensors: its embeddings, for the next time.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mra import checkpoint, figures, gallery, ranking, released
from mra.config import UserError, check_values, harmless, parse, run
from mra.data import records
from mra.data.words import clean, noun_phrases
from mra.training import Machine, choose_device, choose_precision, make_folder, queries_of

PICTURED = 20    # sentences shown in query.png


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and how."""

    checkpoint: str = ""              # ours, or a released one (.pth); empty: the newest out/*/best.safetensors
    vocab: str = ""                   # BERT's vocab.txt for a released checkpoint; empty: the one beside it
    dataset: tuple[str, ...] = ()     # empty: the one that the checkpoint was trained on
    split: str = "test"               # train, val or test
    data_root: str = ""               # folder of the real sets; empty: the demo town
    k: int = -1                       # candidates that the fusion encoder re-scores; -1: the preset's; 0: none
    mirror: bool = True               # average over the mirror image
    fusion: str = "clean"             # clean: a pair's score depends on that pair; published: as the released code
    weight: float = -1.0              # of the similarity; -1: clean, chosen on val; published, 0.002
    query: str = ""                   # a sentence: rank a gallery for it instead
    queries: str = ""                 # a text file with a sentence in each line, besides --query
    gallery: str = ""                 # a folder of photographs for these sentences; empty: the test images
    out: str = ""                     # folder of results.json and ranking.png; empty: the checkpoint's
    batch: int = 64                   # images encoded at a time
    workers: int = 0                  # image decoding processes
    allow_missing: bool = False       # drop records whose image is missing
    device: str = ""                  # cuda or cpu; empty: cuda where there is one
    precision: str = ""               # of the encoders, float32 or bf16; empty: bf16 on a GPU


def main() -> None:
    """The metrics of every dataset, or the answers to the sentences asked."""
    config = parse(EvalConfig, __doc__)
    check(config)
    device = choose_device(config.device)
    usual = choose_precision("", device) if device.type == "cuda" else "float32"
    machine = Machine.of(config.device, config.precision or usual)
    path, say = Path(config.checkpoint) if config.checkpoint else newest(), machine.say
    model, tokenizer, facts = released.load_retriever(path, machine.device, config.vocab)
    datasets = config.dataset or (facts["train"]["dataset"],)
    if not (config.dataset or config.gallery or datasets[0] in records.DATASETS
            or datasets[0] and Path(datasets[0]).resolve().is_relative_to(Path.cwd())):    # a file leads nowhere else
        raise UserError(f"{path} does not say what it was trained on, or names a folder elsewhere; give --dataset.")
    say(harmless(f"{path}: trained on {facts['train']['dataset'] or 'an unnamed set'}, pretrained on "
                 f"{facts['pretrained_on']}, seed {facts['train'].get('seed')}; evaluating on {machine.device}."))
    out = Path(config.out) if config.out else path.parent
    make_folder(out)
    if config.query or config.queries:
        if machine.world > 1:
            raise UserError("--query and --queries are answered by one process: start it without torchrun.")
        return answer(config, model, tokenizer, facts, datasets[0], out, machine)

    rows, results = [], {}
    say(f"{'':24}" + "".join(f"{name:>8}" for name in ranking.METRICS))
    for dataset in datasets:
        started = time.perf_counter()
        source = load(config, facts, dataset, machine)
        captions, query_ids, paths, gallery_ids = queries_of(source)
        found, stages = rank(config, machine, model, tokenizer, facts, captions, paths)
        metrics = dict(zip(stages, found.metrics(query_ids, gallery_ids, *stages.values())))
        for stage, values in metrics.items():
            say(f"{source.name + ' ' + stage:24}" + "".join(f"{values[name]:8.2f}" for name in ranking.METRICS))
        results[dataset] = metrics | {"queries": len(captions), "gallery": len(paths),
                                      "identities": len(set(gallery_ids.tolist())),
                                      "seconds": round(time.perf_counter() - started, 1)}
        rows += picture_rows(model, tokenizer, captions, query_ids, paths, gallery_ids, list(stages.values())[-1])
    if machine.rank > 0:
        return
    checkpoint.write_json(out / "results.json", {
        "results": results, "evaluation": asdict(config), "checkpoint": str(path), "versions": checkpoint.VERSIONS,
        "pretrained_on": facts["pretrained_on"], "train": facts["train"], "weight": weight_of(config, facts)})
    figures.table(rows, out / "ranking.png")
    print(f"Wrote {out / 'results.json'} and {out / 'ranking.png'}.")


def check(config: EvalConfig) -> None:
    """Raise UserError for values that no run can use."""
    check_values(config, fusion=("clean", "published"), split=records.SPLITS)
    if -1 < config.weight < 0:
        raise UserError(f"--weight {config.weight}: give 0 or more, or leave it out.")
    asked = config.query or config.queries
    if asked and len(config.dataset) > 1:
        raise UserError("--query and --queries rank one gallery: give one --dataset.")
    for dataset in config.dataset:
        if dataset not in records.DATASETS and not Path(dataset).is_dir():
            raise UserError(f"--dataset {dataset}: choose from {', '.join(records.DATASETS)}, or give a set's folder.")
    if config.gallery and not asked:
        raise UserError("--gallery needs --query or --queries: the sentences to rank its images for.")


def newest() -> Path:
    """The last written checkpoint under out/."""
    found = sorted(Path("out").glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("There is no checkpoint under out/ yet; `python train.py --dataset icfg` makes one.")
    return found[-1]


def load(config: EvalConfig, facts: dict, dataset: str, machine: Machine) -> records.RecordSet:
    """The split to evaluate on, of the folder given or of the demo town, drawn where it is missing."""
    if dataset in records.DATASETS and not config.data_root and facts["train"]["data_root"]:
        raise UserError(f"This checkpoint was trained on {facts['train']['data_root']}; say which --data-root to use.")
    root = machine.root(config.data_root, dataset, facts["train"]["preset"] == "tiny")
    return records.load(dataset, config.split, root, config.allow_missing, machine.say)


def weight_of(config: EvalConfig, facts: dict) -> float:
    """The weight of the similarity beside the matching score."""
    if config.weight >= 0:
        return config.weight
    return 0.002 if config.fusion == "published" else facts["val"].get("weight", 0.0)


def rank(config: EvalConfig, machine: Machine, model, tokenizer, facts: dict, captions: list[str],
         paths: list[str], features: torch.Tensor | None = None) -> tuple[ranking.Search, dict[str, torch.Tensor]]:
    """What is found for every caption, and the order (Q, K) of each stage; there is one where k is 0.

    `features` (G, 2, E) of the gallery, where they are known.
    """
    k = model.config.rerank if config.k < 0 else config.k
    if "weight" not in facts["val"]:
        if config.k > 0:
            raise UserError(f"--k {k}: this checkpoint's fusion encoder is not trained yet; leave the flag out.")
        k = 0
    published = config.fusion == "published"
    with machine.autocast():        # encoders alone: what is ordered stays in float32
        found = ranking.search(model, tokenizer, captions, paths, k, config.mirror, config.batch, config.workers,
                               not published, features)
    return found, {"embeddings": found.candidates} | (
        {"re-ranked": found.reranked(weight_of(config, facts), published)} if k else {})


def picture_rows(model, tokenizer, captions, query_ids, paths, gallery_ids, order, count: int = 6) -> list[tuple]:
    """Evenly spaced queries with their first ten photographs, framed green where right, else red.

    The first half has heat maps of two phrases, too.
    """
    rows = []
    for number, q in enumerate(torch.linspace(0, len(captions) - 1, min(count, len(captions))).long().tolist()):
        first = order[q, :10].tolist()
        heat = heat_maps(model, tokenizer, captions[q], paths[first[0]]) if number < count // 2 else []
        right = (gallery_ids[first] == query_ids[q]).tolist()
        rows.append((captions[q], [(figures.photograph(paths[g]), figures.GREEN if well else figures.RED, "")
                                   for g, well in zip(first, right)] + heat))
    return rows


def heat_maps(model, tokenizer, sentence: str, path: str) -> list[figures.Cell]:
    """The last two phrases of a sentence, each with its heat map on a photograph."""
    return [(figures.heat_map(model, tokenizer, path, phrase), figures.GREY, phrase)
            for phrase in noun_phrases(sentence)[-2:]]


def sentences(config: EvalConfig, dataset: str) -> list[str]:
    """What is asked: --query, then the lines of the file --queries that are not blank. Raises UserError."""
    asked = [("--query", config.query)] if config.query else []
    if config.queries:
        try:
            lines = Path(config.queries).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--queries {config.queries}: no readable UTF-8 text ({error}).") from error
        asked += [(f"{config.queries}, line {number}:", line.strip()) for number, line in enumerate(lines, 1)
                  if line.strip()]
    for place, sentence in asked or [(f"--queries {config.queries}:", "")]:
        if not any(map(str.isalnum, clean(sentence, dataset))):
            raise UserError(f"{place} {records.shown(sentence)}: there is no word in it that the model could know.")
    return [sentence for _, sentence in asked]


def answer(config: EvalConfig, model, tokenizer, facts: dict, dataset: str, out: Path, machine: Machine) -> None:
    """Rank a folder of photographs, or the test images, for every sentence asked."""
    asked = sentences(config, dataset)
    if config.gallery:
        with machine.autocast():
            paths, features, left_out = gallery.encode(Path(config.gallery), model, out / "gallery.safetensors",
                                                       config.batch, config.workers)
    else:
        paths, features, left_out = [one.path for one in load(config, facts, dataset, machine).records], None, []
    found, stages = rank(config, machine, model, tokenizer, facts, [clean(sentence, dataset) for sentence in asked],
                         paths, features)
    order, answers, rows = list(stages.values())[-1], [], []
    for q, sentence in enumerate(asked):
        print(f"{records.shown(sentence)}:")
        first = []
        for g in order[q, :ranking.FIRST].tolist():
            place = found.candidates[q].tolist().index(g)
            hit = {"path": paths[g], "similarity": found.similarity[q, place].item()}
            if place < found.logits.shape[1]:       # it was re-scored
                hit["match"] = found.logits[q, place].item()
            first.append(hit)
            match = f"match {hit['match']:6.2f}  " if "match" in hit else ""
            print(f"{len(first):3}  similarity {hit['similarity']:.3f}  {match}{records.shown(Path(paths[g]))}")
        answers.append({"query": sentence, "first": first})
        if q < PICTURED:
            rows.append((sentence, [(figures.photograph(hit["path"]), figures.GREY, "") for hit in first]
                         + heat_maps(model, tokenizer, sentence, first[0]["path"])))
    figures.table(rows, out / "query.png")
    checkpoint.write_json(out / "query.json", {"gallery": config.gallery or dataset, "images": len(paths),
                                               "left_out": left_out, "answers": answers})
    print(f"Wrote {out / 'query.json'} and {out / 'query.png'}.")


if __name__ == "__main__":
    run(main)
