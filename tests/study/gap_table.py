"""The table of distances: means over seeds of the reports that gap.py wrote.

    for seed in 0 1 2; do for target in cuhk icfg rstp; do python adapt.py --target $target --seed $seed; done; done
    python -m tests.study.gap out/sda/*
    python tests/study/gap_table.py out/sda/*/gap.json

The reports behind the table in README.md lie in tests/study/gap_reports. An older adapt.py wrote them: there the flags
stand under "config", and the share of the distance that is closed under "gap_closed".
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def flags_of(report: dict) -> dict:
    """The flags of adapt.py that made the set."""
    return report["config"] if "config" in report else report["key"]["flags"]


def distance_closed(row: dict) -> float:
    """The share of the log Frechet distance from source to exact images that is closed, in percent."""
    return 100 * row["distance_closed" if "distance_closed" in row else "gap_closed"]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and, where there are several, standard deviation."""
    told = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        told += f" +- {statistics.stdev(values):.{digits}f}"
    return told


def colours(row: dict) -> float:
    """Mean accuracy of upper and lower garment's colour."""
    return statistics.mean((row["upper_colour"], row["lower_colour"]))


def table(reports: list[dict]) -> str:
    """A row for each way to make images."""
    lines = ["| images | Frechet distance | distance closed | classifier | garment colours |", "|---|---|---|---|---|"]
    for name in reports[0]["gap"]:
        rows = [report["gap"][name] for report in reports]
        read = ""
        if "upper_colour" in rows[0]:
            read = spread([colours(row) for row in rows])
        lines.append(f"| {name} | {spread([row['frechet'] for row in rows], 1)} | "
                     f"{spread([distance_closed(row) for row in rows], 1)} % | "
                     f"{spread([row['classifier'] for row in rows], 3)} | {read} |")
    return "\n".join(lines)


def facts(reports: list[dict]) -> dict[str, list[float]]:
    """What else is known of the made images, one value a report."""
    made = [report["garment colours"]["made"] for report in reports]
    exact = [report["garment colours"]["exact images of the same people"] for report in reports]
    pairs = list(zip(made, exact))
    found = {"images kept": [report["kept"] / report["made"] for report in reports],
             "garment colours, as a share of exact images' of the same people and captions": [
                 colours(one) / colours(other) for one, other in pairs if colours(other) > 0]}
    for kind in ("upper_colour", "lower_colour"):
        found[f"the same, {kind.replace('_', ' ')} alone"] = [
            one[kind] / other[kind] for one, other in pairs if other[kind] > 0]
    blurred = "classifier on target blurred by half a pixel"
    found[blurred] = [report[blurred] for report in reports]
    for name in ("boxes", "nearest training image", "judge of malformed people",
                 "distance to the exact image of the same person and pose"):
        for key in reports[0].get(name, {}):
            found[f"{name}, {key}"] = [report[name][key] for report in reports if key in report[name]]
    return found


def main(paths: list[str]) -> None:
    runs = defaultdict(list)
    for report in (json.loads(Path(path).read_text()) for path in paths):
        if "gap" in report:
            runs[flags_of(report)["target"], flags_of(report)["mode"]].append(report)
    for (target, mode), reports in sorted(runs.items()):
        seeds = sorted(flags_of(report)["seed"] for report in reports)
        print(f"\n{target}, {mode}, seeds {seeds}, {flags_of(reports[0])['images']} images, "
              f"torch {reports[0]['versions']['torch']}\n\n{table(reports)}\n")
        for name, values in facts(reports).items():
            if values:                  # a reader of a few steps finds no colours
                digits = 3 if values[0] < 10 else 0
                print(f"- {name}: {spread(values, digits)}")


if __name__ == "__main__":
    main(sys.argv[1:])
