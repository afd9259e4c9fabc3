"""How far made images are from the target, and whether they show what their captions say.

Everything is measured on the demo town, which can draw any person in the target's look: the exact answer. A reader of
attributes and of the camera, trained on such drawings of people that nothing else uses, gives the features of the
Frechet distance (so they know clothes, light and viewpoint) and the accuracy of what made images show.
Before: filters.py, transfers.py, making.py. After: adapt.py.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mra import checkpoint, contrasts, figures
from mra.config import FITS, AdaptConfig, DiffusionConfig
from mra.data import town
from mra.data.drawing import DOMAINS, Pose
from mra.data.people import COLOURS, LOWERS, PATTERNS, SHOES, UPPERS, Person, sample_person
from mra.data.records import Record
from mra.data.town import Portrait
from mra.diffusion.boxes import overlap, phrase_box, word_maps
from mra.diffusion.denoiser import DomainBranch
from mra.diffusion.filters import Judge, tell_apart
from mra.diffusion.making import FILTERS
from mra.diffusion.sampling import Diffusion, encode, read_images, stacked, to_float
from mra.diffusion.transfers import transferred
from mra.training import Machine

ROWS, BOXED = 1000, 200     # images of each row of the report, and of the check of the boxes

TARGETS = ("cuhk", "icfg", "rstp")
KINDS = {"upper_colour": COLOURS, "lower_colour": COLOURS, "upper": UPPERS, "lower": LOWERS, "pattern": PATTERNS,
         "shoes": SHOES, "shoes_colour": COLOURS}
CAMERAS = [(domain, camera) for domain in TARGETS for camera in range(DOMAINS[domain].cameras)]
SIZES = [*map(len, KINDS.values()), len(CAMERAS)]                   # the reader's answers: attributes, then the camera
GARMENTS = {"upper_colour": "upper", "lower_colour": "lower"}       # what the report reads off: garment colours


def labels_of(people: list[Person]) -> Tensor:
    """(N, attributes): the number of each attribute's value."""
    return torch.tensor([[list(values).index(getattr(person, name)) for name, values in KINDS.items()]
                         for person in people])


def reading_loss(reader: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: uint8 images (B, 3, H, W), labels (B, attributes + 1), the camera's last."""
    scores = reader(to_float(images)).split(SIZES, 1)
    return sum(F.cross_entropy(s.float(), labels[:, i]) for i, s in enumerate(scores)) / len(scores)


def colour_accuracy(reader: Judge, images: Tensor, people: list[Person], captions: list[str]) -> dict[str, float]:
    """Share of the images whose caption has the words for a garment and its colour, on which the reader finds it."""
    def named(caption: str, person: Person, kind: str) -> bool:
        return any(term in caption.lower() for term in KINDS[kind][getattr(person, kind)])

    scores, result = dict(zip(KINDS, reader.score(images).split(SIZES, 1))), {}
    for colour, garment in GARMENTS.items():
        asked = torch.tensor([named(caption, person, colour) and named(caption, person, garment)
                              for person, caption in zip(people, captions)])
        truth = labels_of(people)[:, list(KINDS).index(colour)]
        result[colour] = float((scores[colour].argmax(1) == truth)[asked].float().mean())
    return result


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the normal distributions that fit two sets of features (N, F) (Heusel et al. 2017).

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the root by the eigenvalues of C1^(1/2) C2 C1^(1/2).
    """
    (mean1, cov1), (mean2, cov2) = ((x.double().mean(0), x.double().T.cov()) for x in (first, second))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def separability(first: Tensor, second: Tensor, seed: int, device: torch.device, steps: int) -> float:
    """Accuracy on unseen halves of a classifier freshly trained to tell two sets apart: 0.5 = it cannot."""
    draw = torch.Generator().manual_seed(seed)
    (train1, test1), (train2, test2) = (x[torch.randperm(len(x), generator=draw)].chunk(2) for x in (first, second))
    judge = tell_apart(train1, train2, steps, seed, device)
    return float(((judge.score(test1) < 0).float().mean() + (judge.score(test2) > 0).float().mean()) / 2)


def half_pixel_blur(images: Tensor) -> Tensor:
    """uint8 images blurred by a Gaussian of half a pixel: what a classifier worth its name must notice."""
    kernel = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3).round().to(torch.uint8)


def light(images: Tensor) -> dict[str, list[float]]:
    """Mean and spread over images (N, 3, H, W) of brightness, saturation, and red minus blue, each 0..1."""
    parts = (some.float() / 255 for some in images.split(256))
    measures = torch.cat([torch.stack([x.mean((1, 2, 3)), (x.amax(1) - x.amin(1)).mean((1, 2)),
                                       (x[:, 0] - x[:, 2]).mean((1, 2))]) for x in parts], 1)           # (3, N)
    return {name: [round(float(values.mean()), 4), round(float(values.std(correction=0)), 4)]
            for name, values in zip(("brightness", "saturation", "red-blue"), measures)}


def distance(images: Tensor, others: Tensor) -> float:
    """Mean over pairs of the root mean square pixel distance, 0..1, at a quarter of the resolution: poses and light
    count, the place of an edge does not."""
    first, second = (F.avg_pool2d(x.float() / 255, 4) for x in (images, others))
    return round(float((first - second).square().mean((1, 2, 3)).sqrt().mean()), 4)


def nearest(images: Tensor, others: Tensor) -> float:
    """Of `images` (N, 3, H, W) uint8, the median root mean square pixel distance to the nearest of `others`, 0..1."""
    flat = images.flatten(1).float() / 255
    rest = (some.flatten(1).float() / 255 for some in others.split(1000))
    found = torch.stack([torch.cdist(flat, some).amin(1) for some in rest]).amin(0) / flat.shape[1] ** 0.5      # (N,)
    return round(float(found.median()), 4)


def strangers(count: int, seed: int) -> list[Person]:
    """People that live in no set."""
    return [sample_person(random.Random(f"stranger/{seed}/{i}")) for i in range(count)]


def measure(images: Tensor, held_out: Tensor, reader: Judge, seed: int, device: torch.device, steps: int) -> dict:
    """The row of one set of images in the report: distance to the held-out target images, both uint8."""
    features = [reader.score(some, features=True) for some in (images, held_out)]
    return {"frechet": round(frechet(*features), 3),
            "classifier": round(separability(images, held_out, seed, device, steps), 4), **light(images)}


def add_shares(rows: dict[str, dict]) -> None:
    """Add to every row the share of the gap in log Frechet distance that it closes: the source 0, exact images 1."""
    far, near = (math.log(rows[name]["frechet"]) for name in ("source", "exact"))
    for row in rows.values():
        row["gap_closed"] = round((far - math.log(row["frechet"])) / (far - near), 4)


def box_quality(base: Diffusion, branch: DomainBranch, drawn: list[Portrait], source: Sequence[Record],
                places: dict[str, Tensor]) -> dict[str, float]:
    """Mean overlap (IoU) of the boxes that phrases of target drawings get, as made images do, with the true ones.

    Beside it that of attention alone, without the nouns' usual `places`, and that of a guess which has seen no image:
    the average box of the phrase's last word in the source set.
    """
    device, usual, overlaps = next(base.parameters()).device, defaultdict(list), defaultdict(list)
    for record in source:
        for phrase, box in zip(record.phrases, record.boxes):
            usual[phrase.split()[-1]].append(box)
    captions = [portrait.words.caption for portrait in drawn]
    condition = torch.ones(len(drawn), 1, base.config.height, base.config.width, device=device)
    latents = encode(base.autoencoder, stacked([portrait.pixels for portrait in drawn]))
    maps = word_maps(base.denoiser, branch, latents, base.read(captions), condition, base.schedule,
                     torch.Generator(device).manual_seed(0)).float().cpu()
    for portrait, caption, own in zip(drawn, captions, maps):
        for phrase, truth in zip(portrait.words.phrases, portrait.words.boxes):
            noun = phrase.split()[-1]
            box, alone = (phrase_box(own, caption, phrase, base.tokenizer, where) for where in (places, {}))
            if box and noun in usual:
                overlaps["made"].append(overlap(box[0], truth))
                overlaps["attention alone"].append(overlap(alone[0], truth))
                overlaps["average box"].append(overlap(tuple(np.mean(usual[noun], 0)), truth))
    return {name: round(float(np.mean(values)), 4) for name, values in overlaps.items()} | {
        "phrases": len(overlaps["made"])}


def images_of(rows: list[dict], size: DiffusionConfig, out: Path) -> Tensor:
    """The made images (N, 3, H, W) of these records."""
    return read_images([str(out / "imgs" / row["image"]) for row in rows], size)


def set_report(size: DiffusionConfig, kept: list[dict], dropped: list[dict], made: Tensor, target: Tensor,
               out: Path) -> dict:
    """What every run reports: what was made and dropped, its light, whether it repeats training images. Pictures."""
    reasons = {name: [row for row in dropped if name in row["dropped_by"]] for name in FILTERS}
    pictured = {name: images_of(rows[:10], size, out) for name, rows in reasons.items() if rows}
    if pictured:
        figures.sheet(pictured, out / "dropped.png")
    figures.sheet({"adapted": made[:10], "target": target[:10]}, out / "adaptation.png")
    return {"versions": checkpoint.VERSIONS, "made": len(kept) + len(dropped),
            "kept": len(kept), "dropped": {name: len(rows) for name, rows in reasons.items()},
            "light": {"made": light(made), "target": light(target)},
            "nearest training image": {"made": nearest(made, target)}}


def town_report(config: AdaptConfig, machine: Machine, base: Diffusion, branch: DomainBranch, reader: Judge,
                target: Tensor, rows: list[dict], made: Tensor, source: Sequence[Record], places: dict[str, Tensor],
                out: Path) -> dict:
    """What the demo town adds: distances to held-out target drawings of every way to make images, and the exact one.

    `rows` are records of the set, `made` (N, 3, H, W) their images. The row "moments" is decoded as these are, by the
    decoder that has learned the target's blur and grain.
    """
    size, tiny, steps = (base.config.height, base.config.width), config.size == "tiny", FITS[config.size]["judge"]

    def drawn(people: list[Person], seed: int, domain: str = config.target, poses: list[Pose] | None = None) -> Tensor:
        return stacked([one.pixels for one in town.portraits(domain, people, seed, size, machine.cores, poses)])

    source, captions = list(islice(source, len(rows))), [row["caption"] for row in rows]
    shots = {f"{town.root(tiny)}/{folder}/imgs/{shot.path}": shot for name, folder in town.FOLDERS.items()
             for shot in town.shots(name, town.TINY if tiny else town.DEFAULT, 0)}
    own = [shots[row["origin"]].person for row in rows]
    theirs = [shots[record.path].person for record in source]
    plain = read_images([record.path for record in source], base.config, config.workers)
    held_out, others = (drawn(strangers(len(rows), seed), seed) for seed in (2, 3))
    sets = {"source": plain, **transferred(plain, target, base.autoencoder), f"dad {config.mode}": made,
            "exact": drawn(theirs, 1), "target": others}
    table = dict(zip(sets, machine.map(
        lambda images: measure(images, held_out, reader, config.seed, machine.device, steps), sets.values())))
    for name, images in sets.items():
        asked = (own, captions) if images is made else (theirs, [record.captions[0] for record in source])
        if name != "target":            # whose people are others
            table[name] |= colour_accuracy(reader, images, *asked)
    add_shares(table)
    told = ("frechet", "gap_closed", "classifier", *GARMENTS)
    machine.say(contrasts.as_table([{"images": name} | {key: f"{row[key]:.3f}" for key in told if key in row}
                                    for name, row in table.items()]))
    figures.sheet({"source: as the source draws these people": drawn(own[:10], 4, "source"), "adapted": made[:10],
                   f"exact: as {config.target}'s cameras see them": drawn(own[:10], 4),
                   "target: other people": held_out[:10]}, out / "adaptation.png")
    truth = drawn(own, 5, poses=[shots[row["origin"]].pose for row in rows])
    blurred = separability(half_pixel_blur(held_out), held_out, config.seed, machine.device, steps)
    facts = {"gap": table, "classifier on target blurred by half a pixel": blurred,
             "nearest training image": {"made": nearest(made, target), "held out": nearest(held_out, target)},
             "garment colours": {name: colour_accuracy(reader, images, own, captions) for name, images in
                                 (("made", made), ("exact images of the same people", truth))}}
    if config.mode == "generate":
        boxed = town.portraits(config.target, theirs[:BOXED], 1, size, machine.cores)
        facts["boxes"] = box_quality(base, branch, boxed, source, places)
    else:
        before = read_images([row["origin"] for row in rows], base.config, config.workers)
        facts["distance to the exact image of the same person and pose"] = {
            name: distance(images, truth) for name, images in (("source", before), ("restyled", made))}
    return facts
