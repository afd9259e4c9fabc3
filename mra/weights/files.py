"""Files of weights from elsewhere, read strictly: every tensor is used or dropped by name, every shape must agree.

`named` gives the tensors our names, `fill` copies them into a model. Errors name a tensor by our name. No pickle is
executed beyond tables of tensors. Read next: retrievers.py, stable.py.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mra.config import UserError
from mra.run import checkpoint

FILES = [f"{stem}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")
         for stem in ("model", "pytorch_model", "diffusion_pytorch_model")]
USUAL_HEADS = {768: 12, 1024: 16, 1280: 16}      # BERT and ViT, base and large; torchvision's vit_h_14
BLOCK_RULES = (         # parts of a transformer block in BERT, CLIP, Stable Diffusion and the ViTs
    (r"\.(self_attn|self_attention|attention\.attention)\.", ".attention."), (r"\.in_proj_", ".to_all."),
    (r"\.(to_q|q_proj|query|self\.query)\.", ".to_query."), (r"\.(to_k|k_proj|key|self\.key)\.", ".to_key."),
    (r"\.(to_v|v_proj|value|self\.value)\.", ".to_value."), (r"\.(to_out\.0|out_proj|proj_attn)\.", ".to_out."),
    (r"\.(attention|cross)\.output\.dense\.", r".\1.to_out."),
    (r"\.(ln_1|layer_norm1|layernorm_before)\.", ".attention_norm."),
    (r"\.(ln_2|layer_norm2|layernorm_after)\.", ".mlp_norm."),
    (r"\.(mlp\.linear_1|mlp\.fc1|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(mlp\.linear_2|mlp\.fc2|output\.dense)\.", ".mlp.2."))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights; a .pth or .bin may hold them under "model". Raises UserError for all else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("model", found)
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()):
            raise TypeError("not all of it are named tensors")
        return found
    except Exception as error:      # broken files raise almost every type
        raise UserError(f"{path} cannot be read as weights: it is broken, or is no table of tensors "
                        f"({type(error).__name__}).") from error


def named(path: Path, rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors of a file under our names.

    `rules`, then BLOCK_RULES, are patterns in a name and what takes their place, one after another. A name that becomes
    empty is dropped. The keys and values of an attention become one tensor, as ours are.
    """
    found = {}
    for name, tensor in read(path).items():
        ours = name
        for pattern, put in (*rules, *BLOCK_RULES):
            ours = re.sub(pattern, put, ours)
        if ours and found.setdefault(ours, tensor) is not tensor:
            raise UserError(f"{path}: {name} is there twice, once under another name.")
    with fitting(path):
        for name in list(found):
            if ".to_all." in name:      # torchvision's
                query, key, value = found.pop(name).chunk(3)
                found[name.replace("to_all", "to_query")] = query
                found[name.replace("to_all", "to_keys_values")] = torch.cat([key, value])
            value = name.replace("to_key", "to_value")
            if ".to_key." in name and value in found:
                both = torch.stack([found.pop(name), found.pop(value)]).flatten(0, 1)
                found[name.replace("to_key", "to_keys_values")] = both
    return found


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, parts: Iterable[str] = ("",)) -> None:
    """Copy the tensors of a file into the model; what the file does not have stays as it is.

    `parts` are patterns of the beginnings of names. The file has all tensors of a part, or none. Raises UserError for a
    tensor that is missing, unknown, of another shape or not finite.
    """
    own = checkpoint.weights(model)
    there = [part for part in parts if any(re.match(part, name) for name in tensors)]
    wanted = {name for name in own if re.match("|".join(there), name)}
    missing, unknown = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing, so these are not the weights they should be.")
    if unknown:
        raise UserError(f"{path}: there is no place for {unknown[0]}, one of {len(unknown)} unknown tensors.")
    checkpoint.restore_weights(model, own | tensors, path)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raises UserError where the tensors of a file are put together and one is missing or has an odd shape."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing, so these are not the weights they should be.") from error
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:
        raise UserError(f"{path}: the shapes of its tensors do not fit together.") from error


def heads_of(path: Path, dim: int) -> int:
    """Attention heads, which no tensor shows: as config.json beside the weights says, or those usual for the width."""
    beside, said = path.with_name("config.json"), {}
    with checkpoint.trusting(beside):
        if beside.is_file():
            said = json.loads(beside.read_text())
        if said.get("hidden_size") != dim:      # it belongs to other weights
            said = {}
        heads = int(said.get("num_attention_heads", USUAL_HEADS.get(dim, 0)))
    if said.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: its activation is {said['hidden_act']}; only gelu will do.")
    if heads < 1 or dim % heads:
        raise UserError(f"{path}: put its config.json, which tells the number of attention heads, beside it.")
    return heads


def in_folder(path: Path) -> Path:
    """`path`, or the first of FILES in the folder `path`. Raises UserError for a folder without any."""
    found = next((path / name for name in FILES if (path / name).is_file()), path)
    if found.is_dir():
        raise UserError(f"{path} holds no weights: none of {', '.join(FILES)}.")
    return found
