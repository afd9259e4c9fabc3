"""What is saved: one safetensors file per checkpoint, its facts as JSON in the file's metadata, written atomically.

`best.safetensors` holds the weights alone, chosen on val; its facts hold the configuration, the vocabulary, the
metrics, the seed and the versions, so the file is all that evaluate.py or `--init` needs. `last.safetensors`
also holds the optimiser's state, and is what `--resume` goes on from. No pickle anywhere.
Before: ranking.py. After: training.py.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mra.config import ModelConfig, TrainConfig, UserError
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever

VERSIONS = {"torch": torch.__version__, "torchvision": torchvision.__version__}


def save(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors and facts to `path`, complete or not at all."""
    scratch = path.with_suffix(".tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch,
                  metadata={"mra": json.dumps(facts)})
    except safetensors.SafetensorError as error:        # a full disk
        scratch.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); what was saved before it is kept.") from error
    os.chmod(scratch, 0o644)    # safetensors makes it private
    os.replace(scratch, path)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a checkpoint. Raises UserError for a file that is missing or not one of ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("mra", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); remove it or give another.") from error
    if facts is None:
        raise UserError(f"{path} holds no configuration: it was not written by train.py.")
    return tensors, facts


def write_json(path: Path, content: dict | list, indent: int | None = 2) -> None:
    """Write JSON to `path`, complete or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one (the tied word decoder) once."""
    return {name: parameter for name, parameter in model.named_parameters()} | dict(model.named_buffers())


def digest(model: nn.Module) -> str:
    """A short name for these very weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights(model).items()):
        found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `optimizer.<kind>.<parameter name>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"optimizer.{kind}.{names[parameter]}": value
            for parameter, state in optimizer.state.items() for kind, value in state.items()}


def save_last(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    """Write what `resume` goes on from; facts with the `step` that is done and the `best` result on val, or None."""
    save(out / "last.safetensors", weights(model) | optimizer_tensors(model, optimizer), facts)


def restore_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the model: every name and shape must agree, or UserError says which does not."""
    own = weights(model)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(("optimizer.", "average."))}
    wrong = sorted(own.keys() ^ given.keys()) or [n for n in own if own[n].shape != given[n].shape]
    if wrong:
        raise UserError(f"{path} does not fit this model: {len(wrong)} tensors differ, {wrong[0]} first.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give every parameter the state that `optimizer_tensors` named after it."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, kind, of = name.split(".", 2)
            if kind == "step":
                state = tensor.to(parameters[of].device if optimizer.defaults["fused"] else "cpu")
            else:       # laid out in memory as the parameter is
                state = torch.empty_like(parameters[of], dtype=tensor.dtype).copy_(tensor)
            optimizer.state[parameters[of]][kind] = state


MAY_DIFFER = {"resume", "out", "device", "workers", "log_every", "compile"}    # between a run and its continuation


def resume(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> tuple[int, dict | None]:
    """Continue `out`'s last checkpoint, if there is one: the number of steps done, and the best result on val.

    Raises UserError when that checkpoint belongs to a run with another configuration.
    """
    path = out / "last.safetensors"
    if not path.exists():
        return 0, None
    tensors, saved = load(path)
    if saved["best"] and not (out / "best.safetensors").exists():
        return 0, None
    now, then = ({"--" + k.replace("_", "-"): v for k, v in (asdict(TrainConfig()) | f.get("train", {})).items()
                  if k not in MAY_DIFFER}    # a flag that an older checkpoint does not know had its default
                 | {f"number of {k}": f.get(k) for k in ("pairs", "processes")} for f in (facts, saved))
    changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
    if changed:
        raise UserError(f"{path} was trained with another {changed[0]}; give another --out, or "
                        "--no-resume to overwrite it.")
    restore_weights(model, tensors, path)
    restore_optimizer(model, optimizer, tensors)
    return saved["step"], saved["best"]


def load_retriever(path: Path, device: torch.device) -> tuple[Retriever, Tokenizer, dict]:
    """The model, the tokenizer and the facts of a checkpoint."""
    tensors, facts = load(path)
    try:
        model, tokenizer = Retriever(ModelConfig(**facts["model"])), Tokenizer(facts["vocab"])
        facts["train"]["preset"], facts["val"], facts["pretrained_on"]      # what the scripts rely on
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its facts are incomplete ({error}).") from error
    restore_weights(model, tensors, path)
    return model.to(device).eval(), tokenizer, facts


def model_facts(model: Retriever, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint's facts that `load_retriever` needs."""
    return {"model": asdict(model.config), "vocab": tokenizer.pieces}
