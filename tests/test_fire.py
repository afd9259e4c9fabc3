"""Under fire: spoilt inputs, full disks, hostile files. The long half is `python -m tests.stress`."""

import ast
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from test_commands import ROOT, command, succeed
from torch.utils.data import DataLoader, Dataset

from mra.config import UserError
from mra.data.files import printable, write_json
from mra.data.records import Record
from mra.data.tokenizer import Tokenizer
from mra.ranking import Settings
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.command import run
from mra.run.loop import write_line
from mra.run.machine import Machine
from mra.run.parts import write_part
from mra.show import gallery, pictures
from mra.town import sets
from mra.weights.retrievers import load_retriever, model_facts
from tests.stress import fuzz
from tests.study import charts

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e<b>red</b>"


@pytest.fixture
def full_disk():
    """A call that sets how many bytes a file of this process may have: what is beyond fails as on a full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1] if size is None else size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


def save(path: Path, model: Retriever, tokenizer: Tokenizer, dataset: str, **sizes) -> None:
    """A checkpoint that says it was trained on `dataset` and has these sizes."""
    facts = model_facts(model, tokenizer)
    checkpoint.save(path, checkpoint.weights(model), facts | {
        "model": facts["model"] | sizes, "val": {}, "pretrained_on": dataset,
        "train": {"preset": "tiny", "dataset": dataset, "data_root": "", "seed": dataset}})


# ---- spoilt inputs

@pytest.mark.parametrize("kind, cases", [("annotations", 200), ("images", 40), ("checkpoints", 60), ("vocab", 12),
                                         ("flags", 100)])
def test_spoilt_input_is_read_or_refused_in_one_sentence(tmp_path, kind, cases):
    """A slice of tests/stress/fuzz.py; both ends must occur."""
    told = []
    ended = fuzz.fuzz(kind, range(cases), 2028, 0, tmp_path / kind, lambda line, **_: told.append(line))
    assert not told and ended["read"] > cases // 20 and ended["refused"] > cases // 5


def test_the_judge_of_spoilt_input_judges():
    def fails() -> None:
        raise KeyError("x")

    def refuses() -> None:
        raise UserError("x.json: nothing in it.\nTwo lines")
    assert "KeyError" in fuzz.judge(fuzz.Case("", "", fails))
    assert "does not name y.json" in fuzz.judge(fuzz.Case("", "y.json", refuses))
    assert fuzz.judge(fuzz.Case("", "x.json", refuses)) == "refused"
    assert "MemoryError" in fuzz.judge(fuzz.Case("", "", lambda: bytearray(3 * 2**30)))
    assert "not fit" in fuzz.verdict(fuzz.Case("", "", fails), 2, "", "error: a\x1b[2J\n", 0)
    assert "exit status 1" in fuzz.verdict(fuzz.Case("", "", fails), 1, "", "Traceback", 0)
    assert "11.0 seconds" in fuzz.verdict(fuzz.Case("", "", fails), 0, "", "", 11)


# ---- nobody gets out

def test_nothing_in_the_package_runs_what_it_reads():
    """No eval, exec, pickle, shell or unchecked torch.load, by the syntax tree and not by the text."""
    found = []
    for file in (*ROOT.glob("*.py"), *(ROOT / "mra").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or "shell" in words or (
                        name == "torch.load" and words.get("weights_only") != "True"):
                    found.append(f"{file.name}:{node.lineno} {name}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                found += [f"{file.name}:{node.lineno} {name}" for name in names
                          if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib", "ctypes")]
    assert not found


def test_what_a_file_says_is_harmless_on_a_terminal(tmp_path, model, tokenizer, paint):
    assert printable("a\x1b[31m\n\u202e\ud800grün") == r"a\x1b[31m\n\u202e\ud800grün"
    assert len(printable("x" * 10**6)) < 2010
    save(tmp_path / "x.safetensors", model, tokenizer, HOSTILE)
    paint("photos/\x1b[2J\u202e<b>.png")
    said = succeed(tmp_path, "evaluate.py", "--checkpoint", "x.safetensors", "--query", "a \x1b[2J red <b>coat</b>",
                   "--gallery", "photos")
    assert r"\x1b[2J\x1b]0;owned\x07" in said and r"\x1b[2J\u202e<b>.png" in said
    assert all(line.isprintable() for line in said.splitlines())
    answer = (tmp_path / "query.json").read_text()
    assert answer.isascii() and json.loads(answer)["answers"][0]["query"] == "a \x1b[2J red <b>coat</b>"
    for flags in (("--checkpoint", "\x1b[2J.safetensors"), ("--\x1b[2J",), ("--dataset", "\x1b[2J")):
        status, _, err = command(tmp_path, "evaluate.py", *flags)
        assert status == 2 and err.rstrip("\n").isprintable() and r"\x1b[2J" in err


def test_what_is_drawn_is_the_text_alone(tmp_path, paint):
    """Escapes and directions give what blanks give; markup is drawn as it stands; a long text is cut to its row."""
    path, pixels = paint("a.png"), {}
    for name, sentence in (("hostile", "a\x1b red\u202e coat"), ("plain", "a  red  coat"),
                           ("markup", "<b>a red coat</b>"), ("long", "red coat " * 10**5)):
        pictures.table([(sentence, [(Image.open(path).resize(pictures.CELL), pictures.GREY, "")])], tmp_path / "x.png")
        pixels[name] = np.asarray(Image.open(tmp_path / "x.png"))
    assert (pixels["hostile"] == pixels["plain"]).all() and (pixels["markup"] != pixels["plain"]).any()
    assert pixels["long"].shape == pixels["plain"].shape
    wide = "short-sleeved-t-shirt"          # wider than its picture: drawn all the same
    assert pictures.fitted(wide, ImageFont.load_default(11), 96) == wide


def test_facts_that_ask_for_a_giant_are_refused_before_it_is_made(tmp_path, model, tokenizer):
    for change in ({"embed": 10**6, "image_dim": 10**6}, {"positions": 10**9}, {"image_depth": -1}, {"width": "16"},
                   {"dropout": float("nan")}, {"image_heads": 0}):
        save(tmp_path / "x.safetensors", model, tokenizer, "sda", **change)
        with pytest.raises(UserError, match="x.safetensors"), fuzz.limits():
            load_retriever(tmp_path / "x.safetensors", torch.device("cpu"))


# ---- full disks

def in_town(folder: Path, _) -> None:
    sets.build(folder, "rstp", sets.TINY["rstp"], 0, 1, lambda line: None)


def in_gallery(folder: Path, model) -> None:
    if not (folder / "photos").exists():
        (folder / "photos").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "photos/a.png")
    gallery.encode("photos", [str(folder / "photos/a.png")], model, folder / "x.safetensors", Settings(0, batch=4),
                   say=lambda line: None)


def in_part(folder: Path, _) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    images = torch.randint(0, 256, (2, 3, 64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drafts = [Record("a.jpg", ("x" * 9000,), 0), Record("b.jpg", ("y",), 1)]
    write_part(folder / "parts/000000.json", drafts, images, {})


WRITES: dict[str, Callable[[Path, object], object]] = {
    "checkpoint": lambda folder, model: checkpoint.save(folder / "x.safetensors", checkpoint.weights(model), {}),
    "json": lambda folder, model: write_json(folder / "x.json", ["x"] * 9000),
    "picture": lambda folder, model: charts.bars({"a": {"b": [1.0, 2.0]}}, "c", folder / "x.png"),
    "drawn set": in_town, "embeddings": in_gallery, "adapted images": in_part,
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_full_disk_spoils_nothing(tmp_path, model, full_disk, kind):
    """Refused with the name of the file; what was there stays; once there is room all is as it would have been."""
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "folder"
    undisturbed.mkdir(), folder.mkdir()

    def files(of: Path) -> dict[str, bytes]:
        return {str(path.relative_to(of)).replace(".tmp/", "/"): path.read_bytes() for path in of.rglob("*")
                if path.is_file() and "photos" not in path.parts and path.suffix != ".lock"}
    WRITES[kind](undisturbed, model)
    wanted = files(undisturbed)
    if kind in ("checkpoint", "json", "picture"):
        old = folder / next(iter(wanted))
        old.write_bytes(b"the last good one")
    if kind == "embeddings":
        (folder / "photos").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "photos/a.png")
    before = files(folder)
    for size in (80, max(map(len, wanted.values())) // 2):        # semaphores, too, are files, of 32 bytes
        full_disk(size)
        with pytest.raises(UserError, match=r"cannot be written .*(File too large|code: 27)") as caught:
            WRITES[kind](folder, model)
        full_disk(None)
        assert any(Path(name).name in str(caught.value) for name in wanted)
        found = files(folder)
        assert all(found[name] == content for name, content in before.items())
        assert all(content == wanted[name] for name, content in found.items() if name not in before)
    WRITES[kind](folder, model)
    found = files(folder)
    if kind == "embeddings":       # knows its photographs by where they lie
        assert found.keys() == wanted.keys()
    else:
        assert found == wanted


def test_a_full_disk_ends_a_command_in_one_sentence(tmp_path, full_disk):
    """Even where the file that is written has no name left, as for the log."""
    machine = Machine.of("cpu", "float32")
    full_disk(0)
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(io.StringIO()) as err:
        run(lambda: write_line(tmp_path / "log.jsonl", {"step": 1}, machine))
    full_disk(None)
    assert end.value.code == 2 and err.getvalue() == "error: [Errno 27] File too large\n"


@pytest.mark.parametrize("wrong, said", [
    (lambda: torch.empty(2**50), "error: out of memory,.*tried to allocate.*; free some, .*--batch"),
    (lambda: np.empty(2**50), "error: out of memory,.*Unable to allocate.*; free some"),
    (lambda: next(iter(DataLoader(Dying(), num_workers=1))), "error: out of memory,.* killed \\(.*DataLoader.*"),
    (lambda: next(iter(DataLoader(Dying(np.empty), num_workers=1))), "error: out of memory,.*MemoryError: Unable.*"),
    (lambda: next(iter(DataLoader(Dying(torch.empty), num_workers=1))), "error: out of memory,.*RuntimeError: .*"),
    (lambda: torch.zeros(2) + torch.zeros(3), None)])
def test_what_a_machine_cannot_hold_is_told_in_one_sentence(capsys, wrong, said):
    """An error of the program's own is not."""
    if said is None:
        with pytest.raises(RuntimeError, match="must match"):
            run(wrong)
        return
    with pytest.raises(SystemExit) as end:
        run(wrong)
    assert end.value.code == 2 and re.fullmatch(f"{said}.*\n", capsys.readouterr().err)


class Dying(Dataset):
    """Its reader is killed, or asks for too much memory."""

    def __init__(self, make: Callable = lambda size: os.kill(os.getpid(), signal.SIGKILL)):
        self.make = make

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.make(2**50)


def test_a_killed_helper_is_told_in_one_sentence(capsys):
    """A process that draws or decodes."""
    def killed() -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os._exit, 9).result()
    with pytest.raises(SystemExit) as end:
        run(killed)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: .* a worker process was killed.*--workers.*\n", said)
