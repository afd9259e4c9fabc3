"""The study's finished runs compared: paired by target and seed, with intervals over seeds, as rows of tables.

A run is a dictionary, its run.json. `Runs` are the runs of one arm with the same losses, by (target, seed); `Values`
are numbers by (target, seed). Numbers are R@1 by embeddings unless a function says otherwise. Read next: study.py.
"""

import math
import statistics

METRICS = {"R@1": ("R@1",), "mAP": ("mAP",), "re-ranked R@1": ("R@1", "re-ranked"), "R@1 of twins": ("twins R@1",)}
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # 97.5 % of t with 1 to 9 degrees of freedom or more
ENDS = "source", "exact"                            # arms between which a gap is measured
AUGMENTED_ENDS = "augmented", "augmented exact"     # the same on top of augmentation
LEAST_GAP = 10      # points of R@1 that a single seed must show for a share of its gap to mean anything

Runs = dict[tuple[str, int], dict]
Values = dict[tuple[str, int], float]


# ---- runs and their numbers

def of(runs: list[dict], losses: str, arm: str) -> Runs:
    """The runs of an arm by (target, seed)."""
    return {(one["target"], one["seed"]): one for one in runs if one["losses"] == losses and one["arm"] == arm}


def scores(some: Runs, stage: str, metric: str = "R@1", ranked: str = "embeddings") -> Values:
    """An arm's numbers on its own targets after a stage."""
    return {key: one["results"][stage][one["target"]][ranked][metric] for key, one in some.items()
            if stage in one["results"]}


def comparable(group: dict[str, Runs]) -> dict[str, list[float]]:
    """R@1 without fine-tuning of each arm on the targets and seeds that all arms have; if none, on its own ones."""
    common = set.intersection(*map(set, group.values())) if group else set()
    return {arm: [scores(some, "zero-shot")[key] for key in sorted(common or some)] for arm, some in group.items()}


def elsewhere(some: Runs, stage: str) -> Values:
    """An arm's mean R@1 on the targets that are not its own, where it was tested there."""
    found = {}
    for key, one in some.items():
        others = [ranked["embeddings"]["R@1"] for target, ranked in one["results"][stage].items()
                  if target != one["target"]]
        if others:
            found[key] = statistics.mean(others)
    return found


def paired(some: Runs, others: Runs, stage: str, *metric: str) -> Values:
    """By how much an arm is better than another, for every (target, seed) that both have."""
    first, second = scores(some, stage, *metric), scores(others, stage, *metric)
    return {key: first[key] - second[key] for key in first if key in second}


# ---- rows of tables

def row(runs: list[dict], losses: str, arm: str, stage: str) -> dict[str, str]:
    """A table's row: means over targets and seeds, and what lies between `source` and `exact` of the same losses.

    Arms with augmentation also have what lies between `augmented` and `augmented exact`.
    """
    some = of(runs, losses, arm)
    labelled = sorted({one["labelled"][stage] for one in some.values()})
    cells = {"losses": losses, "arm": arm, "runs": str(len(some)), "labelled pairs": " to ".join(map(str, labelled))}
    for title, metric in METRICS.items():
        cells[title] = spread(scores(some, stage, *metric))
    cells["R@1 - source"] = ""
    if arm != "source":
        cells["R@1 - source"] = interval(paired(some, of(runs, losses, "source"), stage))
    cells["gap closed"] = gap_closed(runs, losses, arm, stage)
    if arm.startswith("augmented"):
        cells["gap closed from augmented"] = gap_closed(runs, losses, arm, stage, ends=AUGMENTED_ENDS)
    others = elsewhere(some, stage)
    if others:
        cells["R@1 on other targets"] = spread(others)
    return cells


def comparison(runs: list[dict], one: tuple[str, str], other: tuple[str, str], stage: str) -> dict[str, str]:
    """How much better one (losses, arm) is than another where both have run; nothing where they have not."""
    some, others = of(runs, *one), of(runs, *other)
    both = paired(some, others, stage)
    if not both:
        return {}
    cells = {"stage": stage, "runs": str(len(both))}
    for title, metric in {**METRICS, "R@1 of the rest": ("rest R@1",)}.items():
        cells[title] = interval(paired(some, others, stage, *metric))
    return cells


def as_table(rows: list[dict[str, str]]) -> str:
    """Markdown; a row without a column has an empty cell there."""
    columns = list(max(rows, key=len, default={}))
    lines = [columns] + [[cells.get(column, "") for column in columns] for cells in rows]
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return head + f"|{'---|' * len(columns)}\n" + "".join(body)


# ---- statistics: seeds are independent; runs of one seed share their first stage

def by_seed(values: Values) -> dict[int, list[float]]:
    """The values of each seed."""
    found = {}
    for (_, seed), value in sorted(values.items()):
        found.setdefault(seed, []).append(value)
    return found


def mean(values: Values) -> float:
    return statistics.mean(values.values())


def spread(values: Values) -> str:
    """Mean over all, and standard deviation over the means of seeds."""
    means = [statistics.mean(own) for own in by_seed(values).values()]
    told = f"{mean(values):.1f}"
    if len(means) > 1:
        told += f" +- {statistics.stdev(means):.1f}"
    return told


def error(values: Values) -> float:
    """Standard error of the mean, that of a mean of clusters: the seeds, each with any number of targets.

    0 for a single seed, which shows no error.
    """
    seeds = by_seed(values)
    if len(seeds) == 1:
        return 0.0
    centre = mean(values)
    parts = [sum(value - centre for value in own) / len(values) for own in seeds.values()]
    return math.sqrt(sum(part * part for part in parts) * len(seeds) / (len(seeds) - 1))


def reach(values: Values) -> float:
    """Half the length of the mean's 95 % confidence interval (Student's); 0 for a single seed, which has none."""
    freedom = len(by_seed(values)) - 1
    if freedom == 0:
        return 0.0
    return error(values) * STUDENT[min(freedom, len(STUDENT)) - 1]


def interval(gains: Values) -> str:
    """Mean of paired differences and its 95 % confidence interval over seeds; empty without any."""
    if not gains:
        return ""
    centre, half = mean(gains), reach(gains)
    told = f"{centre:+.1f}"
    if len(by_seed(gains)) > 1:
        told += f" [{centre - half:+.1f}, {centre + half:+.1f}]"
    return told


def gap_closed(runs: list[dict], losses: str, arm: str, stage: str, *metric: str,
               ends: tuple[str, str] = ENDS) -> str:
    """The share of the gap that an arm closes, (arm - source) / (exact - source) of means over common pairs.

    `ends`: two arms in place of source and exact.

    Its interval is that of a ratio, to first order. Empty for a gap that is not three standard errors wide or, of a
    single seed, which shows no error, not LEAST_GAP points.
    """
    some, source, exact = (of(runs, losses, name) for name in (arm, *ends))
    gains, whole = paired(some, source, stage, *metric), paired(exact, source, stage, *metric)
    gap = {key: whole[key] for key in whole if key in gains}
    least = LEAST_GAP if len(by_seed(gap)) == 1 else 0
    if not gap or mean(gap) <= max(3 * error(gap), least):
        return ""
    share = sum(gains[key] for key in gap) / sum(gap.values())
    half = reach({key: gains[key] - share * gap[key] for key in gap}) / mean(gap)
    told = f"{100 * share:.0f} %"
    if half:
        told += f" [{100 * (share - half):.0f}, {100 * (share + half):.0f}]"
    return told
