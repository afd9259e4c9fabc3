"""Draw a town of any size: the source has 3,200 people, each target 740, times --people."""

import os
from dataclasses import dataclass
from pathlib import Path

from mra.config import UserError, flag
from mra.run.command import parse, run
from mra.town.sets import DEFAULT, FOLDERS, build


@dataclass(frozen=True)
class TownConfig:
    """What `python -m tests.study.town` draws."""

    root: str = flag("data/town", "its folder, for --data-root")
    sets: tuple[str, ...] = flag(tuple(FOLDERS), "which sets: source, cuhk, icfg, rstp")
    people: float = flag(1.0, "times the people of the default town", 1e-6, 1e6)
    seed: int = flag(0, "of who lives where, and of every image", 0, 2**31)
    workers: int = flag(os.cpu_count() or 1, "processes", 1, 256)


def main() -> None:
    config = parse(TownConfig, __doc__)
    unknown = set(config.sets) - set(FOLDERS)
    if unknown:
        raise UserError(f"--sets {unknown.pop()}: choose from {', '.join(FOLDERS)}.")
    for name in config.sets:
        sizes = [(split, max(2, round(people * config.people)), images) for split, people, images in DEFAULT[name]]
        build(Path(config.root), name, sizes, config.seed, config.workers)


if __name__ == "__main__":
    run(main)
