"""Evaluate a retriever on test splits, or search a gallery for sentences and pictures.

    python evaluate.py                                        the newest checkpoint, on its own dataset's test split
    python evaluate.py --dataset icfg cuhk rstp               on other datasets, too
    python evaluate.py --query "a woman in a red coat" --gallery DIR     rank any folder of photographs
    python evaluate.py --gallery DIR --serve                  a page to search it from, at http://127.0.0.1:8000/

Every field of mra.config.EvalConfig is a flag. Metrics go to results.json, pictures to ranking.png; an unusual flag or
checkpoint adds to these names. Queries give query.json, query.png and the embeddings of the gallery, to search again.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

from mra import ranking
from mra.config import EvalConfig, UserError
from mra.data.files import open_image, printable, write_json
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.formats import read
from mra.formats.read import DATASETS
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.command import parse, run
from mra.run.machine import Machine
from mra.show import gallery, page, pictures
from mra.town import sets
from mra.weights.files import folder_of
from mra.weights.retrievers import load_retriever


def main() -> None:
    given = parse(EvalConfig, __doc__)
    check(given)
    machine = Machine.of(given.device, given.precision)
    if not given.precision:
        machine = machine.for_evaluation()
    path = Path(given.checkpoint) if given.checkpoint else checkpoint.newest(machine.say)
    model, tokenizer, facts = load_retriever(path, machine.device, given.vocab)
    facts["shipped"] = path.resolve().parent == checkpoint.SHIPPED
    trained = facts["train"]
    machine.say(printable(f"{path}: trained on {trained['dataset'] or 'an unnamed set'}, pretrained on "
                         f"{facts['pretrained_on']}, seed {trained.get('seed')}; evaluating on {machine.device}."))
    if not facts.get("mirror", True):
        machine.say("A CLIP or IRRA checkpoint: images are ranked by embeddings alone, without mirror images.")
    config = settled(given, path, model, facts, machine)
    settings = ranking.Settings(config.k, config.mirror, config.batch, config.workers, machine.group)
    folder = Path(config.out or ("out/shipped" if facts["shipped"] else folder_of(path)))
    folder.mkdir(parents=True, exist_ok=True)
    if config.query or config.queries or config.query_image or config.serve >= 0:
        return answer(config, machine, settings, model, tokenizer, facts, folder)
    results, rows = measure(config, machine, settings, model, tokenizer, facts)
    if machine.group.rank == 0:
        ending = ending_of(given, path, facts)
        file, picture = folder / f"results{ending}.json", folder / f"ranking{ending}.png"
        write_json(file, {"results": results, "evaluation": asdict(config), "checkpoint": str(path),
                          "versions": checkpoint.VERSIONS, "pretrained_on": facts["pretrained_on"], "train": trained})
        pictures.table(rows, picture)
        print(f"Wrote {file} and {picture}.")


def settled(given: EvalConfig, path: Path, model: Retriever, facts: dict, machine: Machine) -> EvalConfig:
    """The flags, with values for those that are left to the checkpoint. Raises UserError for flags that do not fit."""
    trained_on, fused = facts["train"]["dataset"], "weight" in facts["val"]
    if not (given.dataset or given.gallery or trained_on):
        raise UserError(f"{path} does not say what it was trained on; give --dataset.")
    reranks = fused and given.k != 0 and not given.query_image
    if not reranks and (given.k > 0 or given.weight >= 0):
        raise UserError("--k and --weight are for re-ranking, but nothing is re-ranked with --k 0, for a picture, or "
                        "by a checkpoint whose fusion encoder is not trained: leave them out.")
    k, weight = given.k, given.weight
    if k < 0:
        k = model.config.rerank if fused else 0
    if weight < 0:
        weight = facts["val"]["weight"] if reranks else 0.0
    usual = "icfg" if facts["shipped"] else trained_on      # the demo's target is drawn sooner than the source
    mirror = given.mirror and facts.get("mirror", True)
    return replace(given, dataset=given.dataset or (usual,), k=k, weight=weight, mirror=mirror,
                   device=machine.device.type, precision=machine.precision)


def ending_of(given: EvalConfig, path: Path, facts: dict) -> str:
    """The end of the results' names: which checkpoint of its folder it is, and the flags that differ from defaults."""
    ending = f"-{path.stem}" if path.is_file() and path.name != "best.safetensors" and not facts["shipped"] else ""
    if given.dataset != (facts["train"]["dataset"],):
        ending += "".join(f"-{Path(name).resolve().name}" for name in given.dataset)
    for name in ("split", "k", "mirror", "weight", "allow_missing"):
        if getattr(given, name) != getattr(EvalConfig(), name):
            ending += f"-{name}-{getattr(given, name)}"
    return ending


def check(config: EvalConfig) -> None:
    """Raise UserError for flags that exclude each other, or unknown datasets."""
    asked = config.query or config.queries or config.query_image
    if asked and config.serve >= 0:
        raise UserError("--serve gets its queries from the page: leave out --query, --queries and --query-image.")
    if (asked or config.serve >= 0) and len(config.dataset) > 1:
        raise UserError("A search, by a query or --serve, has one gallery: give one --dataset.")
    for dataset in config.dataset:
        if dataset not in DATASETS and not (dataset and Path(dataset).is_dir()):
            raise UserError(f"--dataset {dataset}: choose from {', '.join(DATASETS)}, or give a set's folder.")
    for flag, given in (("--gallery", config.gallery), ("--threshold", config.threshold > -1)):
        if given and not asked and config.serve < 0:
            raise UserError(f"{flag} is for a search: give --query, --queries, --query-image or --serve, too.")


def load(config: EvalConfig, facts: dict, dataset: str, machine: Machine) -> RecordSet:
    """The split to evaluate on."""
    if dataset in DATASETS and not config.data_root and facts["train"]["data_root"]:
        raise UserError(f"This checkpoint was trained on {facts['train']['data_root']}; say which --data-root to use.")
    root = Path(config.data_root or sets.ready(dataset, facts["train"]["preset"] == "tiny"))
    return read.load(dataset, config.split, root, config.allow_missing, machine.say)


def measure(config: EvalConfig, machine: Machine, settings: ranking.Settings, model: Retriever, tokenizer: Tokenizer,
            facts: dict) -> tuple[dict, list[pictures.Row]]:
    """Print and return the metrics on every dataset, and rows of a picture: queries with their first images."""
    results, rows = {}, []
    record_sets = [load(config, facts, dataset, machine) for dataset in config.dataset]     # all are read first
    machine.say(f"{'':24}" + "".join(f"{name:>8}" for name in ranking.METRICS))
    for dataset, record_set in zip(config.dataset, record_sets):
        started = time.perf_counter()
        captions, query_ids, paths, gallery_ids = ranking.queries_of(record_set, tokenizer)
        people = set(gallery_ids.tolist())
        lost = sum(identity not in people for identity in query_ids.tolist())
        if lost:
            machine.say(f"{lost} of {len(captions)} queries are of people without an image, and are not counted.")
        with machine.autocast():        # similarities and scores stay in float32
            found = ranking.search(model, tokenizer, captions, paths, settings)
        last = found.reranked(config.weight)
        metrics = {"embeddings": found.metrics(query_ids, gallery_ids, found.candidates)}
        if config.k:
            metrics["re-ranked"] = found.metrics(query_ids, gallery_ids, last)
        for kind, values in metrics.items():
            machine.say(f"{record_set.name + ' ' + kind:24}" + "".join(f"{value:8.2f}" for value in values.values()))
        results[dataset] = metrics | {"queries": len(captions), "not_counted": lost, "gallery": len(paths),
                                      "identities": len(people), "seconds": round(time.perf_counter() - started, 1)}
        rows += pictures.examples(model, tokenizer, captions, paths, last, gallery_ids[last] == query_ids[:, None])
    return results, rows


def answer(config: EvalConfig, machine: Machine, settings: ranking.Settings, model: Retriever, tokenizer: Tokenizer,
           facts: dict, folder: Path) -> None:
    """Rank a folder of photographs, or the images of the split, for every query or for those of the page."""
    if machine.group.count > 1:
        raise UserError("Queries are answered by one process: start it without torchrun.")
    dataset, = config.dataset
    server = page.Server(config.serve) if config.serve >= 0 else None      # it claims its port before the encoding
    image = open_image(config.query_image) if config.query_image else None
    if not dataset and facts.get("mirror", True):       # CLIP cleans in its own way
        machine.say("The checkpoint names no training set, so sentences are used as typed; if it was ICFG-PEDES or "
                    "RSTPReid, give --dataset icfg or rstp.")
    sentences = gallery.sentences_of(config, dataset, tokenizer, model.config.max_tokens)
    with machine.autocast():
        if config.gallery:
            paths = gallery.photographs(Path(config.gallery))
        else:
            paths = [record.path for record in load(config, facts, dataset, machine).records if record.path]
        name = config.gallery or dataset
        cache = folder / ("gallery.safetensors" if config.gallery else "images.safetensors")
        paths, features, left_out = gallery.encode(name, paths, model, cache, settings)
        searched = gallery.Gallery(model, tokenizer, dataset, paths, features, settings, config.weight)
        if server:
            return server.serve(searched, name, config.threshold, machine.autocast)
        answers = gallery.answer(config, searched, sentences, image, folder / "query.png")
    write_json(folder / "query.json", {
        "gallery": name, "images": len(paths), "left_out": left_out, "meaning": gallery.MEANING,
        "query_image": config.query_image, "threshold": config.threshold, "answers": answers})
    print(f"Wrote {folder / 'query.json'} and {folder / 'query.png'}.")


if __name__ == "__main__":
    run(main)
