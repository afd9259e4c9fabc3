"""The benchmarks run, at their smallest; what they measure is not looked at."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from test_commands import ROOT, command

from tests.benchmarks import gpu


def benchmark(line: list[str]):
    """`python -m tests.benchmarks.<name> <flags>` in this process: a fresh one takes seconds to start."""
    return command(ROOT, line[2].replace(".", "/") + ".py", *line[3:])


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """So run the processes that a benchmark starts."""
    real = subprocess.run

    def run(line, **settings):
        if line[:2] != [sys.executable, "-m"]:
            return real(line, **settings)
        ran = benchmark(line)
        return subprocess.CompletedProcess(line, ran.status, ran.out, ran.err)
    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("command_line, lines", [
    ("bench_step --preset tiny --batch 4 2 --target 8 --sides eager", ("batch 4, eager", "batch 2, eager", "batch 8")),
    ("bench_step --preset tiny --loop --steps 1", ("loop at tiny, batch 10, before", "loop at tiny, batch 10, now")),
    ("bench_branch --size tiny --train 2 --sample 2 --repeats 1", ("training: before", "sampling: before")),
    ("bench_similarity --size 64x8 --gallery 64x8 --queries 2 --k 2 --repeats 1 --sides plain ours",
     ("loss 64x8                   ours", "top 2 of 64x8               ours"))])
def test_benchmarks_run(command_line, lines):
    name, *flags = command_line.split()
    ran = benchmark([sys.executable, "-m", f"tests.benchmarks.{name}", *flags])
    assert ran.status == 0, ran.err
    for line in lines:
        assert line in ran.out
    assert "Error" not in ran.out


# ---- the script for a GPU, which runs the others

def table(monkeypatch, folder, lines_of) -> list[str]:
    """The lines of the file that `--tiny` writes where `lines_of` measures."""
    monkeypatch.setattr(gpu, "lines_of", lines_of)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(folder / "new/gpu.md")])
    try:
        gpu.main()
    finally:
        lines = (folder / "new/gpu.md").read_text().splitlines()
    return lines


def test_the_gpu_script_measures_every_row(monkeypatch, tmp_path):
    ran = {}

    def lines_of(line: list[str], *_) -> Iterator[str]:
        """Of rows that have the same flags and tiny size, one runs."""
        flags = line[2], "sd15-tiny" in line, *(flag for flag in line if flag.startswith("--"))
        if flags not in ran:
            ran[flags] = benchmark(line)
            assert ran[flags].status == 0, ran[flags].err
        yield from ran[flags].out.splitlines()

    said = "\n".join(table(monkeypatch, tmp_path, lines_of))
    assert "CPU, tiny sizes; torch" in said and "skipped" not in said and "failed" not in said
    for row in gpu.ROWS:
        assert f"| {row.what} | {row.aim} | `{row.command} " in said
    for line in ("| | | loss 64x8 ours", "| | | ours, float32", "| | | tiny 32x16, batch 4, eager",
                 "| | | ours, sampling without the branch, eager", "| | | branch ", "| | | decoder half ",
                 "| | | without guidance ", "| | | and all in bf16, without a mask "):
        assert line in said


def test_an_interrupted_run_keeps_its_rows_and_lists_the_others(monkeypatch, tmp_path):
    def lines_of(line: list[str], *_) -> Iterator[str]:
        yield "measured"
        if "32768x2048" in line:        # the second row
            raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        table(monkeypatch, tmp_path, lines_of)
    rows = (tmp_path / "new/gpu.md").read_text().splitlines()[-len(gpu.ROWS) - 3:]
    assert [rows[i] for i in (1, 3, 4)] == ["| | | measured |"] * 2 + ["| | | interrupted |"]
    for line, row in zip(rows[5:], gpu.ROWS[2:], strict=True):
        assert line.startswith(f"| {row.what} | {row.aim} | skipped: `{row.command}")


def test_a_row_is_skipped_if_its_time_is_not_left(monkeypatch):
    monkeypatch.setattr(gpu, "lines_of", lambda *_: (line for line in ["measured"]))
    monkeypatch.setattr(gpu, "ROWS", [gpu.Row("a", "", "bench_step", 61), gpu.Row("b", "1 ms", "bench_rerank", 50)])
    said = []
    gpu.measure_all(said.append, 1, False)
    assert said[1:] == ["| a |  | skipped: `bench_step` |", "| b | 1 ms | `bench_rerank` |", "| | | measured |"]


def test_what_takes_too_long_is_killed_and_its_lines_stay():
    """With the process that it has started, which also holds its standard output."""
    started = time.monotonic()
    waiting = "import subprocess; print(7, flush=True); subprocess.run(['sleep', '100'])"
    first, second = gpu.lines_of([sys.executable, "-c", waiting], 1, True)
    assert first.strip() == "7" and second.startswith("killed after") and time.monotonic() - started < 50
    assert list(gpu.lines_of([sys.executable, "-c", "raise ValueError('no')"], 50, True)) == ["failed: ValueError: no"]


def test_without_a_gpu_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = command(tmp_path, "tests/benchmarks/gpu.py")
    assert ran.status == 2 and "--tiny" in ran.err and ran.err.count("\n") == 1
    assert not ran.out and not list(tmp_path.iterdir())
