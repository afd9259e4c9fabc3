"""How close the images that adapt.py made are to the target, and whether they show what their captions say.

    python -m tests.study.gap OUT [OUT ...]                  measure the sets in these folders
    python -m tests.study.gap --train-reader --size base     train the reader of a size that has none

It prints a table, writes OUT/gap.json, and replaces OUT/adaptation.png by a picture with source and exact images.
Everything is measured on the demo town, which can draw any person as the target's cameras see them: the exact images.
A reader of attributes and cameras, trained on drawings of people that nothing else uses, gives the features of the
Frechet distance, so these stand for clothes, light and viewpoint. The reader also tells which colours an image shows.
The networks of adapt.py are read from where adapt.py keeps them. Read next: gap_table.py.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt import THRESHOLDS, source_records
from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, TARGETS, AdaptConfig, Fit, UserError
from mra.data.files import read_json, write_json
from mra.data.records import Box, Record, share_of
from mra.diffusion.autoencoder import group_norm
from mra.diffusion.base import Diffusion, read_images, to_float
from mra.diffusion.filters import Judge, distort, split_for_judge
from mra.diffusion.plan import average_boxes, noun_of
from mra.formats.read import load
from mra.run import checkpoint, networks
from mra.run.command import run
from mra.run.loop import Loop, Portion, Task
from mra.run.machine import Machine, locked
from mra.show import pictures
from mra.town import sets
from mra.town.drawing import DOMAINS, Pose
from mra.town.people import COLOURS, LOWERS, PATTERNS, SHOES, UPPERS, Person, sample_person
from tests.study import comparisons
from tests.study.portraits import Portrait, portraits
from tests.study.transfers import transferred

ROWS = 1000         # images of each row of the table
BOXED = 200         # images whose boxes are checked
PICTURED = 10       # images in a row of the picture

KINDS = {"upper_colour": COLOURS, "lower_colour": COLOURS, "upper": UPPERS, "lower": LOWERS, "pattern": PATTERNS,
         "shoes": SHOES, "shoes_colour": COLOURS}
CAMERAS = [(domain, camera) for domain in TARGETS for camera in range(DOMAINS[domain].cameras)]
SIZES = [*map(len, KINDS.values()), len(CAMERAS)]                   # the reader's answers: attributes, then the camera
# What the report counts, and the garment that the caption must name. Feet are small: where people dissolve, the kind of
# their shoes is lost first.
GARMENTS = {"upper_colour": "upper", "lower_colour": "lower", "shoes": "shoes"}
DETAIL = 4.0        # amplification of the detail that a classifier sees
CLASSIFIER = Fit(200, 64, 2e-3, warmup=0.0, weight_decay=0.05, average=0.0)         # how a classifier is trained
STEPS = {"tiny": 5, "base": 2000}                                                   # of other sizes
READERS = {"tiny": Fit(5, 16, 2e-3), "demo": Fit(3000, 64, 2e-3),
           "base": Fit(10_000, 64, 1e-3)}                           # how the reader of each size is trained


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) of one size -> (N, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class Classifier(nn.Module):
    """A small convolutional network: images (B, 3, H, W) in -1..1 -> features (B, 128) -> scores (B, outputs).

    It sees the image and, for grain and blur, the difference to the 3x3 mean. Strips of the body are pooled apart.
    """

    outputs = 1

    def __init__(self):
        super().__init__()
        layers, dim = [], 6
        for width, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
            layers += [nn.Conv2d(dim, width, 3, stride, 1), group_norm(width), nn.SiLU()]
            dim = width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * dim, 128))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(128, self.outputs))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        detail = image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return self.trunk(torch.cat([image, DETAIL * detail], 1))

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Scores (N, outputs) of uint8 images (N, 3, H, W); on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self(to_float(some.to(device))).float().cpu() for some in images.split(256)])


class Reader(Classifier):
    """Images -> scores (B, sum(SIZES)) of all attributes and cameras."""

    outputs = sum(SIZES)

    @torch.inference_mode()
    def features_of(self, images: Tensor) -> Tensor:
        """Features (N, 128) of uint8 images (N, 3, H, W), for the Frechet distance; on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self.features(to_float(some.to(device))).float().cpu() for some in images.split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="OUT", help="folders of sets that adapt.py made")
    parser.add_argument("--train-reader", action="store_true", help="train the reader of attributes and cameras")
    parser.add_argument("--size", default="demo", choices=READERS, help="size of the reader to train")
    parser.add_argument("--device", default="", choices=("cuda", "cpu"), help="empty: cuda where there is one")
    parser.add_argument("--precision", default="", choices=("float32", "bf16"), help="of the reader's training")
    given = parser.parse_args()
    if not given.sets and not given.train_reader:
        parser.error("give the folder of a set, or --train-reader")
    machine = Machine.of(given.device, given.precision)
    if machine.group.count > 1:
        raise UserError("One process measures a set: start it without torchrun.")
    if given.train_reader:
        train_reader(given.size, machine)
    for out in map(Path, given.sets):
        if not (out / "report.json").is_file():
            raise UserError(f"{out} has no report.json: give the folder of a set that adapt.py has finished.")
        with locked(out, machine):
            measure(out, given.device)


# ---- a set, and all that made it

@dataclass(frozen=True)
class AdaptedSet:
    """A set that adapt.py made from the demo town: its records, and the autoencoder and the judge behind it."""

    out: Path
    report: dict            # of adapt.py
    config: AdaptConfig
    machine: Machine        # with the precision that the set was made in
    base: Diffusion         # with the target's scale and decoder
    judge: Judge
    target: Tensor          # (M, 3, H, W) the target's training images
    source: Sequence[Record]
    rows: list[dict]        # some records of the set
    images: Tensor          # (N, 3, H, W) their images

    @property
    def fit(self) -> Fit:
        """How a classifier is trained on sets of this size."""
        return replace(CLASSIFIER, steps=STEPS.get(self.config.size, CLASSIFIER.steps))

    @staticmethod
    def read(out: Path, device: str) -> "AdaptedSet":
        """Raises UserError where adapt.py made the set from something else than lies here now."""
        report = read_json(out / "report.json")
        with checkpoint.trusting(out / "report.json"):
            key = report["key"]
            config = AdaptConfig(**key["flags"], **{name: key[name] for name in THRESHOLDS})
            machine = Machine.of(device, key["precision"])
            if DIFFUSION_PRESETS[config.size].stable or config.target not in TARGETS:
                raise UserError(f"{out} is not made from the demo town, so there are no exact drawings beside it.")
        base = trained_base(config, machine)
        root = sets.ready(config.target, config.size == "tiny")
        records = share_of(load(config.target, "train", root, say=machine.say), config.share)
        target = networks.Target.of(config, records, base)
        # before anything would be trained anew
        check_same(out, key, target.key | {"recipe": asdict(DAD_RECIPES[config.size])})
        base = networks.adapt_autoencoder(config, base, target, machine)
        judge = networks.train_judge(config, base, target, machine)
        source = source_records(config, machine).records
        rows = rows_of(out)
        images = read_images([str(out / "imgs" / row["image"]) for row in rows], base.config, config.workers)
        return AdaptedSet(out, report, config, machine, base, judge, target.images, source, rows, images)


def trained_base(config: AdaptConfig, machine: Machine) -> Diffusion:
    """The base of the demo town. Raises UserError where none is trained."""
    if not networks.base_file(config).exists():
        raise UserError(f"There is no base of this size: python adapt.py --train-base --size {config.size} trains it.")
    return networks.load_base(config, machine)


def check_same(out: Path, key: dict, found: dict) -> None:
    """Raise UserError where the set's key differs from what is found here."""
    different = checkpoint.changes({name: key.get(name) for name in found}, found)
    if different:
        raise UserError(f"{out} cannot be measured here: {'; '.join(different)}. A set is measured beside the demo "
                        "town and the networks that it was made with.")


def rows_of(out: Path) -> list[dict]:
    """ROWS random records of a set. Raises UserError for a single one, which has no distribution."""
    files = sorted(out.glob("sda_*.json"), key=lambda file: int(file.stem.split("_")[1]))
    kept = [row for file in files for row in read_json(file, list)]
    if len(kept) < 2:
        raise UserError(f"{out} holds a single image, which has no distribution to measure.")
    return random.Random(0).sample(kept, min(ROWS, len(kept)))


# ---- the report

class Town:
    """Draws people of the demo town at the size of a set's images."""

    def __init__(self, made: AdaptedSet):
        tiny = made.config.size == "tiny"
        self.domain, self.size = made.config.target, (made.base.config.height, made.base.config.width)
        self.cores = made.machine.cores
        self.sizes, self.root = sets.TINY if tiny else sets.DEFAULT, sets.ready(self.domain, tiny)

    def portraits(self, people: list[Person], seed: int) -> list[Portrait]:
        """As the target's cameras see them, with words."""
        return portraits(self.domain, people, seed, self.size, self.cores)

    def images(self, people: list[Person], seed: int, domain: str = "", poses: list[Pose] | None = None) -> Tensor:
        """(N, 3, H, W), as the cameras of the target or of another domain see them."""
        some = portraits(domain or self.domain, people, seed, self.size, self.cores, poses)
        return stacked([one.pixels for one in some])

    @cached_property
    def every_shot(self) -> dict[str, sets.Shot]:
        """What each file of the town shows."""
        return {f"{self.root}/{folder}/imgs/{shot.path}": shot for name, folder in sets.FOLDERS.items()
                for shot in sets.shots(name, self.sizes[name], 0)}

    def shots(self, paths: list[str]) -> list[sets.Shot]:
        """What these files show. Raises UserError for a file that is not the town's."""
        others = [path for path in paths if path not in self.every_shot]
        if others:
            raise UserError(f"The set was made from {others[0]}, which is not an image of the demo town.")
        return [self.every_shot[path] for path in paths]


def measure(out: Path, device: str) -> None:
    """Measure a set: print the table, write gap.json and the picture."""
    made = AdaptedSet.read(out, device)
    reader, town = read_reader(made.config.size, made.machine.device), Town(made)
    own = town.shots([row["origin"] for row in made.rows])
    captions = [row["caption"] for row in made.rows]
    held_out, others = (town.images(strangers(len(own), seed), seed) for seed in (2, 3))
    source = list(islice(made.source, len(own)))
    table = table_of(made, town, reader, source, (held_out, others))
    told = ("frechet", "distance_closed", "classifier", *GARMENTS)
    print(comparisons.as_table([{"images": name} | {key: f"{row[key]:.3f}" for key in told if key in row}
                                for name, row in table.items()]))
    people = [shot.person for shot in own]
    exact = town.images(people, 5, poses=[shot.pose for shot in own])       # the same people in the same poses
    facts = {
        "light": {"made": light(made.images), "target": light(made.target)},
        "nearest training image": {"made": nearest(made.images, made.target),
                                   "held out": nearest(held_out, made.target)},
        "judge of malformed people": judge_skill(made.judge, made.target, made.config.malformed),
        "classifier on target blurred by half a pixel": separability(
            half_pixel_blur(held_out), held_out, made.fit, made.config.seed, made.machine),
        "garment colours": {"made": garment_accuracy(reader, made.images, people, captions),
                            "exact images of the same people": garment_accuracy(reader, exact, people, captions)}}
    if made.config.mode == "generate":
        facts["boxes"] = box_quality(made, town, source)
    else:
        before = read_images([row["origin"] for row in made.rows], made.base.config, made.config.workers)
        facts["distance to the exact image of the same person and pose"] = {
            "source": distance(before, exact), "restyled": distance(made.images, exact)}
    write_json(out / "gap.json", {
        **{name: made.report[name] for name in ("made", "kept", "dropped", "key")}, "versions": checkpoint.VERSIONS,
        "gap": table, **facts})
    some = people[:PICTURED]
    pictures.sheet({"source: as the source draws these people": town.images(some, 4, "source"),
                    "adapted": made.images[:PICTURED],
                    f"exact: as {made.config.target}'s cameras see them": town.images(some, 4),
                    "target: other people": held_out[:PICTURED]}, out / "adaptation.png")
    print(f"Wrote {out / 'gap.json'} and adaptation.png.")


def table_of(made: AdaptedSet, town: Town, reader: Reader, source: list[Record],
             drawings: tuple[Tensor, Tensor]) -> dict[str, dict]:
    """A row for each way to make images, for exact images, and for the second of two sets of drawings of the target.

    All are compared with the first of these (N, 3, H, W), whose people are in no set.
    """
    held_out, others = drawings
    own = [shot.person for shot in town.shots([row["origin"] for row in made.rows])]
    theirs = [shot.person for shot in town.shots([record.path for record in source])]
    captions = [record.captions[0] for record in source]
    plain = read_images([record.path for record in source], made.base.config, made.config.workers)
    dad = f"dad {made.config.mode}"
    ways = {"source": plain, **transferred(plain, made.target, made.base.autoencoder), dad: made.images,
            "exact": town.images(theirs, 1), "target": others}
    table = {}
    for name, images in ways.items():
        table[name] = row_of(images, held_out, reader, made)
        if name == dad:
            table[name] |= garment_accuracy(reader, images, own, [row["caption"] for row in made.rows])
        elif name != "target":          # whose people no caption describes
            table[name] |= garment_accuracy(reader, images, theirs, captions)
    add_distance_closed(table)
    return table


def row_of(images: Tensor, held_out: Tensor, reader: Reader, made: AdaptedSet) -> dict:
    """A row of the table: how far images are from the held-out images of the target, both (N, 3, H, W) uint8."""
    first, second = (reader.features_of(some) for some in (images, held_out))
    apart = separability(images, held_out, made.fit, made.config.seed, made.machine)
    return {"frechet": round(frechet(first, second), 3), "classifier": round(apart, 4), **light(images)}


def add_distance_closed(rows: dict[str, dict]) -> None:
    """Add to each row the share of the log Frechet distance from source to exact images that it closes."""
    far, near = (math.log(rows[name]["frechet"]) for name in ("source", "exact"))
    for row in rows.values():
        row["distance_closed"] = round((far - math.log(row["frechet"])) / (far - near), 4)


# ---- the reader of attributes and cameras

def train_reader(size: str, machine: Machine) -> None:
    """Train the reader on drawings of people that nothing else uses, as all targets' cameras see them."""
    torch.manual_seed(0)
    reader = Reader().to(machine.device)
    people, pixels = strangers(20 if size == "tiny" else 6000, seed=0), DIFFUSION_PRESETS[size]

    def prepare() -> networks.Loss:
        images, cameras = [], []
        for domain in TARGETS:
            for one in portraits(domain, people, 0, (pixels.height, pixels.width), machine.cores):
                images.append(one.pixels)
                cameras.append(CAMERAS.index((domain, one.camera)))
        images = stacked(images)                                                         # (N, 3, H, W)
        labels = torch.cat([labels_of(people).repeat(len(TARGETS), 1), torch.tensor(cameras)[:, None]], 1)

        def loss(draw: torch.Generator, count: int) -> Tensor:
            chosen = torch.randint(len(images), (count,), generator=draw, device=machine.device).cpu()
            return reading_loss(reader, images[chosen].to(machine.device), labels[chosen].to(machine.device))

        return loss

    networks.learn("reader", reader, prepare, READERS[size], reader_file(size).parent,
                   {"people": len(people), "seed": 0}, machine)
    machine.say(f"{reader_file(size)} is ready.")


def reader_file(size: str) -> Path:
    """Where a reader is written by `train_reader`."""
    return Path(f"out/base-{size}/reader.safetensors")


def read_reader(size: str, device: torch.device) -> Reader:
    """The shipped reader of a size, or a trained one. Raises UserError where there is none."""
    shipped = Path(__file__).with_name(f"reader-{size}.safetensors")
    path = shipped if shipped.exists() else reader_file(size)
    if not path.exists():
        raise UserError(f"There is no reader of this size: python -m tests.study.gap --train-reader --size {size} "
                        "trains it.")
    reader = Reader()
    checkpoint.restore_weights(reader, checkpoint.load(path)[0], path)
    return reader.to(device).eval()


def strangers(count: int, seed: int) -> list[Person]:
    """People who live in no set."""
    return [sample_person(random.Random(f"stranger/{seed}/{i}")) for i in range(count)]


def labels_of(people: list[Person]) -> Tensor:
    """(N, attributes): the number of each attribute's value."""
    return torch.tensor([[list(values).index(getattr(person, name)) for name, values in KINDS.items()]
                         for person in people])


def reading_loss(reader: Reader, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: uint8 images (B, 3, H, W), labels (B, attributes + 1), the camera's last."""
    scores = reader(to_float(images)).split(SIZES, 1)
    return sum(F.cross_entropy(s.float(), labels[:, i]) for i, s in enumerate(scores)) / len(scores)


def garment_accuracy(reader: Reader, images: Tensor, people: list[Person], captions: list[str]) -> dict[str, float]:
    """Share of the images on which the reader finds each of GARMENTS, where the caption names it and its garment."""
    def named(caption: str, person: Person, kind: str) -> bool:
        return any(term in caption.lower() for term in KINDS[kind][getattr(person, kind)])

    scores, result = dict(zip(KINDS, reader.score(images).split(SIZES, 1))), {}
    for counted, garment in GARMENTS.items():
        asked = torch.tensor([named(caption, person, counted) and named(caption, person, garment)
                              for person, caption in zip(people, captions)])
        truth = labels_of(people)[:, list(KINDS).index(counted)]
        result[counted] = float((scores[counted].argmax(1) == truth)[asked].float().mean())
    return result


# ---- measures of images (N, 3, H, W) uint8

def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the normal distributions that fit two sets of features (N, F) (Heusel et al. 2017).

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the root by the eigenvalues of C1^(1/2) C2 C1^(1/2).
    """
    (mean1, cov1), (mean2, cov2) = ((x.double().mean(0), x.double().T.cov()) for x in (first, second))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def separability(first: Tensor, second: Tensor, fit: Fit, seed: int, machine: Machine) -> float:
    """Accuracy on unseen halves of a classifier freshly trained to tell two sets apart: 0.5 = it cannot."""
    draw = torch.Generator().manual_seed(seed)
    (train1, test1), (train2, test2) = (x[torch.randperm(len(x), generator=draw)].chunk(2) for x in (first, second))
    classifier = tell_apart(train1, train2, fit, seed, machine)
    right = (classifier.score(test1) < 0).float().mean() + (classifier.score(test2) > 0).float().mean()
    return float(right / 2)


def tell_apart(first: Tensor, second: Tensor, fit: Fit, seed: int, machine: Machine) -> Classifier:
    """A classifier trained in float32 to give images of `first` a negative score and of `second` a positive one."""
    torch.manual_seed(seed)
    classifier = Classifier().to(machine.device, memory_format=torch.channels_last)

    def loss_of(portion: Portion) -> dict[str, Tensor]:
        return {"loss": classifier_loss(classifier, first, second, portion.generator, portion.count)}

    Loop(Task("classifier", classifier, fit, seed), loss_of, replace(machine, precision="float32")).run()
    return classifier.eval()


def classifier_loss(classifier: Classifier, first: Tensor, second: Tensor, draw: torch.Generator, count: int) -> Tensor:
    """Cross-entropy of `count` random uint8 images (N, 3, H, W), half of `first`; a scalar."""
    device, some = draw.device, []
    for images in (first, second):
        chosen = torch.randint(len(images), (count // 2,), generator=draw, device=device)
        some.append(images[chosen.cpu()].to(device))
    x = torch.cat(some)                                                                  # (count, 3, H, W)
    mirrored = torch.rand(len(x), 1, 1, 1, generator=draw, device=device) < 0.5
    x = to_float(torch.where(mirrored, x.flip(-1), x))
    labels = (torch.arange(len(x), device=device) >= count // 2).float()
    return F.binary_cross_entropy_with_logits(classifier(x)[:, 0].float(), labels)


def half_pixel_blur(images: Tensor) -> Tensor:
    """Images blurred by a Gaussian of half a pixel, which a good classifier must notice."""
    kernel = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3).round().to(torch.uint8)


def light(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation over images of brightness, saturation, and red minus blue, each 0..1."""
    parts = []
    for some in images.split(256):
        x = some.float() / 255
        parts.append(torch.stack([x.mean((1, 2, 3)), (x.amax(1) - x.amin(1)).mean((1, 2)),
                                  (x[:, 0] - x[:, 2]).mean((1, 2))]))
    measures = torch.cat(parts, 1)                                                       # (3, N)
    return {name: [round(float(values.mean()), 4), round(float(values.std(correction=0)), 4)]
            for name, values in zip(("brightness", "saturation", "red-blue"), measures)}


def distance(images: Tensor, others: Tensor) -> float:
    """Mean over pairs of the root mean square pixel distance, 0..1, at a quarter of the resolution.

    Poses and light count; the exact place of an edge does not.
    """
    first, second = (F.avg_pool2d(x.float() / 255, 4) for x in (images, others))
    return round(float((first - second).square().mean((1, 2, 3)).sqrt().mean()), 4)


def nearest(images: Tensor, others: Tensor) -> float:
    """The median over images of the root mean square pixel distance to the nearest of `others`, 0..1."""
    flat = images.flatten(1).float() / 255
    rest = (some.flatten(1).float() / 255 for some in others.split(1000))
    found = torch.stack([torch.cdist(flat, some).amin(1) for some in rest]).amin(0) / flat.shape[1] ** 0.5      # (N,)
    return round(float(found.median()), 4)


# ---- the judge of malformed people, on what it has not seen

def judge_skill(judge: Judge, images: Tensor, allowed: float) -> dict[str, float]:
    """Shares kept and dropped of the quarter of the images that no judge has used, damaged in unseen ways.

    `allowed`: the share of whole images that may be lost, as --malformed says.
    """
    unseen = split_for_judge(images)[2]
    good, bad = judge.score(unseen), judge.score(distort(unseen, UNSEEN, 1))
    return {"good images kept": round(float((good <= 1 - allowed).float().mean()), 4),
            "damaged images dropped": round(float((bad > 1 - allowed).float().mean()), 4)}


def shift_half(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Everything below a line slides sideways."""
    _, height, width = image.shape
    line = height // 4 + int(torch.randint(height // 2, (1,), generator=generator))
    image = image.clone()
    image[:, line:] = image[:, line:].roll(width // 4 + int(torch.randint(width // 4, (1,), generator=generator)), 2)
    return image


def join_halves(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """The left half of one person and the right half of another, upside down."""
    half = image.shape[2] // 2
    return torch.cat([image[:, :, :half], donor.flip(1)[:, :, half:]], 2)


def behead(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """The background in place of the head, with a soft edge."""
    line = 0.2 + 0.08 * torch.rand((), generator=generator)
    share = ((line - torch.linspace(0, 1, image.shape[1])[:, None]) / 0.05).clamp(0, 1)                        # (H, 1)
    return mixed(image, background(image), share)


def dissolve(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A limb or a garment fades into the background."""
    draw = torch.rand(5, generator=generator)
    y, x, tall, wide, most = torch.lerp(torch.tensor([0.35, 0.4, 0.15, 0.25, 0.7]),
                                        torch.tensor([0.85, 0.6, 0.25, 0.4, 1.0]), draw)
    rows, columns = (torch.linspace(0, 1, n) for n in image.shape[1:])
    share = 1.6 - 1.2 * (((rows[:, None] - y) / tall).square() + ((columns - x) / wide).square())             # (H, W)
    return mixed(image, background(image), most * share.clamp(0, 1))


def tear(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """The image is warped by a smooth random field."""
    _, height, width = image.shape
    field = F.interpolate(torch.randn(1, 2, 6, 3, generator=generator), (height, width), mode="bicubic")[0]
    rows, columns = (torch.linspace(-1, 1, n) for n in (height, width))
    grid = torch.stack([columns + 0.35 * field[0], rows[:, None] + 0.12 * field[1]], 2)                     # (H, W, 2)
    moved = F.grid_sample(image[None].float(), grid[None], padding_mode="border", align_corners=True)[0]
    return moved.round().clamp(0, 255).to(torch.uint8)


def background(image: Tensor) -> Tensor:
    """(3, H, W): each row goes evenly from the colour of its left edge to that of its right edge."""
    left, right = image[:, :, :3].float().mean(2, keepdim=True), image[:, :, -3:].float().mean(2, keepdim=True)
    return torch.lerp(left, right, torch.linspace(0, 1, image.shape[2]))


def mixed(image: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """uint8: the image, with this share of the other in each place."""
    return torch.lerp(image.float(), other, share.expand_as(other)).round().to(torch.uint8)


UNSEEN = [shift_half, join_halves, behead, dissolve, tear]      # kinds that are not among the judge's lessons


# ---- boxes

def box_quality(made: AdaptedSet, town: Town, source: list[Record]) -> dict[str, float]:
    """Mean overlap (IoU) of the boxes that phrases get in made images with the true ones, in drawings of the target."""
    boxes, overlaps = average_boxes(made.source), []
    for portrait in town.portraits([shot.person for shot in town.shots([one.path for one in source[:BOXED]])], 1):
        for phrase, truth in zip(portrait.words.phrases, portrait.words.boxes):
            noun = noun_of(phrase)
            if noun in boxes:
                overlaps.append(overlap(boxes[noun], truth))
    return {"made": round(float(np.mean(overlaps)), 4), "phrases": len(overlaps)}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    sides = [min(p + s / 2, q + t / 2) - max(p - s / 2, q - t / 2) for p, q, s, t in zip(a[:2], b[:2], a[2:], b[2:])]
    shared = max(0.0, sides[0]) * max(0.0, sides[1])
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


if __name__ == "__main__":
    run(main)
