"""python -m tests.study: see study.py."""

from mra.run.command import run
from tests.study.study import main

run(main)
