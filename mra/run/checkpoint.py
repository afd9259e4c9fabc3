"""Checkpoints: safetensors files with facts as JSON in their metadata; and results kept until their key changes.

`best.safetensors` holds the weights that are best on val. Its facts are configuration, vocabulary, metrics, versions:
evaluate.py and `--init` need no other file. `last.safetensors`, to resume from, also holds the optimiser's state.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mra.config import UserError
from mra.data.files import printable, read_json, replacing, write_json

VERSIONS = {"torch": torch.__version__, "torchvision": version("torchvision")}
SHIPPED = Path(__file__).parents[1] / "weights/shipped"
RENAMED = ".to_memory.", ".to_keys_values."     # a part of names in older files, and what it is now
NOT_WEIGHTS = "optimizer.", "average."          # beginnings of the names of other tensors in last.safetensors
INDICES = "relative_position_index"             # tables of a Swin, which follow from its window; older files hold them


def save(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors and facts to `path`, complete or not at all."""
    with replacing(path) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch,
                  metadata={"mra": json.dumps(facts)})
        os.chmod(scratch, 0o644)    # safetensors makes it private


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts; no facts if `save` did not write the file. Raises UserError if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = dict(json.loads((file.metadata() or {}).get("mra", "{}")))
            tensors = {name.replace(*RENAMED): file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, TypeError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); remove it or give another.") from error
    return tensors, facts


def shipped(preset: str) -> Path:
    """The path of the shipped retriever of this preset. The file exists for demo alone."""
    return Path(os.path.relpath(SHIPPED / f"{preset}.safetensors"))


def newest(say: Callable) -> Path:
    """The newest best.safetensors under out/, or else the shipped one. Says so if the run has not ended."""
    best = max(Path("out").glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime, default=None)
    if best is None:
        say("There is no checkpoint under out/ yet, so this is the shipped retriever.")
        return shipped("demo")
    last = best.with_name("last.safetensors")
    if last.exists() and last.stat().st_mtime > best.stat().st_mtime:       # train.py touches the best one at its end
        say(f"{last} is of a run that has not ended: {best.name} is the best so far, perhaps of an earlier run.")
    return best


@contextmanager
def trusting(path: Path) -> Iterator[None]:
    """Within it, a file's facts are used unchecked: errors of Python become a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: its content is incomplete or wrong ({error}).") from error


def config_of(kind: type, values: dict, tokenizer):
    """The configuration of a model, of class `kind`, from a file. Raises TypeError or ValueError for absurd sizes."""
    given = {}
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(0 <= number <= 1e6 for number in numbers):
            raise ValueError(f"{name} is {value!r}")
        given[name] = tuple(value) if isinstance(value, list) else value
    config = kind(**given)
    if config.vocab != len(tokenizer):
        raise ValueError(f"vocab is {config.vocab}, and there are {len(tokenizer)} word pieces")
    return config


def weights(model: nn.Module, half: bool = False) -> dict[str, Tensor]:
    """The model's tensors by name, on request in half precision. The tied table of word embeddings is there once."""
    return {name: tensor.half() if half and tensor.is_floating_point() else tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers()) if not name.endswith(INDICES)}


def digest(model: nn.Module) -> str:
    return digest_of(name.encode() + tensor.detach().float().cpu().numpy().tobytes()
                     for name, tensor in sorted(weights(model).items()))


def digest_of(parts: Iterable[bytes]) -> str:
    """The first digits of the SHA-256 of these parts, one after another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def restore_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the model. Raises UserError for names or shapes that do not fit, or values not finite."""
    own = weights(model)
    given = {name: tensor for name, tensor in tensors.items()
             if not name.startswith(NOT_WEIGHTS) and not name.endswith(INDICES)}
    wrong = {"missing": sorted(own.keys() - given.keys()),
             "unknown": sorted(given.keys() - own.keys()),
             "of another shape": [name for name in own if name in given and own[name].shape != given[name].shape]}
    said = "; ".join(f"{what}: {len(names)}, {names[0]} first" for what, names in wrong.items() if names)
    if said:
        raise UserError(f"{path} does not fit this model. Tensors {said}.")
    broken = [name for name, tensor in given.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} of its tensors hold values that are not finite, {broken[0]} first.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights, and the optimiser's state as `optimizer.<kind>.<parameter name>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return weights(model) | {f"optimizer.{kind}.{names[parameter]}": value
                             for parameter, its in optimizer.state.items() for kind, value in its.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """Restore what `state` returned. Raises UserError for weights that do not fit, KeyError for a missing moment."""
    restore_weights(model, tensors, path)
    for name, parameter in model.named_parameters():
        if f"optimizer.step.{name}" not in tensors:     # the parameter had no gradient yet
            continue
        optimizer.state[parameter] = {"step": tensors[f"optimizer.step.{name}"].to(parameter.device)}
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(parameter)    # in the memory format of the parameter
            optimizer.state[parameter][kind] = moment.copy_(tensors[f"optimizer.{kind}.{name}"])


# ---- results that are made once, for one key

def is_kept(path: Path, key: dict, say: Callable, advice: str = "") -> bool:
    """Whether `path` exists and the key beside it equals `key`, all that decides the result; `advice`: `same_key`."""
    if not path.exists():
        return False
    file = key_file(path)
    return same_key(path, read_json(file) if file.exists() else {}, key, say, advice)


def same_key(path: Path, before: dict, now: dict, say: Callable, advice: str = "") -> bool:
    """Whether two keys of `path` agree. Says what differs; raises UserError instead if `advice` says what to do."""
    different = "; ".join(changes(before, now))
    if different and advice:
        raise UserError(f"{path} was made otherwise: {different}; {advice}.")
    if different:
        say(f"{path} is made anew: {different}.")
    return not different


def remember(path: Path, key: dict) -> None:
    write_json(key_file(path), key)


def key_file(path: Path) -> Path:
    return path.with_name(path.stem + ".key.json")


def changes(before: dict, now: dict, within: str = "") -> list[str]:
    """A sentence for every value that differs between two keys. Digests named "content of ..." are not shown."""
    now, found = json.loads(json.dumps(now)), []        # `before` was read from a file: its tuples are lists
    for name in before | now:
        was, is_now = before.get(name, "nothing"), now.get(name, "nothing")
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += changes(was, is_now, f"{within}{name}.")
        elif was != is_now and name.startswith("content of"):
            found.append(f"the {name} has changed")
        elif was != is_now:
            found.append(f"{within}{name} was {printable(was)} and is {printable(is_now)}")
    return found
