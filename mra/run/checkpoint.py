"""What is saved: one safetensors file per checkpoint, its facts as JSON in the file's metadata, written atomically.

`best.safetensors` holds the weights alone, chosen on val. Its facts hold the configuration, the vocabulary, the
metrics, the seed and the versions, so evaluate.py and `--init` need no other file. `last.safetensors` also holds the
optimiser's state, from which a run goes on. No pickle is used anywhere. Read next: machine.py, loop.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mra.config import UserError
from mra.data.files import replacing

Config = TypeVar("Config")
VERSIONS = {"torch": torch.__version__, "torchvision": version("torchvision")}
RENAMED = ".to_memory.", ".to_keys_values."     # a name in older files, and what it is now


def save(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors and facts to `path`, complete or not at all."""
    with replacing(path) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch,
                  metadata={"mra": json.dumps(facts)})
        os.chmod(scratch, 0o644)    # safetensors makes it private


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a checkpoint. Raises UserError for a file that is missing or not one of ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("mra", "null"))
            tensors = {name.replace(*RENAMED): file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); remove it or give another.") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} holds no configuration: it was not written by train.py.")
    return tensors, facts


def is_ours(path: Path) -> bool:
    """Whether a safetensors file was written by `save`; also for one that is missing or damaged, which `load` tells."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "mra" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return True


def newest(say: Callable = print) -> Path:
    """The last written checkpoint under out/; says where a run beside it has not ended."""
    found = sorted(Path("out").glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("There is no checkpoint under out/ yet; `python train.py --dataset icfg` makes one.")
    best = found[-1]
    last = best.with_name("last.safetensors")
    if last.exists() and last.stat().st_mtime > best.stat().st_mtime:       # train.py ends by touching the best one
        say(f"{last} is of a run that has not ended: {best.name} is its best so far, or of the run before.")
    return best


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one (the tied word decoder) once; without a Swin's table of indices."""
    return {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if not name.endswith("relative_position_index")}


def halves(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, in half precision."""
    return {name: tensor.half() for name, tensor in weights(model).items()}


def digest(model: nn.Module) -> str:
    """A short name for these very weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights(model).items()):
        found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights, and the optimiser's state as `optimizer.<kind>.<parameter name>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return weights(model) | {f"optimizer.{kind}.{names[parameter]}": value
                             for parameter, its in optimizer.state.items() for kind, value in its.items()}


@contextmanager
def trusting(path: Path) -> Iterator[None]:
    """Within it a file's facts are trusted; raises UserError where that shows them to be incomplete or wrong."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):        # no fault of the file
            raise
        raise UserError(f"{path}: its content is incomplete or wrong ({error}).") from error


def config_of(kind: type[Config], values: dict, tokenizer) -> Config:
    """A model's sizes, from a file. Raises TypeError or ValueError for sizes that no model has."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    config = kind(**given)
    for field in fields(kind):
        value = getattr(config, field.name)
        numbers, of = (value, int) if field.type == tuple[int, ...] else ((value,), field.type)
        if not all(type(number) is of and 0 <= number <= 1e6 for number in numbers):
            raise ValueError(f"{field.name} is {value!r}")
    if config.vocab != len(tokenizer) or not 2 <= config.max_tokens <= config.positions:
        raise ValueError(f"{len(tokenizer)} word pieces, {config.max_tokens} tokens of {config.positions}")
    return config


class Uninitialised(TorchFunctionMode):
    """Modules made within it are not initialised: on "meta" that only loads the compiler, which takes seconds."""

    def __torch_function__(self, function, types, given=(), named=None):
        initialises = getattr(function, "__module__", "") == "torch.nn.init"
        return None if initialises else function(*given, **(named or {}))


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """`make()` with these weights. First its shapes alone are made and compared, since facts may ask for any size."""
    with torch.device("meta"), Uninitialised():
        check_weights(make(), tensors, path)
    model = make()
    restore_weights(model, tensors, path)
    return model


def check_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights among these tensors. Raises UserError where a name or a shape does not agree with the model's."""
    own = weights(model)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(("optimizer.", "average."))
             and not name.endswith("relative_position_index")}      # which older files hold
    wrong = sorted(own.keys() ^ given.keys()) or [
        n for n in own if own[n].shape != given[n].shape or own[n].is_floating_point() > given[n].is_floating_point()]
    if wrong:
        raise UserError(f"{path} does not fit this model: {len(wrong)} tensors differ, {wrong[0]} first.")
    return given


def restore_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the model. Raises UserError where they do not fit or are not finite."""
    given = check_weights(model, tensors, path)
    if broken := [name for name, tensor in given.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: {len(broken)} of its tensors hold values that are not finite, {broken[0]} first.")
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(given[name])


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """Go back to what `state` returned. Raises UserError where the weights do not fit; for use within `trusting`."""
    restore_weights(model, tensors, path)
    parameters = dict(model.named_parameters())
    saved = {tuple(name.split(".", 2)[1:]): tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    if not saved or saved.keys() != {(kind, of) for _, of in saved for kind in ("step", "exp_avg", "exp_avg_sq")}:
        raise ValueError("the optimiser's state is not complete")
    for (kind, of), tensor in saved.items():
        own = parameters[of]        # a moment is laid out in memory as its parameter is
        optimizer.state[own][kind] = (tensor.to(own.device) if kind == "step" else
                                      torch.empty_like(own, dtype=tensor.dtype).copy_(tensor.view_as(own)))
