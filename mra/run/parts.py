"""An adapted set on disk: its parts, made one by one by processes and threads, and the finished set with its report.

A part is PART images, which are made and written together: parts/000000.json has the records of imgs/000000. Beside
the parts lies their key, parts.key.json. The thresholds of the filters are not in it: they decide what the finished set
keeps, and can be changed without making the images again. diffusion/plan.py says what is to be made.
"""

import random
import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra.config import DIFFUSION_PRESETS, AdaptConfig, UserError
from mra.data.files import read_json, save_image, write_json
from mra.data.records import Record
from mra.diffusion.base import decode, read_images
from mra.diffusion.filters import Judge, margins, scores_of
from mra.diffusion.plan import record_of
from mra.diffusion.sampling import Painter
from mra.run import checkpoint
from mra.run.machine import Machine
from mra.show import pictures

PART = 64
FILE = 5000            # records of an annotation file
PICTURED = 10          # images in a row of a picture


def begin(out: Path, key: dict, resume: bool, machine: Machine) -> None:
    """Make `out` a folder for parts of this key. Others are removed; with `resume` they raise UserError."""
    parts, advice = out / "parts", "give another --out, or --no-resume to make it anew"
    foreign = any(out.glob("*.json")) or (out / "imgs").exists() or parts.exists()
    if foreign and not checkpoint.key_file(parts).exists():
        raise UserError(f"--out {out} holds files that adapt.py did not make; give another folder.")
    if checkpoint.is_kept(parts, key, machine.say, advice if resume else ""):
        return
    remove_annotation(out)
    for folder in (parts, out / "imgs"):
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint.remember(parts, key)
    parts.mkdir()


def remove_annotation(out: Path) -> None:
    """Remove the report, without which a set is not finished, and the annotation files."""
    for file in (out / "report.json", *out.glob("sda_*.json")):
        file.unlink(missing_ok=True)


def is_finished(out: Path, key: dict) -> bool:
    """Whether `out` holds the whole set of this key, which includes the thresholds."""
    report = out / "report.json"
    return report.exists() and not checkpoint.changes(read_json(report).get("key", {}), key)


def make_parts(painter: Painter, judge: Judge, drafts: list[Record], out: Path, machine: Machine) -> None:
    """Make the parts of the drafts that are not on disk; processes and threads share them out."""
    parts = [drafts[start:start + PART] for start in range(0, len(drafts), PART)]
    files = [out / "parts" / f"{number:06d}.json" for number in range(len(parts))]
    own = range(machine.group.rank, len(parts), machine.group.count)
    missing = [number for number in own if not files[number].exists()]
    machine.say(f"Making {len(drafts)} images in {out}.")

    started, done = time.perf_counter(), []

    def make_part(number: int) -> None:
        generator = machine.generator(painter.config.seed, number)
        with machine.autocast():
            latents = painter.sample(parts[number], generator)                           # (B, C, h, w)
            images = decode(painter.base.autoencoder, latents, generator)                # (B, 3, H, W) uint8
        write_part(files[number], parts[number], images, scores_of(images, judge))
        done.append(number)
        seconds = (time.perf_counter() - started) / len(done)
        machine.say(f"{len(done)} of {len(missing)} parts made in this process  {PART / seconds:.1f} images/s  "
                    f"{seconds * (len(missing) - len(done)) / 60:.1f} min left")

    machine.map(make_part, missing)
    machine.barrier()


def write_part(file: Path, drafts: list[Record], images: Tensor, scores: dict[str, Tensor]) -> None:
    """Write the uint8 images (B, 3, H, W) of drafts, then their records with the scores (B,)."""
    folder, rows = file.parent.parent / "imgs" / file.stem, []
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "png" if images.shape[2] < 128 else "jpg"      # JPEG artefacts would show on small images
    for i, (draft, image) in enumerate(zip(drafts, images.cpu())):
        path = folder / f"{i:02d}.{suffix}"
        save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), path, quality=95, subsampling=0)
        own = {name: round(float(values[i]), 5) for name, values in scores.items()}
        rows.append(record_of(draft) | {"image": f"{file.stem}/{path.name}"} | own)
    write_json(file, rows, indent=None)


def finish(config: AdaptConfig, out: Path, target: Tensor, key: dict, machine: Machine) -> None:
    """Write annotation files of what passes the filters, pictures and a report. Raises UserError if no image passes."""
    rows = [row for part in sorted((out / "parts").glob("*.json")) for row in read_json(part, list)]
    for row in rows:
        row["dropped_by"] = [name for name, margin in margins(config, row).items() if margin < 0]
    kept = [row for row in rows if not row["dropped_by"]]
    machine.say(f"Kept {len(kept)} of {len(rows)} images.")
    if not kept:
        raise UserError("The filters dropped every image: look at them in --out, and loosen the thresholds.")
    remove_annotation(out)
    for start in range(0, len(kept), FILE):
        write_json(out / f"sda_{start}_{start + FILE}.json", kept[start:start + FILE], indent=None)

    def images_of(some: list[dict]) -> Tensor:
        return read_images([str(out / "imgs" / row["image"]) for row in some], DIFFUSION_PRESETS[config.size])

    chosen = random.Random(0).sample(kept, min(PICTURED, len(kept)))
    # spread over the set: neighbours may show one person
    real = target[torch.linspace(0, len(target) - 1, min(PICTURED, len(target))).long()]
    pictures.sheet({"adapted": images_of(chosen), "target": real}, out / "adaptation.png")
    counts, pictured = {}, {}
    for name in margins(config, rows[0]):
        counts[name] = count = sum(name in row["dropped_by"] for row in rows)
        ranked, some = sorted(rows, key=lambda row: margins(config, row)[name]), min(count, PICTURED // 2)
        pictured[f"{name}: the best {some} dropped, then the worst kept"] = images_of(ranked[count - some:][:PICTURED])
    pictures.sheet(pictured, out / "dropped.png")
    write_json(out / "report.json", {"made": len(rows), "kept": len(kept), "dropped": counts,
                                     "versions": checkpoint.VERSIONS, "key": key})
