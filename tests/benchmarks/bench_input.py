"""What feeding the models costs: start-up at 1.2 million records, memory of the loading processes, images a second.

    python -m tests.benchmarks.bench_input                              1.2 million records; 1 GB of disk, some minutes
    python -m tests.benchmarks.bench_input --records 20000 --workers 4
    python -m tests.benchmarks.bench_input --feed 900                   workers for a GPU that trains on 900 images/s

A set in SDA's format is written to a temporary folder: parts of 5,000 records with 2 to 4 boxes and phrases, a file
for each image (hard links to a few JPEG files of 384x256, 24 KB each). Then, each in a fresh process: what train.py
reads before its first step (train and val, `PairDataset`), in seconds and GiB at most; what each of several
loading processes holds of its own (not shared) after it has looked at every record; and the samples a second of CPU
that one of them makes at `base`, for pretraining (224x224 in the paper, 384x256 here) and for fine-tuning with an
augmented caption. A GPU that trains on R images/s needs R / that rate workers; half as many more for a slow disk.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mra.config import PRESETS, TrainConfig, recipe
from mra.data.batches import PairDataset
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.formats.read import load
from mra.town.drawing import Pose, render
from mra.town.people import describe, sample_person

PART, PICTURES = 5000, 40       # records of a file; an ext4 file takes 65,000 links


def write_set(folder: Path, count: int) -> None:
    """An SDA-shaped set of `count` records."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    pictures, kinds = folder / "pictures", []
    pictures.mkdir(parents=True)
    for i in range(PICTURES):
        person, pose = sample_person(rng), Pose(rng.uniform(0, 360), 0.0)
        image, boxes = render(person, pose, "source", 0, i)
        pixels = np.asarray(image.resize((256, 384))) + noise.normal(0, 6, (384, 256, 3))      # as of a camera
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(pictures / f"{i}.jpg", quality=90)
        kinds.append(describe(person, pose.view, boxes, rng))
    for start in range(0, count, PART):
        home, items = folder / "SDA" / f"c_{start}_{start + PART}", []
        home.mkdir(parents=True)
        for i in range(start, min(start + PART, count)):
            os.link(pictures / f"{i % PICTURES}.jpg", home / f"{i}_0.jpg")
            words, some = kinds[i % PICTURES], rng.randint(2, 4)
            items.append({"image": f"{home.name}/{i}_0.jpg", "boxes": [[round(x, 4) for x in box]
                                                                       for box in words.boxes[:some]],
                          "logits": [0.5] * some, "phrases": words.phrases[:some], "caption": words.caption,
                          "image_id": i})
        (folder / "SDA" / f"sda_{start}_{start + PART}.json").write_text(json.dumps(items))


def start_up(root: Path) -> tuple[PairDataset, RecordSet]:
    """What train.py reads."""
    train, val = (load("sda", split, root) for split in ("train", "val"))
    config = TrainConfig(**recipe("sda", "base") | {"dataset": "sda"})
    return PairDataset(train, Tokenizer.read(), PRESETS["base"], config), val


def own_memory(dataset: PairDataset, pipe) -> None:
    """In a forked process: GiB of its own after it has read every record."""
    for index in range(len(dataset)):
        dataset.source.records[index]
    pipe.send(memory(os.getpid(), "Private"))


def memory(pid: int, kind: str) -> float:
    """GiB of a process that are `Private`, or with its share of what it shares `Pss:`; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**20


def together() -> float:
    """GiB of this process and its children, what they share counted once."""
    children = [child.pid for child in multiprocessing.active_children()]
    return sum(memory(pid, "Pss:") for pid in [os.getpid(), *children])


def cpu() -> float:
    """Seconds of CPU of this process and of its children that have ended."""
    return sum(used.ru_utime + used.ru_stime
               for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def measure_start(root: Path, workers: int) -> None:
    seen, over = [together()], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            seen.append(together())
    watcher = threading.Thread(target=watch)
    watcher.start()
    started, used = time.perf_counter(), cpu()
    dataset, _ = start_up(root)
    took, used = time.perf_counter() - started, cpu() - used
    over.set()
    watcher.join()
    print(f"{len(dataset):,} pairs ready after {took:.1f} s ({os.cpu_count()} cores; {used:.1f} s of CPU); at most "
          f"{max(seen):.2f} GiB, all processes together, then {together():.2f}, of which {seen[0]:.2f} are libraries")
    pipes = []
    for _ in range(workers):
        here, there = multiprocessing.Pipe()
        multiprocessing.get_context("fork").Process(target=own_memory, args=(dataset, there)).start()
        pipes.append(here)
    print(f"{workers} loading processes hold " + ", ".join(f"{pipe.recv():.2f}" for pipe in pipes)
          + " GiB of their own after every record")


def measure_rate(root: Path, feed: float) -> None:
    boxed = load("sda", "val", root, say=lambda line: None).records
    plain = [dataclasses.replace(record, boxes=(), phrases=()) for record in boxed]
    for name, kind, records, changes in (("pretraining", "sda", boxed, {}),
                                         ("fine-tuning", "cuhk", plain, {"eda": 0.8, "erase": 0.6})):
        dataset = PairDataset(RecordSet(kind, "train", records), Tokenizer.read(), PRESETS["base"],
                              TrainConfig(**changes))
        dataset[0, 0]
        started, count = time.process_time(), 0
        while time.process_time() - started < 10:
            dataset[0, count % len(dataset)]
            count += 1
        rate = count / (time.process_time() - started)
        print(f"{name}, 384x256: {rate:.0f} samples a second of CPU; {feed:g} images/s take {feed / rate:.1f} workers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_200_000)
    parser.add_argument("--workers", type=int, default=2, help="loading processes whose memory is measured")
    parser.add_argument("--feed", type=float, default=208, help="images/s of the GPU; 208: twice the published step's")
    parser.add_argument("--folder", type=Path, help="keep the set here, and use it if it is there already")
    parser.add_argument("--inner", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        return (measure_start(Path(given.inner[1]), given.workers) if given.inner[0] == "start"
                else measure_rate(Path(given.inner[1]), given.feed))
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        if not (folder / "SDA").exists():
            started = time.perf_counter()
            write_set(folder, given.records)
            print(f"{given.records:,} records written in {time.perf_counter() - started:.0f} s", flush=True)
        for what in ("start", "rate"):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_input", *sys.argv[1:], "--inner", what,
                            str(folder)], check=True)


if __name__ == "__main__":
    main()
