"""Evaluate a retriever on test splits, or ask it for a person in words.

    python evaluate.py                                        the newest checkpoint, on its own dataset's test split
    python evaluate.py --dataset icfg cuhk rstp               cross-domain rows
    python evaluate.py --checkpoint out/icfg-demo-s0/best.safetensors --k 64
    python evaluate.py --query "a woman in a red coat" --gallery DIR     rank any folder of photographs
    python evaluate.py --queries FILE --gallery DIR           for every line of a text file
    python evaluate.py --checkpoint ft_cuhk.pth --dataset cuhk --data-root DIR     a released checkpoint
    torchrun --nproc_per_node=2 evaluate.py ...               the images shared out

Every field of mra.config.EvalConfig is a flag. Prints the metrics of both stages and writes results.json and
ranking.png, whose names also say what differs from the usual question, as in results-cuhk-split-val.json. For sentences
it writes query.json and query.png and, with --gallery, the gallery's embeddings for the next time.
mra/weights/README.md explains --fusion, and --weight for a released checkpoint.
"""

import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from mra import ranking
from mra.config import EvalConfig, UserError
from mra.data.files import harmless, write_json
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.data.words import clean
from mra.formats import read
from mra.formats.layouts import DATASETS
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.command import parse, run
from mra.run.machine import Machine, choose_device, drawn
from mra.scale.search import sharded_top_k
from mra.show import gallery, pictures
from mra.weights.retrievers import load_retriever


def main() -> None:
    """The metrics of every dataset, or the answers to the sentences asked."""
    config = parse(EvalConfig, __doc__)
    check(config)
    usual = "" if choose_device(config.device).type == "cuda" else "float32"       # bf16 on a GPU alone
    machine = Machine.of(config.device, config.precision or usual)
    path = Path(config.checkpoint) if config.checkpoint else checkpoint.newest(machine.say)
    model, tokenizer, facts = load_retriever(path, machine.device, config.vocab)
    trained_on = facts["train"]["dataset"]
    # a folder that a file names is read only if it lies below this one
    inside = bool(trained_on) and Path(trained_on).resolve().is_relative_to(Path.cwd())
    if not (config.dataset or config.gallery or trained_on in DATASETS or inside):
        raise UserError(f"{path} does not say what it was trained on, or names a folder elsewhere; give --dataset.")
    machine.say(harmless(f"{path}: trained on {trained_on or 'an unnamed set'}, pretrained on "
                         f"{facts['pretrained_on']}, seed {facts['train'].get('seed')}; evaluating on "
                         f"{machine.device}."))
    datasets = config.dataset or (trained_on,)
    out = Path(config.out) if config.out else path.parent
    out.mkdir(parents=True, exist_ok=True)
    if config.query or config.queries:
        answer(config, machine, model, tokenizer, facts, datasets[0], out)
        return

    plan = plan_of(config, model, facts, machine)
    rows, results = [], {}
    for dataset in datasets:
        started = time.perf_counter()
        source = load(config, facts, dataset, machine)
        if not results:
            machine.say(f"{'':24}" + "".join(f"{name:>8}" for name in ranking.METRICS))
        captions, query_ids, paths, gallery_ids = ranking.queries_of(source)
        with machine.autocast():        # of the encoders: similarities and scores stay in float32
            found = ranking.search(model, tokenizer, captions, paths, plan)
        orders = orders_of(found, config, facts)
        metrics = dict(zip(orders, found.metrics(query_ids, gallery_ids, *orders.values())))
        for stage, values in metrics.items():
            machine.say(f"{source.name + ' ' + stage:24}" + "".join(f"{value:8.2f}" for value in values.values()))
        results[dataset] = metrics | {"queries": len(captions), "gallery": len(paths),
                                      "identities": len(set(gallery_ids.tolist())),
                                      "seconds": round(time.perf_counter() - started, 1)}
        last = list(orders.values())[-1]
        rows += pictures.examples(model, tokenizer, captions, paths, last, gallery_ids[last] == query_ids[:, None])
    if machine.rank == 0:
        ending = ending_of(config, trained_on)
        written, picture = out / f"results{ending}.json", out / f"ranking{ending}.png"
        write_json(written, {
            "results": results, "evaluation": asdict(config), "checkpoint": str(path), "versions": checkpoint.VERSIONS,
            "pretrained_on": facts["pretrained_on"], "train": facts["train"], "weight": weight_of(config, facts)})
        pictures.table(rows, picture)
        print(f"Wrote {written} and {picture}.")


def answer(config: EvalConfig, machine: Machine, model: Retriever, tokenizer: Tokenizer, facts: dict, dataset: str,
           out: Path) -> None:
    """Rank a folder of photographs, or the test images, for every sentence asked."""
    if machine.world > 1:
        raise UserError("--query and --queries are answered by one process: start it without torchrun.")
    if not dataset:
        machine.say("This checkpoint names no set, so sentences are not cleaned. If it was trained on ICFG-PEDES or "
                    "RSTPReid, give that as --dataset.")
    asked = gallery.sentences(config, dataset, tokenizer)
    cleaned = [clean(sentence, dataset) for sentence in asked]
    plan = plan_of(config, model, facts, machine)
    features, left_out = None, []
    with machine.autocast():
        if config.gallery:
            paths, features, left_out = gallery.encode(Path(config.gallery), model, out / "gallery.safetensors", plan)
        else:
            paths = [record.path for record in load(config, facts, dataset, machine).records]
        found = ranking.search(model, tokenizer, cleaned, paths, plan, features)
    last = list(orders_of(found, config, facts).values())[-1]
    answers = gallery.answer(model, tokenizer, asked, paths, found, last, out / "query.png")
    write_json(out / "query.json", {"gallery": config.gallery or dataset, "images": len(paths), "left_out": left_out,
                                    "answers": answers})
    print(f"Wrote {out / 'query.json'} and {out / 'query.png'}.")


def plan_of(config: EvalConfig, model: Retriever, facts: dict, machine: Machine) -> ranking.Plan:
    """How to search. Raises UserError where the checkpoint cannot re-rank."""
    k = model.config.rerank if config.k < 0 else config.k
    if "weight" not in facts["val"]:
        if config.k > 0 or config.fusion == "published":
            raise UserError("--k and --fusion published: this checkpoint's fusion encoder is not trained yet; leave "
                            "the flag out.")
        k = 0
    return ranking.Plan(k, config.mirror, config.fusion == "clean", config.batch, config.workers, machine.workers,
                        sharded_top_k)


def ending_of(config: EvalConfig, trained_on: str) -> str:
    """Ends the names of the results: what differs from the usual question, so that no answer replaces another's."""
    parts = [Path(name).resolve().name for name in config.dataset if config.dataset != (trained_on,)]
    for name in ("split", "k", "mirror", "fusion", "weight"):
        value = getattr(config, name)
        if value != getattr(EvalConfig(), name):
            parts.append(f"{name}-{value}")
    return "".join(f"-{part}" for part in parts)


def orders_of(found: ranking.Found, config: EvalConfig, facts: dict) -> dict[str, Tensor]:
    """The order (Q, K) of each stage; there is one where nothing was re-scored."""
    orders = {"embeddings": found.candidates}
    if found.match.shape[1]:
        orders["re-ranked"] = found.reranked(weight_of(config, facts), config.fusion == "published")
    return orders


def weight_of(config: EvalConfig, facts: dict) -> float:
    """The weight of the similarity beside the matching score."""
    if config.weight >= 0:
        return config.weight
    return 0.002 if config.fusion == "published" else facts["val"].get("weight", 0.0)


def load(config: EvalConfig, facts: dict, dataset: str, machine: Machine) -> RecordSet:
    """The split to evaluate on, of the folder given or of the demo town, drawn where it is missing."""
    if dataset in DATASETS and not config.data_root and facts["train"]["data_root"]:
        raise UserError(f"This checkpoint was trained on {facts['train']['data_root']}; say which --data-root to use.")
    tiny = facts["train"]["preset"] == "tiny"
    root = Path(config.data_root) if config.data_root else drawn(dataset, tiny, machine)
    return read.load(dataset, config.split, root, config.allow_missing, machine.say)


def check(config: EvalConfig) -> None:
    """Raise UserError for values that no run can use."""
    if -1 < config.weight < 0:
        raise UserError(f"--weight {config.weight}: give 0 or more, or leave it out.")
    asked = config.query or config.queries
    if asked and len(config.dataset) > 1:
        raise UserError("--query and --queries rank one gallery: give one --dataset.")
    for dataset in config.dataset:
        if dataset not in DATASETS and not Path(dataset).is_dir():
            raise UserError(f"--dataset {dataset}: choose from {', '.join(DATASETS)}, or give a set's folder.")
    if config.gallery and not asked:
        raise UserError("--gallery needs --query or --queries: the sentences to rank its images for.")


if __name__ == "__main__":
    run(main)
