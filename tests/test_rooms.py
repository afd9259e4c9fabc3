"""Who may import whom: the method knows nothing of what stands beside it."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from mra import losses, ranking
from mra.diffusion import ddim, dpm_solver
from mra.diffusion.noising import Schedule

ROOT = Path(__file__).resolve().parent.parent
METHOD = {"mra", "mra.data", "mra.diffusion"}
MAY_IMPORT = {      # rooms beside the method, and what they may import besides it
    "mra.town": set(), "mra.formats": set(), "mra.weights": {"mra.run"},
    "mra.run": {"mra.weights", "mra.show", "mra.formats"},
    "mra.show": {"mra.run", "mra.weights"}}
PACKAGES = {"torch", "torchvision", "tokenizers", "safetensors", "numpy", "PIL"}


def room_of(module: str) -> str:
    """The folder of a module of the package: mra for mra.losses, mra.data for mra.data.words."""
    return ".".join(module.split(".")[:2]) if (ROOT / module.replace(".", "/")).is_dir() or "." in module[4:] else "mra"


def imports_of(file: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                path = ROOT / inner.replace(".", "/")
                found.add(inner if path.is_dir() or path.with_suffix(".py").is_file() else node.module)
    return found


def files() -> list[Path]:
    return sorted((ROOT / "mra").rglob("*.py"))


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_what_it_may(file):
    room = ".".join(file.parent.relative_to(ROOT).parts)
    allowed = METHOD | {room} | MAY_IMPORT.get(room, set())
    assert room in METHOD or room in MAY_IMPORT, f"{room} is a new room: say what it may import"
    for module in imports_of(file):
        top = module.split(".")[0]
        if top == "mra":
            assert room_of(module) in allowed, f"{file.name} imports {module}"
        else:
            assert top in PACKAGES or top in sys.stdlib_module_names, f"{file.name} imports {module}"


def test_the_test_sees_what_it_must_refuse(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from mra.town import sets\nfrom mra import losses\nimport mra.run.loop\n\n"
                    "def f():\n    from mra.show.gallery import encode\n")
    assert {room_of(module) for module in imports_of(file)} == {"mra.town", "mra", "mra.run", "mra.show"}


def test_nothing_imports_the_tests_or_the_scripts():
    for file in (*files(), *ROOT.glob("*.py")):
        assert not {module.split(".")[0] for module in imports_of(file)} & {"tests", "train", "adapt", "evaluate"}


def test_public_names():
    """Others call these four under these names."""
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    found = ranking.retrieval_metrics(scores, torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    assert found["R@1"] == 100 and found.keys() == {"R@1", "R@5", "R@10", "mAP", "mINP"}
    unit = torch.nn.functional.normalize(torch.ones(2, 4), dim=1)
    assert losses.contrastive(unit, unit, 0.1, torch.tensor([0, 1])).item() == pytest.approx(torch.tensor(2.0).log())
    noise = torch.ones(1, 2)
    for sampler in (ddim, dpm_solver):      # v = sigma z: the clean latents are 0
        assert sampler(lambda z, t: z, noise, Schedule.cosine(), 1).abs().max() < 1.01
