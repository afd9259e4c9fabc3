"""The README's table of the gap: means over seeds of the reports that adapt.py wrote.

    for seed in 0 1 2; do for target in cuhk icfg rstp; do python adapt.py --target $target --seed $seed; done; done
    python tests/benchmarks/gap_table.py out/sda/*/report.json

The reports that the README's table is made of lie in tests/benchmarks/gap.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and, where there are several, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def colours(row: dict) -> float:
    """Mean accuracy of upper and lower garment's colour."""
    return statistics.mean((row["upper_colour"], row["lower_colour"]))


def main(paths: list[str]) -> None:
    runs = defaultdict(list)
    for report in (json.loads(Path(path).read_text()) for path in paths):
        if "gap" in report:
            runs[report["config"]["target"], report["config"]["mode"]].append(report)
    for (target, mode), reports in sorted(runs.items()):
        print(f"\n{target}, {mode}, seeds {sorted(report['config']['seed'] for report in reports)}, "
              f"{reports[0]['config']['images']} images, torch {reports[0]['versions']['torch']}\n\n"
              "| images | Frechet distance | gap closed | classifier | garment colours |\n|---|---|---|---|---|")
        for name in reports[0]["gap"]:
            rows = [report["gap"][name] for report in reports]
            read = spread([colours(row) for row in rows]) if "upper_colour" in rows[0] else ""
            print(f"| {name} | {spread([row['frechet'] for row in rows], 1)} | "
                  f"{spread([100 * row['gap_closed'] for row in rows], 1)} % | "
                  f"{spread([row['classifier'] for row in rows], 3)} | {read} |")
        print()
        of_truth = [[garments["made"], garments["exact images of the same people"]]
                    for garments in (report["garment colours"] for report in reports)]
        facts = {
            "images kept": [report["kept"] / report["made"] for report in reports],
            "garment colours, as a share of exact images' of the same people and captions": [
                colours(made) / colours(exact) for made, exact in of_truth],
            **{f"{name} garment's, so": [made[f"{name}_colour"] / exact[f"{name}_colour"] for made, exact in of_truth]
               for name in ("upper", "lower")},
            "classifier on target blurred by half a pixel": [
                report["classifier on target blurred by half a pixel"] for report in reports]}
        for name in ("boxes", "nearest training image", "judge of malformed people",
                     "distance to the exact image of the same person and pose"):
            for key in reports[0].get(name, {}):
                facts[f"{name}, {key}"] = [report[name][key] for report in reports]
        for name, values in facts.items():
            print(f"- {name}: {spread(values, 3 * (values[0] < 10))}")


if __name__ == "__main__":
    main(sys.argv[1:])
