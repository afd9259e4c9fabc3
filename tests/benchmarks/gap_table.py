"""The README's table of the gap: means over seeds of the reports that adapt.py wrote.

    for seed in 0 1 2; do for target in cuhk icfg rstp; do python adapt.py --target $target --seed $seed; done; done
    python tests/benchmarks/gap_table.py out/sda/*/report.json
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

COLUMNS = ("frechet", "gap_closed", "classifier", "upper_colour", "lower_colour")


def spread(values: list[float]) -> str:
    """Mean and, where there are several, standard deviation."""
    mean = statistics.mean(values)
    digits = 1 if mean > 10 else 2
    return f"{mean:.{digits}f}" + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def main(paths: list[str]) -> None:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    by_target = defaultdict(list)
    for report in reports:
        if "gap" in report:
            by_target[report["config"]["target"], report["config"]["mode"]].append(report)
    for (target, mode), some in sorted(by_target.items()):
        print(f"\n{target}, {mode}, seeds {sorted(report['config']['seed'] for report in some)}, "
              f"{some[0]['config']['images']} images, torch {some[0]['versions']['torch']}\n")
        print(f"| images | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        for row in some[0]["gap"]:
            cells = [[report["gap"][row][name] for report in some if name in report["gap"][row]] for name in COLUMNS]
            print(f"| {row} | {' | '.join(spread(values) if values else '' for values in cells)} |")
        for name in ("classifier on target blurred by half a pixel",):
            print(f"\n{name}: {spread([report[name] for report in some])}")
        for name in ("boxes", "nearest training image", "judge of malformed people"):
            print(f"{name}: " + ", ".join(f"{key} {spread([report[name][key] for report in some])}"
                                          for key in some[0][name]))
        read = [[statistics.mean(row.values()) for row in report["garment colours"].values()] for report in some]
        print(f"garment colours read off, as a share of exact images' of the same people: "
              f"{spread([made / exact for made, exact in read])}")
        print(f"kept: {spread([report['kept'] / report['made'] for report in some])}")


if __name__ == "__main__":
    main(sys.argv[1:])
