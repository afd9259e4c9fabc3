"""The parts of an adapted set on disk: what is begun, made by processes and threads, and finished with its report.

diffusion/making.py has what a part consists of, and how it is made.
"""

import random
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from mra.config import DAD_RECIPES, UserError
from mra.data.files import read_json, write_json
from mra.diffusion.base import Diffusion, encode, read_images
from mra.diffusion.making import FILTERS, PART, Maker, SetPlan, collect
from mra.diffusion.sampling import calibration
from mra.run import checkpoint
from mra.run.kept import changes, key_file, remember
from mra.run.machine import Machine, stoppable
from mra.show import pictures

PICTURED = 10          # images in a row of a picture
PROBE_SEED = 2**32     # the calibration's samples have the seeds from this number on, the parts those from 0


def refuse_others(out: Path, key: dict, resume: bool) -> bool:
    """Whether `out` holds parts that were made under another key, of which `key` may be a part.

    With `resume` raises UserError instead, so that they stay. Also raises it for records that adapt.py did not make.
    """
    if any(out.glob("*.json")) and not (out / "parts").is_dir():
        raise UserError(f"--out {out} holds a set that adapt.py did not make; give another folder.")
    if not key_file(out / "parts").exists():
        return False
    made = read_json(key_file(out / "parts"))
    different = changes({name: made.get(name) for name in key}, key)
    if different and resume:
        raise UserError(f"{out} was made otherwise: {'; '.join(different)}; give another --out, or --no-resume to make "
                        "it anew.")
    return bool(different)


def begin(out: Path, key: dict, resume: bool) -> None:
    """Remove the report and annotation files, so that `out` no longer counts as finished.

    Without `resume`, parts that were made under another key are removed with their images; see `refuse_others`.
    """
    others = refuse_others(out, key, resume)
    for file in (out / "report.json", key_file(out / "report.json"), *out.glob("sda_*.json")):
        file.unlink(missing_ok=True)
    if others or not key_file(out / "parts").exists():
        for folder in (out / "parts", out / "imgs"):
            shutil.rmtree(folder, ignore_errors=True)
        (out / "parts").mkdir()
        remember(out / "parts", key)


def source_latents(plan: SetPlan, base: Diffusion, workers: int) -> Tensor | None:
    """Latents (N, C, h, w) of the source images whose moments stand for all, when images are restyled."""
    if not plan.movers:
        return None
    images = read_images([record.path for record in plan.movers], base.config, workers)
    return encode(base.autoencoder, images)


def make_parts(maker: Maker, machine: Machine) -> None:
    """Make the parts that are not on disk, after the calibration; processes and threads share them out."""
    plan, out = maker.plan, maker.out
    missing = [number for number in range(machine.rank, plan.parts, machine.world) if not maker.file(number).exists()]
    machine.say(f"Making {len(plan.drafts)} images in {out}.")
    with stoppable() as asked:
        moments = calibrate(maker, machine) if missing and plan.probes else (1.0, 0.0)
        started, done = time.perf_counter(), []

        def make_part(number: int) -> None:
            if asked.is_set():
                return
            maker.part(number, moments, machine.generator(maker.config.seed, number), machine.autocast())
            done.append(number)
            seconds = (time.perf_counter() - started) / len(done)
            machine.say(f"{len(done)} of {len(missing)} parts made  {PART / seconds:.1f} images/s  "
                        f"{seconds * (len(missing) - len(done)) / 60:.1f} min left")

        machine.map(make_part, missing)
        if machine.any(asked.is_set()):         # which also waits for all processes
            raise KeyboardInterrupt


def calibrate(maker: Maker, machine: Machine) -> tuple[Tensor, Tensor]:
    """The calibration's scale and shift, (C, h, w) each, from samples of the plan's probes."""
    seed = maker.config.seed
    chosen = maker.plan.chosen_probes(seed, DAD_RECIPES[maker.config.size].probes)
    samples = machine.map(lambda i: maker.probe(chosen[i], machine.generator(seed, PROBE_SEED + i), machine.autocast()),
                          range(len(chosen)))
    return calibration(torch.cat(samples), maker.painter.target_latents)


def finish(maker: Maker, target: Tensor, key: dict, machine: Machine) -> None:
    """Write the annotation files of what passes the filters, pictures, and the report.

    target (N, 3, H, W): the target's images. Raises UserError where nothing passes.
    """
    plan, out = maker.plan, maker.out
    kept, dropped = collect(maker.config, [maker.file(number) for number in range(plan.parts)], out)
    machine.say(f"Kept {len(kept)} of {len(plan.drafts)} images.")
    if not kept:
        raise UserError("The filters dropped every image: look at them in --out, and loosen the thresholds.")

    def images_of(rows: list[dict]) -> Tensor:
        return read_images([str(out / "imgs" / row["image"]) for row in rows], maker.painter.base.config)

    chosen = random.Random(0).sample(kept, min(PICTURED, len(kept)))
    # spread over the set: neighbours may show one person
    real = target[torch.linspace(0, len(target) - 1, min(PICTURED, len(target))).long()]
    pictures.sheet({"adapted": images_of(chosen), "target": real}, out / "adaptation.png")
    reasons = {name: [row for row in dropped if name in row["dropped_by"]] for name in FILTERS}
    pictured = {name: images_of(rows[:PICTURED]) for name, rows in reasons.items() if rows}
    if pictured:
        pictures.sheet(pictured, out / "dropped.png")
    write_json(out / "report.json", {
        "made": len(plan.drafts), "kept": len(kept), "dropped": {name: len(rows) for name, rows in reasons.items()},
        "versions": checkpoint.VERSIONS, "key": key})
    remember(out / "report.json", key)
