"""What is saved: one safetensors file per checkpoint, its facts as JSON in the file's metadata, written atomically.

`best.safetensors` holds the weights alone, chosen on val; its facts hold the configuration, the vocabulary, the
metrics, the seed and the versions, so the file is all that evaluate.py or `--init` needs. `last.safetensors`
also holds the optimiser's state, and is what `--resume` goes on from. No pickle anywhere.
Before: ranking.py. After: training.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mra.config import Config, ModelConfig, TrainConfig, UserError, replacing
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever

VERSIONS = {"torch": torch.__version__, "torchvision": version("torchvision")}


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); remove it or give another.") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} holds no configuration: it was not written by train.py.")
    return tensors, facts


def write_json(path: Path, content: dict | list, indent: int | None = 2) -> None:
    """Write JSON to `path`, complete or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path, kind: type = dict) -> dict | list:
    """What `write_json` wrote, of that kind. Raises UserError where the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        return found
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to have it made anew.") from error


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one (the tied word decoder) once; not what follows from a Swin's sizes."""
    return {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if not name.endswith("relative_position_index")}


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
    """Within it a file's facts are used as they are; raises UserError where they are not what they should be."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):        # no fault of the file
            raise
        raise UserError(f"{path}: its facts are incomplete or wrong ({error}).") from error


def config_of(kind: type[Config], values: dict, tokenizer: Tokenizer) -> Config:
    """A model's sizes as a file tells them. Raises TypeError or ValueError for what no model has."""
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
    """Modules made within it are not initialised: on "meta" that does nothing but load the compiler, for seconds."""

    def __torch_function__(self, function, types, given=(), named=None):
        initialises = getattr(function, "__module__", "") == "torch.nn.init"
        return None if initialises else function(*given, **(named or {}))


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """`make()` with these weights; made only once it is known that they fit, for facts may ask for any size."""
    with torch.device("meta"), Uninitialised():
        check_weights(make(), tensors, path)
    model = make()
    restore_weights(model, tensors, path)
    return model


def check_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Those of the tensors that are weights: every name and shape must agree, or UserError says which does not."""
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


# may differ when a run goes on; how many pairs a step has, and in which precision, `settings` tells
MAY_DIFFER = {"resume", "out", "device", "workers", "log_every", "compile", "batch", "precision"}


def resume(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
           facts: dict) -> tuple[int, dict | None, bool]:
    """Continue `out`'s last checkpoint, if there is one: steps done, best result on val, whether it was evaluated.

    Raises UserError when that checkpoint belongs to a run with another configuration, or its best one is gone.
    """
    path = out / "last.safetensors"
    if not path.exists():
        return 0, None, False
    tensors, saved = load(path)
    if saved.get("best") and not (out / "best.safetensors").exists():
        raise UserError(f"{path} goes on from a best.safetensors that is gone: put it back, or give --no-resume to "
                        "start over.")
    with trusting(path):
        now, then = settings(facts), settings(saved)
        if "val" in saved and saved["step"] == saved.get("steps"):      # finished: nothing is computed any more
            then["--precision"] = now["--precision"]
        changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
        if changed:
            raise UserError(f"{path} was trained with another {changed[0]}, {then.get(changed[0])!r}; go back to that, "
                            "give another --out (a pretraining: --dataset sda --out, then --init), or --no-resume to "
                            "overwrite it.")
        restore(model, optimizer, tensors, path)
        best = saved["best"]
        if best is not None and not all(isinstance(part, bool | float) for part in best["quality"]):
            raise ValueError(f"quality is {best['quality']!r}")
        return int(saved["step"]), best, "val" in saved


def settings(facts: dict) -> dict:
    """All that must be the same for a run to go on, by the name to tell the user."""
    flags = asdict(TrainConfig()) | facts["train"]      # a flag that an older checkpoint does not know had its default
    return {"--" + name.replace("_", "-"): value for name, value in flags.items() if name not in MAY_DIFFER} | {
        "number of pairs": facts["pairs"], "adapted set": facts.get("adapted", ""),
        "--batch x processes": flags["batch"] * facts["processes"], "--precision": facts["precision"]}


def load_retriever(path: Path, device: torch.device) -> tuple[Retriever, Tokenizer, dict]:
    """The model, the tokenizer and the facts of a checkpoint."""
    tensors, facts = load(path)
    with trusting(path):
        tokenizer = Tokenizer(facts["vocab"], path)
        config = config_of(ModelConfig, facts["model"], tokenizer)
        train = facts["train"]      # what the scripts rely on
        for text in (train["preset"], train["dataset"], train["data_root"], facts["pretrained_on"]):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} in place of a name")
        if not 0 <= facts["val"].get("weight", 0.0) < float("inf"):
            raise ValueError(f"weight is {facts['val']['weight']}")
        model = build(lambda: Retriever(config), tensors, path)
    return model.to(device).eval(), tokenizer, facts


def model_facts(model: Retriever, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint's facts that `load_retriever` needs."""
    return {"model": asdict(model.config), "vocab": tokenizer.pieces}
