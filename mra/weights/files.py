"""Files of weights from elsewhere, read strictly: every tensor is used or dropped by name, every shape must agree.

`named` gives the tensors our names, `fill` copies them into a model. Errors name a tensor by our name. No pickle is
executed beyond tables of tensors. Read next: retrievers.py, stable.py.
"""

import configparser
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mra.config import UserError
from mra.run import checkpoint

FILES = [f"{stem}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")
         for stem in ("model", "pytorch_model", "diffusion_pytorch_model")]
USUAL_HEADS = {512: 8, 768: 12, 1024: 16, 1280: 16}      # CLIP's text; BERT and ViT, base and large; vit_h_14


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of the first of FILES in a folder. Raises UserError for anything else."""
    path = next((path / name for name in FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights, and no folder with one of {', '.join(FILES)}.")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):
                found = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "state_dict", "model_state_dict"):
            found = found.get(name, found)
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()):
            raise TypeError("not all of it are named tensors")
    except Exception as error:      # broken files raise almost every type
        raise UserError(f"{path} cannot be read as weights ({type(error).__name__}): it is broken, holds other "
                        "objects than tensors, or is a TorchScript archive, which holds code; in place of OpenAI's "
                        "CLIP give Hugging Face's folder, or open_clip's safetensors file.") from error
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}     # DataParallel adds it


def named(given: dict[str, Tensor], path: Path, *kinds: str) -> dict[str, Tensor]:
    """The tensors of the file `path` under our names, by the rules of `kinds` and then of "block" in names.ini."""
    rules = configparser.RawConfigParser(delimiters=("->",))
    rules.optionxform = str         # upper and lower case differ
    rules.read(Path(__file__).with_name("names.ini"))
    found = {}
    for name, tensor in given.items():
        for kind in (*kinds, "block"):
            for pattern, put in rules[kind].items():
                name = re.sub(pattern, put, name)
        if name in found:
            raise UserError(f"{path}: {name} is there twice, under two names.")
        if name:
            found[name] = tensor
    with checkpoint.trusting(path):
        for name in [name for name in found if ".to_all." in name]:         # torchvision's
            parts = zip(("to_query", "to_key", "to_value"), found.pop(name).chunk(3))
            found |= {name.replace("to_all", part): tensor for part, tensor in parts}
        for name in [name for name in found if ".to_key." in name]:         # keys and values are one tensor of ours
            value = name.replace("to_key", "to_value")
            if value in found:
                found[name.replace("to_key", "to_keys_values")] = torch.cat([found.pop(name), found.pop(value)])
    return found


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, parts: Iterable[str] = ("",)) -> None:
    """Copy the tensors of a file into the model; what the file does not have stays as it is.

    `parts` are patterns of the beginnings of names. The file has all tensors of a part, or none. Raises UserError for a
    tensor that is missing, unknown, of another shape or not finite.
    """
    there = "|".join(part for part in parts if any(re.match(part, name) for name in tensors))
    stays = {name: tensor for name, tensor in checkpoint.weights(model).items() if not re.match(there, name)}
    checkpoint.restore_weights(model, stays | tensors, path)


def heads_of(path: Path, dim: int, part: str = "", activation: str = "gelu") -> int:
    """Attention heads, which no tensor shows: as `part` of config.json beside the weights says, or usual for `dim`."""
    beside, said = folder_of(path) / "config.json", {}
    with checkpoint.trusting(beside):
        if beside.is_file():
            said = json.loads(beside.read_text())
            said = said.get(part, said)
        heads = int(said.get("num_attention_heads", USUAL_HEADS.get(dim, 0)))
    if said.get("hidden_act", activation) != activation:        # no tensor shows it either
        raise UserError(f"{path}: its activation is {said['hidden_act']}; only {activation} will do.")
    if heads < 1 or dim % heads:
        raise UserError(f"{path}: put its config.json, which tells the number of attention heads, beside it.")
    return heads


def folder_of(path: Path) -> Path:
    """The folder that a path to weights names, or that the file lies in."""
    return path if path.is_dir() else path.parent


def read_vocabulary(kind: type, vocab: str, weights: Path, size: int):
    """A tokenizer of class `kind` of `vocab`, else of what lies beside the weights. Raises UserError if none fits."""
    place = Path(vocab) if vocab else folder_of(weights)
    try:
        tokenizer = kind.read(place)
    except UserError as error:
        raise UserError(f"{weights} needs a vocabulary, beside it or by --vocab: {error}") from None
    if len(tokenizer) != size:
        raise UserError(f"{place} has {len(tokenizer)} pieces and {weights} {size}: they do not belong together.")
    return tokenizer


def depth_of(tensors: dict[str, Tensor], blocks: str) -> int:
    """The number of blocks whose tensors' names begin with `blocks`."""
    return len({name.removeprefix(blocks).split(".")[0] for name in tensors if name.startswith(blocks)})


def fit_positions(tensors: dict[str, Tensor], grid: tuple[int, int], mode: str) -> None:
    """Fit an image encoder's positions (1+N, D) to our `grid`, and add the first of them to the class token."""
    first, rest = tensors["image_encoder.positions"].float().squeeze(0).tensor_split([1])     # (1, D), (N, D)
    class_token = tensors["image_encoder.class_token"].view_as(first)        # a narrower one would be broadcast
    tensors["image_encoder.class_token"] = (class_token + first)[None]
    tensors["image_encoder.positions"] = resized_grid(rest, grid, mode)[None]


def resized_grid(table: Tensor, to: tuple[int, int], mode: str, corners: bool = False) -> Tensor:
    """A table (N, D) of a square grid -> of one of `to` rows and columns. With `corners` the corners of both coincide.

    A table that is not square is ours already, and stays as it is.
    """
    side = math.isqrt(len(table))
    if side ** 2 != len(table) or to == (side, side):
        return table
    square = table.T.unflatten(1, (side, side))[None]                        # (1, D, side, side)
    return F.interpolate(square, to, mode=mode, align_corners=corners)[0].flatten(1).T
