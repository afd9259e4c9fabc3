"""The benchmarks run, at their smallest; what they measure is not looked at."""

import subprocess
import sys

import pytest
from test_commands import ROOT, command


@pytest.mark.parametrize("command_line, lines", [
    ("bench_diffusion --size tiny --batch 2 --steps 1 --repeat 1 --modes eager", ("branch training", "sampling")),
    ("bench_step --preset tiny --batch 4 2 --target 8 --sides eager", ("batch 4, eager", "batch 2, eager", "batch 8")),
    ("bench_step --preset tiny --loop --steps 1", ("loop at tiny, batch 10, before", "loop at tiny, batch 10, now")),
    ("bench_rerank --preset tiny --queries 3 --gallery 4 --k 2 --plain-queries 2", ("plain loop", "correlation")),
    ("bench_similarity --size 64x8 --gallery 64x8 --queries 2 --k 2 --repeats 1 --sides plain ours",
     ("loss 64x8                   ours", "top 2 of 64x8               ours"))])
def test_benchmarks_run(command_line, lines, monkeypatch):
    """In this process, as are the processes that they start: a fresh one takes seconds to start."""
    real = subprocess.run

    def run(line, **settings):
        if line[:2] != [sys.executable, "-m"]:
            return real(line, **settings)
        ran = command(ROOT, line[2].replace(".", "/") + ".py", *line[3:])
        return subprocess.CompletedProcess(line, ran.status, ran.out, ran.err)
    monkeypatch.setattr(subprocess, "run", run)
    name, *flags = command_line.split()
    ran = command(ROOT, f"tests/benchmarks/{name}.py", *flags)
    assert ran.status == 0, ran.err
    for line in lines:
        assert line in ran.out
    assert "Error" not in ran.out
