"""The benchmarks run, at their smallest; what they measure is not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command, lines", [
    ("bench_diffusion --size tiny --batch 2 --steps 1 --repeat 1 --modes eager", ("branch training", "sampling")),
    ("bench_step --preset tiny --batch 4 2 --target 8 --sides eager", ("batch 4, eager", "batch 2, eager", "batch 8")),
    ("bench_step --preset tiny --loop --steps 1", ("loop at tiny, batch 10, before", "loop at tiny, batch 10, now")),
    ("bench_rerank --preset tiny --queries 3 --gallery 4 --k 2 --plain-queries 2", ("plain loop", "correlation")),
    ("bench_similarity --size 64x8 --gallery 64x8 --queries 2 --k 2 --repeats 1 --sides plain ours",
     ("loss 64x8                   ours", "top 2 of 64x8               ours"))])
def test_benchmarks_run(command, lines):
    ran = subprocess.run([sys.executable, "-m", *f"tests.benchmarks.{command}".split()], capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent,
                         env=os.environ | {"TORCHDYNAMO_DISABLE": "1"})      # test_similarity.py compiles
    assert ran.returncode == 0, ran.stderr
    for line in lines:
        assert line in ran.stdout
    assert "Error" not in ran.stdout
