"""Thousands of spoilt inputs: each must be read, or refused in one sentence that names it, with exit status 2.

    python tests/stress/fuzz.py                                        2,000 cases of each kind
    python tests/stress/fuzz.py --cases 100 --seed 7 --only images flags
    python tests/stress/fuzz.py --first 815 --cases 1 --only checkpoints     one case again

A case takes a small valid input, spoils one place of it or a few, and hands it to the code that reads it, in this
process; every so many cases (--commands of each kind) go through the real command in a process of its own. Never may
there be another exception, a traceback, a sentence with a control character, more than 10 seconds of CPU time or 2 GiB
beyond what there was. What decoders of images say of themselves beside the sentence is not looked at. A case is
decided by kind, seed and number alone. Exit status 1 where a case ended as it should not.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import typing
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torchvision.models import VisionTransformer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import adapt  # noqa: E402
import evaluate  # noqa: E402
from mra.config import (  # noqa: E402
    PRESETS,
    AdaptConfig,
    DiffusionConfig,
    EvalConfig,
    Fit,
    TrainConfig,
    recipe,
)
from mra.data import augment, words  # noqa: E402
from mra.data.batches import PairDataset  # noqa: E402
from mra.data.files import examined, open_image, quoted  # noqa: E402
from mra.data.tokenizer import SPECIAL, VOCAB_FILE, Tokenizer, mask_words  # noqa: E402
from mra.diffusion.base import Diffusion, read_images  # noqa: E402
from mra.formats.check import check_set  # noqa: E402
from mra.formats.read import load  # noqa: E402
from mra.ranking import Settings, queries_of, search  # noqa: E402
from mra.retriever import Retriever  # noqa: E402
from mra.run import checkpoint, stages  # noqa: E402
from mra.run.command import parse, run  # noqa: E402
from mra.run.loop import Loop, Task  # noqa: E402
from mra.run.machine import Machine  # noqa: E402
from mra.run.networks import load_base  # noqa: E402
from mra.show import gallery, pictures  # noqa: E402
from mra.weights import retrievers  # noqa: E402
from tests.study import study, town  # noqa: E402
from tests.test_weights import Bert  # noqa: E402

SECONDS, BYTES, LETTERS = 10, 2 * 2**30, 4000      # at most, of a case; of its sentence
CPU = torch.device("cpu")
MACHINE = Machine.of("cpu", "float32")


class Case(NamedTuple):
    """A spoilt input."""

    what: str                           # how it was spoilt
    names: str                          # what a refusal must name
    read: Callable[[], object]          # what the product does with it
    command: tuple[str, ...] = ()       # the same through one of its commands; none: nothing reads it that quickly


Maker = Callable[[random.Random], Case]


# ---- how anything is spoilt

ODD = (None, True, False, -1, 0, 1, 2, 7, 1e-300, 1e308, 2**31, 2**63, -2**63 - 1, 10**18, 10**300, float("nan"),
       float("inf"), -float("inf"), "", " ", "\n", "0", "nan", "a", "a\0b", "\ud800", "\x1b[2J\x1b]0;x\x07", "\u202e",
       "\u2028", "<b>&amp;</b>", "穿红衣", "..", "../../x", "/etc/passwd", "a\\b", "C:\\x", "a/./b", "~", "-", "--help",
       "%s%n", "{0}", [], {}, [[]], [None], [[0.5] * 4], {"": 0}, {"a": {"b": []}}, "x" * 5000, "x" * 1_000_000,
       "red coat " * 120_000, "ä," * 400_000, [0] * 100_000)


def somewhere(value, rng: random.Random) -> tuple:
    """The way to a random node of a JSON value, a few levels down."""
    below = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    if not below or rng.random() < 0.1:
        return ()
    key, item = rng.choice(below)
    return key, *somewhere(item, rng)


def spoil(value, rng: random.Random) -> tuple[object, str]:
    """A copy of a JSON value with one place changed, and what was done there."""
    whole = [json.loads(json.dumps(value))]
    place = (0, *somewhere(value, rng))
    around = whole
    for key in place[:-1]:
        around = around[key]
    key, odd = place[-1], rng.choice(ODD)
    deed = rng.choice(("replace", "replace", "replace", "delete", "twice", "wrap", "rename"))
    if deed == "delete" and len(place) > 1:
        del around[key]
    elif deed == "twice" and isinstance(around, list) and len(place) > 1:
        around.insert(rng.randrange(len(around) + 1), around[key])
    elif deed == "wrap":
        around[key] = rng.choice((lambda x: [x], lambda x: {"x": x}, str, lambda x: [x, x]))(around[key])
    elif deed == "rename" and isinstance(around, dict):
        around[odd if isinstance(odd, str) else "other"] = around.pop(key)
    else:
        deed, around[key] = "replace", odd
    return whole[0], f"{deed} {'.'.join(map(str, place[1:]))} {quoted(odd) if deed == 'replace' else ''}"


def spoil_bytes(content: bytes, rng: random.Random, within: int = 0) -> tuple[bytes, str]:
    """A copy of some bytes cut short, or changed in a few places (of the first `within`), and what was done."""
    deed = rng.choice(("cut", "flip", "flip", "flip", "fill", "insert", "drop", "nothing left"))
    changed = bytearray(content)
    end = min(within or len(content), len(content))
    at = rng.randrange(end)
    if deed == "cut":
        del changed[at:]
    elif deed == "flip":
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif deed == "fill":
        length = rng.choice((1, 4, 100))
        changed[at:at + length] = bytes([rng.choice((0, 255))]) * len(changed[at:at + length])
    elif deed == "insert":
        changed[at:at] = rng.randbytes(rng.choice((1, 3, 1000)))
    elif deed == "drop":
        del changed[at:at + rng.choice((1, 7, 500))]
    else:
        changed = changed[:rng.choice((0, 0, 1, 8))]
    return bytes(changed), f"{deed} at {at} of {len(content)}"


def text_of(value, rng: random.Random) -> tuple[bytes, str]:
    """JSON as bytes, some of them not as they should be."""
    text = json.dumps(value)
    deed = rng.choice(("plain",) * 6 + ("cut", "deep", "twice", "long number", "utf-16", "latin", "raw", "bom", "tail"))
    if deed == "cut":
        text = text[:rng.randrange(len(text))]
    elif deed == "deep":
        deep = rng.choice((50, 900, 5000, 200_000))
        at, (left, right) = rng.randrange(len(text)), rng.choice(("[]", ("{\"a\":", "}")))
        text = text[:at] + left * deep + right * deep + text[at:]
    elif deed == "twice":         # a key that stands twice: the last one counts, whatever it holds
        text = text.replace('"image_id": ', '"image_id": [], "image_id": ', 1).replace('"id": ', '"id": {}, "id": ', 1)
    elif deed == "long number":
        text = text.replace("1", "1" * rng.choice((20, 400, 5000)), 1)
    elif deed == "tail":
        text += rng.choice(("x", "[]", "\0", "\n\n", ","))
    encoding = {"utf-16": "utf-16", "latin": "latin-1", "bom": "utf-8-sig"}.get(deed, "utf-8")
    if deed == "raw":
        return spoil_bytes(text.encode(), rng)
    return text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"), deed


# ---- annotations

LAYOUTS = {    # annotation file, data set, split it may hold
    "CUHK-PEDES/reid_raw.json": ("cuhk", "file_path", "captions", "id"),
    "ICFG-PEDES/ICFG-PEDES.json": ("icfg", "file_path", "captions", "id"),
    "RSTPReid/data_captions.json": ("rstp", "img_path", "captions", "id"),
    "SDA/sda_0_5000.json": ("sda", "image", "caption", "image_id"),
    "MALS/g_0_attrs.json": ("mals", "image", "caption", "image_id"),
    "finetune/rstp_val.json": ("rstp", "image", "caption", "image_id"),
    "finetune/cuhk_train.json": ("cuhk", "image", "caption", "image_id"),
    "own/train.json": ("own", "image", "caption", "image_id"),
    "own/sda_1.json": ("own", "image", "caption", "image_id"),
}
CAPTIONS = ("A woman in a red coat and blue jeans, a black bag in her left hand.", "He walks; 穿红衣.")


def paint(path: Path, size: tuple[int, int] = (16, 32), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (40 * seed % 256, 90, 160))
    ImageDraw.Draw(image).rectangle((4, 4, 10, 20), (200, 30, 60))
    image.save(path)


def annotations(folder: Path) -> Maker:
    """Every format, read as training and evaluation do, up to a batch."""
    tokenizer, size = Tokenizer.read(), PRESETS["tiny"]
    for name in ("CUHK-PEDES/imgs", "ICFG-PEDES/imgs", "RSTPReid", "SDA", "MALS", "own"):
        for number in range(4):
            paint(folder / name / f"a/{number}.png", seed=number)

    def make(rng: random.Random) -> Case:
        file = rng.choice(list(LAYOUTS))
        dataset, image, caption, identity = LAYOUTS[file]
        several = caption == "captions" or dataset == "own" and rng.random() < 0.5
        split = "val" if "val" in file else "train"
        rows = [{image: f"a/{number}.png", identity: number // 2, "split": split if number < 3 else "test",
                 caption: list(CAPTIONS) if several else CAPTIONS[number % 2]} for number in range(4)]
        if dataset == "sda" or "own/sda" in file:
            rows = [row | {"boxes": [[0.5, 0.5, 0.5, 0.9], [0.5, 0.2, 0.2, 0.2]], "logits": [0.5, 0.7],
                           "phrases": ["a red coat", "a bag"]} for row in rows]
        deeds = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rows, deed = spoil(rows, rng)
            deeds.append(deed)
        content, deed = text_of(rows, rng)
        for other in LAYOUTS:
            (folder / other).unlink(missing_ok=True)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        name = str(folder / "own") if dataset == "own" else dataset
        settings = TrainConfig(eda=0.8, regions=rng.random() < 0.8)

        def read() -> None:
            if rng.random() < 0.1:
                check_set(name, folder, tokenizer, size.max_tokens, 1, lambda line: None)
                return
            found = load(name, split, folder, rng.random() < 0.5, lambda line: None)
            pairs = PairDataset(found, tokenizer, size, settings)
            pairs.collate([pairs[0, index] for index in range(min(3, len(pairs)))])
            captions, _, paths, _ = queries_of(found, tokenizer)
            words.noun_phrases(captions[0])
            if rng.random() < 0.1:
                cells = [(open_image(paths[0]).resize(pictures.CELL), pictures.GREEN, "a phrase")]
                pictures.table([(captions[0], cells)], folder / "picture.png")

        return Case(f"{file}: {'; '.join(deeds)}; {deed}", Path(file).parts[0], read, (
            "train.py", "--dataset", name, *((() if dataset == "own" else ("--data-root", str(folder)))), "--init",
            "none", "--preset", "tiny", "--steps", "1", "--device", "cpu", "--out", str(folder / "out"), "--no-resume"))
    return make


# ---- images

def valid_images(folder: Path) -> dict[str, bytes]:
    """Small valid files of every format that is read, some with more in them than pixels."""
    photo = Image.effect_noise((24, 40), 60).convert("RGB")
    frames = [photo.rotate(90 * i) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {"a.jpg": dict(exif=exif), "progressive.jpg": dict(progressive=True), "a.png": {}, "a.bmp": {},
            "a.tif": dict(compression="tiff_lzw"), "deflate.tif": dict(compression="tiff_adobe_deflate"), "a.webp": {},
            "a.ppm": {}, "a.jp2": {}, "a.gif": dict(save_all=True, append_images=frames),
            "moving.webp": dict(save_all=True, append_images=frames),
            "moving.png": dict(save_all=True, append_images=frames), "exif.png": dict(exif=exif)}
    for name, options in made.items():
        photo.save(folder / name, **options)
    for mode, name in (("L", "l.png"), ("P", "p.png"), ("1", "1.png"), ("RGBA", "rgba.png"), ("LA", "la.png"),
                       ("I;16", "16.png"), ("CMYK", "cmyk.jpg"), ("CMYK", "cmyk.tif"), ("F", "f.tif"), ("I", "i.tif"),
                       ("P", "p.gif"), ("YCbCr", "y.tif"), ("LAB", "lab.tif"), ("RGBA", "rgba.webp")):
        grey = photo.convert("L")
        (grey.convert("I").convert(mode) if mode == "I;16" else Image.new("LAB", (9, 9)) if mode == "LAB"
         else photo.convert(mode) if mode in ("L", "P", "1", "RGBA", "CMYK", "YCbCr") else grey.convert(mode)
         ).save(folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def resized_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A PNG, GIF or BMP that claims another size."""
    width, height = (rng.choice((0, 1, 7, 20_000, 65_535, 2**31 - 1)) for _ in range(2))
    changed = bytearray(content)
    if content.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(bytes(changed[12:29])))
    elif content.startswith(b"GIF"):
        changed[6:10] = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
    elif content.startswith(b"BM"):
        changed[18:26] = struct.pack("<ii", width, rng.choice((height, -height)))
    elif content.startswith(b"P6"):
        changed = bytearray(content.replace(b"24 40", f"{width} {height}".encode(), 1))
    return bytes(changed), f"a header of {width} x {height}"


def large(rng: random.Random) -> tuple[bytes, str]:
    """A whole picture of an odd size, up to the limit and just beyond, in a random mode."""
    size = rng.choice(((1, 1), (1, 20_000), (20_000, 1), (20_000, 2_500), (3, 60_000), (7_000, 7_142), (20_000, 2_501)))
    mode, kind = rng.choice((("RGB", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("I;16", "PNG"),
                             ("L", "JPEG"), ("1", "TIFF"), ("RGB", "JPEG"), ("RGB", "TIFF"), ("LA", "PNG"),
                             ("CMYK", "TIFF"), ("RGB", "JPEG2000")))
    if kind in ("JPEG2000", "GIF") and size[0] * size[1] > 10**6:     # takes long to write
        kind, mode = "PNG", "RGB"
    packed = io.BytesIO()
    options = {"compress_level": 1} if kind == "PNG" else {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    Image.new(mode, size).save(packed, kind, **options)
    return packed.getvalue(), f"{kind} {mode} of {size}"


def images(folder: Path) -> Maker:
    """Decoded and put before the model in every way that one is; and through a folder of photographs."""
    whole, target = valid_images(folder / "valid" if (folder / "valid").mkdir() is None else folder), folder / "photos"
    target.mkdir()

    def make(rng: random.Random) -> Case:
        shutil.rmtree(target)
        target.mkdir()
        origin = rng.choice(sorted(whole))
        content, kind = whole[origin], rng.random()
        if kind < 0.03:
            content, deed = large(rng)
        elif kind < 0.13:
            content, deed = resized_header(content, rng)
        elif kind < 0.16:
            content, deed = rng.choice((b"<html>404</html>", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0",
                                        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"[]")), "no image"
        else:
            content, deed = spoil_bytes(content, rng, rng.choice((0, 0, 64)))
        name = rng.choice((origin, origin, "x.jpg", "x.png", "x\x1b[31m.gif", "a b'\".webp", "x\n.tif", "\u202e.png"))
        path = target / name
        path.write_bytes(content)

        def read() -> None:
            if rng.random() < 0.2:
                for photograph in gallery.photographs(target, lambda line: None):
                    examined(photograph)
                return
            image = open_image(str(path))
            augment.tensor_of(image, (32, 16))
            augment.pretrain_view(image, (0.5, 0.5, 0.3, 0.3), (32, 16), rng)
            augment.finetune_view(image, (32, 16), rng, 0.6)
            read_images([str(path)], DiffusionConfig(32, 16, 4, (16,), 4, (16,), 2, 32, 1, 2))
            image.resize(pictures.CELL)

        return Case(f"{origin} as {name!r}: {deed}", repr(str(path)), read)
    return make


# ---- checkpoints

class Evil:
    """What no reader may run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Files of every kind before they are spoilt, and what reads them: tensors and facts by kind, and a small model."""

    folder: Path
    files: dict[str, tuple[dict[str, torch.Tensor], dict]]
    model: Retriever

    def loop(self, path: Path) -> Loop:
        """The training that the state at `path` belongs to."""
        config = TrainConfig(preset="tiny", init="none")
        key = stages.key_of(config, MACHINE, torch.nn.Linear(0, 0), Tokenizer.read(), [])
        task = Task("", self.model, Fit(7, 40, 0.1, average=0.0), 0, path, key=key,
                    param_groups=stages.param_groups(self.model, config), advice=stages.ADVICE)
        return Loop(task, None, MACHINE)

    def reader(self, kind: str, path: Path) -> Callable[[], object]:
        """What the scripts do with a file of that kind."""
        photo = str(self.folder / "photos/1.png")

        def ask() -> None:
            found, own_tokenizer, said = retrievers.load_retriever(path, CPU)
            f"{said['train']['dataset'] or ''} {said['pretrained_on']} {said['train']['seed']}"
            weight = said["val"].get("weight", 0.0)
            search(found, own_tokenizer, ["a man in a red coat"], [photo] * 3, Settings(2)).reranked(weight)
            if dataclasses.asdict(self.model.config) == said["model"]:
                stages.load_model(TrainConfig(preset="tiny", init=str(path)), MACHINE)

        return {"best": ask, "last": lambda: self.loop(path),
                "gallery": lambda: gallery.encode("photos", [str(self.folder / "photos/1.png")], self.model, path,
                                                  Settings(0, batch=4), say=lambda line: None),
                "base": lambda: load_base(AdaptConfig(size="tiny", base=str(path)), MACHINE).encode_text(["a man"]),
                "bert": lambda: retrievers.start(PRESETS["tiny"], str(path), "", str(VOCAB_FILE)),
                "vit": lambda: retrievers.start(PRESETS["tiny"], "", str(path), str(VOCAB_FILE))}[kind]


def whole_files(folder: Path) -> Whole:
    """A file of each kind: ours, the optimiser's, the embeddings', DaD's, BERT's, a ViT's."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.read()
    model = Retriever(dataclasses.replace(PRESETS["tiny"], vocab=len(tokenizer)))
    size = DiffusionConfig(32, 16, 4, (16,), 4, (16,), 2, 32, 1, 2, vocab=len(tokenizer))
    base = Diffusion.new(size, tokenizer)
    settings = dataclasses.asdict(TrainConfig(preset="tiny", init="none"))
    whole = Whole(folder, {}, model)
    loop = whole.loop(folder / "none")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    result = {"embeddings": {"R@1": 1.0, "mAP": 2.0}, "selected_by": [True, 1.5], "weight": 2.0}
    facts = retrievers.model_facts(model, tokenizer) | {
        "train": settings, "pretrained_on": "sda", "val": result, "pairs": 7, "processes": 1, "step": 3}
    own = checkpoint.weights(model)
    paint(folder / "photos/1.png")
    gallery.encode("photos", [str(folder / "photos/1.png")], model.eval(), folder / "valid.gallery",
                   Settings(0, batch=4), say=lambda line: None)
    whole.files.update({
        "best": (own, facts),
        "last": (checkpoint.state(model, loop.optimizer), {"key": loop.key, "step": 3, "evaluated": False,
                                                           "results": {"val": result, "best": result}}),
        "gallery": checkpoint.load(folder / "valid.gallery"),
        "base": (checkpoint.weights(base), {"size": dataclasses.asdict(base.config), "vocab": tokenizer.pieces,
                                            "images": 3, "source": "sda"}),
        "bert": (Bert(len(tokenizer)).released_names(), {}),
        "vit": (VisionTransformer(32, 8, 1, 2, 32, 64).state_dict(), {}),
    })
    return whole


def odd_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Of another type, shape or size."""
    return rng.choice((lambda t: t.to(torch.int64), lambda t: t.bool(), lambda t: t.half(), lambda t: t[None],
                       lambda t: t.flatten(), lambda t: t * torch.nan, lambda t: torch.zeros(0),
                       lambda t: torch.zeros(2, 3), lambda t: t.to(torch.complex64), lambda t: t * 1e30,
                       lambda t: t.to(torch.float8_e5m2), lambda t: torch.zeros(())))(tensor.detach()).clone()


def spoil_tensors(tensors: dict[str, torch.Tensor], deed: str, rng: random.Random) -> dict[str, torch.Tensor]:
    """One of them odd, under another name, or missing, as `deed` says."""
    tensors, chosen = dict(tensors), rng.choice(sorted(tensors))
    if deed == "tensor":
        tensors[chosen] = odd_tensor(tensors[chosen], rng)
    elif deed == "name":
        tensors[str(rng.choice(ODD))[:100] + rng.choice(("", "optimizer.", chosen))] = tensors.pop(chosen)
    elif deed == "missing":
        del tensors[chosen]
    return tensors


def write_weights(path: Path, tensors: dict[str, torch.Tensor], said: dict, deed: str, mark: Path, model: Retriever,
                  rng: random.Random) -> None:
    """A safetensors file, or a pickled one that may also hold what must not be run."""
    if path.suffix == ".safetensors":
        text = text_of(said, rng)[0].decode("utf-8", "replace") if deed == "metadata" else json.dumps(said)
        names = {name.encode("utf-8", "replace").decode(): tensor for name, tensor in tensors.items()}
        return save_file(names, path, metadata={"mra": text})
    content = rng.choice((tensors, {"model": tensors}, {"model": tensors, "config": Evil(mark)}, Evil(mark),
                          [Evil(mark)], {"model": Evil(mark)}, {"model": tensors, "lr": 3}, tensors | {"x": 1},
                          model, [tensors], {1: tensors}, {"model": {"a": [1]}}))
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def write_sizes(folder: Path, rng: random.Random) -> None:
    """The config.json beside a BERT, now and then spoilt."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    if rng.random() < 0.2:
        sizes = spoil(sizes | {"hidden_act": "gelu"}, rng)[0]
    said = text_of(sizes, rng)[0] if rng.random() < 0.1 else json.dumps(sizes).encode()
    (folder / "config.json").write_bytes(said)


def checkpoints(folder: Path) -> Maker:
    """Ours, the optimiser's, the embeddings', DaD's, BERT's and the released: spoilt in facts, tensors and bytes."""
    whole, mark = whole_files(folder), folder / "it was run"

    def make(rng: random.Random) -> Case:
        kind = rng.choice(list(whole.files))
        run_folder = folder / "run"
        shutil.rmtree(run_folder, ignore_errors=True)
        run_folder.mkdir()
        write_sizes(run_folder, rng)
        (run_folder / "best.safetensors").touch()
        tensors, said = whole.files[kind]
        deed = rng.choice(("facts",) * 3 + ("metadata", "bytes", "header", "tensor", "name", "missing", "pickle"))
        pickled = deed == "pickle" or kind in ("bert", "vit") and rng.random() < 0.5
        suffix = rng.choice((".bin", ".pth")) if pickled else ".safetensors"
        path, tensors = run_folder / f"{kind}{suffix}", {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        if deed == "facts" and kind == "best":      # what says how to make the model; the scripts trust the rest
            name = rng.choice(("model", "vocab"))
            value, how = spoil(said[name], rng)
            said, deed = said | {name: value}, f"facts: {name}: {how}"
        elif deed == "facts":
            for _ in range(rng.choice((1, 1, 2))):
                said, how = spoil(said, rng)
            deed = f"facts: {how}"
        write_weights(path, spoil_tensors(tensors, deed, rng), said, deed, mark, whole.model, rng)
        if deed in ("bytes", "header", "pickle") and (deed != "pickle" or rng.random() < 0.6):
            content, how = spoil_bytes(path.read_bytes(), rng, 4000 if deed == "header" else 0)
            path.write_bytes(content)
            deed += f": {how}"
        read_as = kind if suffix == ".safetensors" or kind in ("bert", "vit") else "best"

        def read() -> None:
            torch.manual_seed(0)
            try:
                whole.reader(read_as, path)()
            finally:
                assert not mark.exists(), "code in the file was run"
        asked = ("evaluate.py", "--checkpoint", str(path), "--query", "a man in a red coat", "--gallery",
                 str(folder / "photos"), "--device", "cpu", "--out", str(run_folder / "out"))
        if kind == "base":
            asked = ("adapt.py", "--size", "tiny", "--base", str(path), "--images", "2", "--steps", "1",
                     "--device", "cpu", "--malformed", "0", "--out", str(run_folder / "out"))
        return Case(f"{path.name}: {deed}", str(run_folder), read, asked if kind in ("best", "base") else ())
    return make


# ---- vocabularies

def vocab(folder: Path) -> Maker:
    """BERT's file of pieces, and what is then done with words."""
    pieces = VOCAB_FILE.read_text(encoding="utf-8").splitlines()

    def make(rng: random.Random) -> Case:
        some, path = list(pieces), folder / "vocab.txt"
        deed = rng.choice(("missing", "twice", "odd", "swap", "short", "bytes", "encoding", "ends"))
        deed = "huge" if rng.random() < 0.01 else deed
        at = rng.randrange(len(some))
        if deed == "missing":
            some.remove(rng.choice(SPECIAL))
        elif deed == "twice":
            some.insert(at, rng.choice(some))
        elif deed == "odd":
            some[at:at] = [str(rng.choice(ODD)) for _ in range(3)]
        elif deed == "swap":
            rng.shuffle(some)
        elif deed == "short":
            some = [*SPECIAL, *rng.sample(some, rng.choice((0, 1, 5)))]
        elif deed == "huge":
            some += [f"{number}x" for number in range(300_000)]
        text = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n", " \n")).join(some) + rng.choice(("\n", "", "\n\n"))
        encoding = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig")) if deed == "encoding" else "utf-8"
        content = text.encode(encoding, "surrogatepass" if deed != "encoding" else "replace")
        if deed == "bytes":
            content, deed = spoil_bytes(content, rng)
        path.write_bytes(content)

        def read() -> None:
            tokenizer = Tokenizer.read(path)
            for text in (*CAPTIONS, "", str(rng.choice(ODD))):
                ids = tokenizer.encode(text)
                mask_words(ids, tokenizer, rng)
                [tokenizer.pieces[i] for i in ids]

        return Case(deed, str(path), read, (
            "train.py", "--dataset", "icfg", "--preset", "tiny", "--init", "none", "--vocab", str(path), "--steps", "1",
            "--device", "cpu", "--out", str(folder / "out"), "--no-resume"))
    return make


# ---- flags

SCRIPTS = {     # configuration, the check of its values, a command that is quick
    "train.py": (TrainConfig, stages.check, ("--preset", "tiny", "--init", "none", "--steps", "1", "--device",
                                             "cpu")),
    "evaluate.py": (EvalConfig, evaluate.check, ("--device", "cpu", "--checkpoint", "none.safetensors")),
    "adapt.py": (AdaptConfig, adapt.check, ("--size", "tiny", "--steps", "1", "--images", "2", "--device", "cpu",
                                            "--malformed", "0")),
    "-m tests.study": (study.StudyConfig, None, ("--table",)),
    "-m tests.study.town": (town.TownConfig, None, ("--people", "0.001", "--workers", "1", "--sets", "icfg")),
}
SLOW = {"--steps", "--epochs", "--images", "--people", "--train-base", "--sampling-steps", "--preset", "--size",
        "--workers", "--batch", "--accumulate", "--evals", "--no-table", "--sets", "--check", "--quick"}


def flags(folder: Path) -> Maker:
    """One flag or two of a script with values of the wrong type, out of range, or at odds with one another."""
    def value(kind: type, rng: random.Random) -> list[str]:
        numbers = ("0", "-1", "1", "0.5", "1e9", "1e-9", "nan", "inf", "-inf", "1e400", "99999999999999999999", "0x10",
                   "١", "1_000", "1,5", "four", "", " ", "2147483648")
        odd = [text for text in ODD if isinstance(text, str) and "\0" not in text and len(text) <= 5000]
        texts = ("none", "icfg", "cuda", "tpu", "bf16", "tiny", "base", ".", "none.safetensors", *odd)
        chosen = rng.choice(numbers if kind in (int, float) and rng.random() < 0.9 else (*texts, *numbers))
        return [chosen] * rng.choice((1, 1, 1, 0, 2))

    def make(rng: random.Random) -> Case:
        script = rng.choice(list(SCRIPTS))
        config, check, quick = SCRIPTS[script]
        given, named = [], []
        for _ in range(rng.choice((1, 1, 2))):
            field = rng.choice(dataclasses.fields(config))
            flag = "--" + field.name.replace("_", "-")
            flag = rng.choice((flag,) * 8 + ("--no-" + flag[2:], flag[:-1], flag + "x", flag.replace("-", "_")))
            kind = typing.get_type_hints(config)[field.name]
            given += [flag, *(value(kind, rng) if kind is not bool or rng.random() < 0.2 else ())]
            named.append(flag)

        def read() -> None:
            found = parse(config, "", given, (lambda some: recipe(some.dataset, some.preset))
                          if config is TrainConfig else lambda some: {})
            if check:
                check(found)

        usable = not SLOW & set(named) and "--help" not in given
        return Case(f"{script} {' '.join(given)!r}", "", read, (*script.split(), *quick, *given) if usable else ())
    return make


# ---- the judge

KINDS = {"annotations": annotations, "images": images, "checkpoints": checkpoints, "vocab": vocab, "flags": flags}


class Overdue(BaseException):
    """A case took too long; no `except Exception` holds it."""


@contextlib.contextmanager
def limits():
    """No more than BYTES above what there is now, no more than twice SECONDS of wall clock."""
    def late(number, frame):
        raise Overdue

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def verdict(case: Case, status: int, out: str, err: str, seconds: float) -> str:
    """"read" or "refused", or what is wrong with how a case ended."""
    if seconds > SECONDS:
        return f"{seconds:.1f} seconds"
    if status == 0 and not re.search("[\x00-\x08\x0b-\x1f\x7f\x9b\u202e]", out + err):
        return "read"
    if status != 2 or not re.fullmatch(r"error: \S.*\S\n", err):
        return f"exit status {status}: {err[-3000:]!r}"
    if err.startswith("error: out of memory"):
        return err[:500]
    if not err[:-1].isprintable() or len(err) > LETTERS:
        return f"not fit for a terminal, {len(err)} characters: {err[:500]!r}"
    if case.names not in err:
        return f"does not name {case.names}: {err!r}"
    return "refused"


def judge(case: Case) -> str:
    """How a case ends in this process."""
    out, err, status, began = io.StringIO(), io.StringIO(), 0, time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits():
            run(case.read)
    except SystemExit as end:
        status = end.code
        if status == 130:       # it is this process that is asked to stop
            raise KeyboardInterrupt from end
    except (Exception, Overdue) as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        return (f"{type(error).__name__}: {str(error)[:300]} in {trace.tb_frame.f_code.co_filename.split('/')[-1]}, "
                f"line {trace.tb_lineno}")
    return verdict(case, status, out.getvalue(), err.getvalue(), time.process_time() - began)


def judge_command(case: Case, folder: Path) -> str:
    """How it ends as a command, in a process of its own with a limit to its memory; seconds of its CPU time."""
    script = case.command if case.command[0] == "-m" else (str(ROOT / case.command[0]), *case.command[1:])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, *script], cwd=folder, capture_output=True, timeout=300,
                         env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = after.ru_maxrss * 1024
    if peak > BYTES:
        return f"{peak / 2**30:.1f} GiB"
    seconds = after.ru_utime - before.ru_utime - 8      # what importing PyTorch, drawing and training take
    return verdict(case, ran.returncode, *(text.decode(errors="replace") for text in (ran.stdout, ran.stderr)), seconds)


def fuzz(kind: str, numbers: range, seed: int, commands: int, folder: Path, say: Callable = print) -> Counter:
    """All cases of a kind; how they ended. What should not be is told at once."""
    folder.mkdir()
    make, ended, spent = KINDS[kind](folder), Counter(), commands
    every = max(1, len(numbers) // max(1, commands))
    for number in numbers:
        case = make(random.Random(f"{kind}-{seed}-{number}"))
        ways = {"": judge}
        if spent and case.command and number % every == 0:
            ways["as a command: "], spent = lambda case: judge_command(case, folder.parent), spent - 1
        for way, end in ways.items():
            found = end(case)
            ended[found if found in ("read", "refused") else "wrong"] += 1
            if found not in ("read", "refused"):
                say(f"{kind} {number} (seed {seed}), {case.what[:300]!r}: {way}{found}", flush=True)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", type=int, default=10, help="cases of each kind that also go through a command")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        for kind in given.only:
            began = time.process_time()
            ended = fuzz(kind, range(given.first, given.first + given.cases), given.seed, given.commands,
                         Path(place) / kind)
            wrong += ended["wrong"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{kind}: {given.cases} cases, {ended['read']} read, {ended['refused']} refused, {ended['wrong']} "
                  f"wrong; {time.process_time() - began:.0f} s of CPU, {peak:.2f} GiB at most so far", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
