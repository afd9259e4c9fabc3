"""What several test files share: the packaged vocabulary, a tiny retriever, a batch, painted images, a tiny set."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import succeed

from mra import config as configuration
from mra.config import PRESETS, ModelConfig
from mra.data.batches import Batch
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever
from mra.town import sets


def pytest_collection_finish():
    """What fresh processes are forked from (processes.py) imports all that they need while the first tests run."""
    if "processes" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def own_loading():
    """The recipes of `tiny` load images in the run's own process: another one takes longer to start than the loading.

    Tests of loading processes give --workers.
    """
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("pretrain", "finetune"):
            patch.setitem(configuration.DEMO[kind], "workers", 0)
        yield


@pytest.fixture(scope="session")
def in_town(tmp_path_factory) -> Callable[[str], Path]:
    """Make a working directory that has the tiny sets of the demo town, which are drawn once."""
    town = tmp_path_factory.mktemp("demo")
    with contextlib.chdir(town):
        for name in ("sda", "cuhk", "icfg", "rstp"):
            sets.ready(name, True, lambda line: None)

    def make(name: str) -> Path:
        return Path(shutil.copytree(town, tmp_path_factory.mktemp(name), dirs_exist_ok=True))
    return make


@pytest.fixture(scope="session")
def adapted(in_town) -> tuple[Path, str]:
    """Where `adapt.py` has made a tiny set of 70 images, and what it printed. Not to be changed."""
    folder = in_town("adapted")
    return folder, succeed(folder, "adapt.py", "--size", "tiny", "--precision", "float32", "--images", "70",
                           "--malformed", "0")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.read()


def spelt(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Whole words, their pieces joined; [PAD], [CLS] and [SEP] are left out."""
    left_out = tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id
    return " ".join(tokenizer.pieces[i] for i in ids if i not in left_out).replace(" ##", "").split()


@pytest.fixture(scope="session")
def config(tokenizer) -> ModelConfig:
    """The tiny preset with two layers an encoder, and image and text widths that cannot be confused."""
    return dataclasses.replace(PRESETS["tiny"], vocab=len(tokenizer), dropout=0.0, image_dim=24,
                               image_depth=2, text_depth=2, fusion_depth=2)


@pytest.fixture
def model(config) -> Retriever:
    """Weights of twice the usual size: what the tests compare is then far from constant."""
    torch.manual_seed(0)
    model = Retriever(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05 * (parameter.ndim > 0)
            parameter *= 2 if parameter.ndim > 1 else 1
    return model


@pytest.fixture
def batch(config) -> Batch:
    """Four pairs of four people with everything a Batch can hold; captions of 12, 10, 8 and 6 tokens."""
    generator = torch.Generator().manual_seed(1)

    def words(length: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.arange(length) < length - step * torch.arange(4)[:, None]
        return torch.randint(5, config.vocab, (4, length), generator=generator) * keep, keep

    (caption, keep), (eda, eda_keep), (phrase, phrase_keep) = words(12, 2), words(11, 2), words(6, 1)
    at = torch.tensor([[1, 3, 0], [2, 0, 0], [1, 4, 5], [2, 3, 0]])
    labels = caption.gather(1, at).where(at > 0, -100)
    regions = torch.zeros(4, math.prod(config.grid), dtype=torch.bool)
    for row, patches in enumerate(([0, 1], [2, 3, 4, 5], [7], [0, 2, 4, 6])):
        regions[row, patches] = True
    image = torch.randn(4, 3, config.height, config.width, generator=generator)
    masked = caption.scatter(1, at, 4).where(keep, 0)
    return Batch(image, torch.arange(4), caption, keep, masked, at, labels, eda, eda_keep, regions, phrase,
                 phrase_keep, torch.tensor([7, 8, 9, 10]))


@pytest.fixture
def paint(tmp_path) -> Callable[..., str]:
    """Write a small PNG, noise of a seed or one colour for each half, and return its path."""
    def write(name: str, seed: int = 0, left: tuple | None = None, right: tuple | None = None) -> str:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 20, 3), np.uint8)
        if left and right:
            pixels[:, :10], pixels[:, 10:] = left, right
        path = Path(tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return str(path)
    return write


@pytest.fixture
def root(tmp_path, paint) -> Path:
    """A CUHK-PEDES of three people and two photographs each, the same for train, val and test."""
    records = []
    for split in ("train", "val", "test"):
        for person in range(3):
            for view in range(2):
                name = f"{split}/{person}_{view}.png"
                paint(f"CUHK-PEDES/imgs/{name}", seed=person)
                records.append({"split": split, "file_path": name, "id": len(records) // 2 + 1,
                                "captions": [f"a man with {person} bags on his left", "a woman in black"]})
    (tmp_path / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(records))
    return tmp_path
