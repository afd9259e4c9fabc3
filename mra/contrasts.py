"""The study's finished runs compared: paired by target and seed, with intervals over seeds, as rows of tables.

A run is a dictionary, its run.json; an arm's runs are kept by (target, seed). Figures are R@1 by embeddings unless a
function says otherwise. Before: nothing. After: study.py.
"""

import statistics

METRICS = {"R@1": ("R@1",), "mAP": ("mAP",), "re-ranked R@1": ("R@1", "re-ranked"), "R@1 of twins": ("twins R@1",)}
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # 97.5 % of t with 1 to 9 degrees of freedom or more


def of(runs: list[dict], losses: str, arm: str) -> dict[tuple[str, int], dict]:
    """The runs of an arm by (target, seed)."""
    return {(one["target"], one["seed"]): one for one in runs if (one["losses"], one["arm"]) == (losses, arm)}


def comparable(group: dict) -> dict:
    """R@1 without fine-tuning of each arm, on the targets and seeds that all have; where there is none, on its own."""
    common = set.intersection(*map(set, group.values())) if group else set()
    return {arm: [scores(some, "zero-shot")[key] for key in sorted(common or some)] for arm, some in group.items()}


def scores(some: dict, stage: str, metric: str = "R@1", ranked: str = "embeddings") -> dict[tuple[str, int], float]:
    """An arm's figures on its own targets after a stage, by (target, seed)."""
    return {key: one["results"][stage][one["target"]][ranked][metric] for key, one in some.items()
            if stage in one["results"]}


def elsewhere(some: dict, stage: str) -> dict[tuple[str, int], float]:
    """An arm's mean R@1 on the targets that are not its own, where it was tested there, by (target, seed)."""
    return {key: statistics.mean(ranked["embeddings"]["R@1"] for target, ranked in one["results"][stage].items()
                                 if target != one["target"])
            for key, one in some.items() if len(one["results"][stage]) > 1}


def paired(some: dict, others: dict, stage: str, *metric: str) -> dict[tuple[str, int], float]:
    """By how much an arm is better than another, for every (target, seed) that both have."""
    first, second = (scores(arm, stage, *metric) for arm in (some, others))
    return {key: first[key] - second[key] for key in first if key in second}


def row(runs: list[dict], losses: str, arm: str, stage: str) -> dict[str, str]:
    """A table's row: means over targets and seeds; to `source` and `exact` of the same losses, targets and seeds."""
    some = of(runs, losses, arm)
    gains = paired(some, of(runs, losses, "source"), stage)
    labelled = sorted({one["labelled"][stage] for one in some.values()})
    return {"losses": losses, "arm": arm, "runs": str(len(some)), "labelled pairs": " to ".join(map(str, labelled)),
            **{title: spread(scores(some, stage, *metric)) for title, metric in METRICS.items()},
            "R@1 - source": "" if arm == "source" else interval(gains), "gap closed": closed(runs, losses, arm, stage),
            } | ({"R@1 on other targets": spread(others)} if (others := elsewhere(some, stage)) else {})


def contrast(runs: list[dict], one: tuple[str, str], other: tuple[str, str], stage: str) -> dict[str, str]:
    """How much better one (losses, arm) is than another where both have run; nothing where they have not."""
    some, others = of(runs, *one), of(runs, *other)
    gains = {title: paired(some, others, stage, *metric)
             for title, metric in {**METRICS, "R@1 of the rest": ("rest R@1",)}.items()}
    return {"stage": stage, "runs": str(len(gains["R@1"]))} | {
        title: interval(values) for title, values in gains.items()} if gains["R@1"] else {}


def as_table(rows: list[dict[str, str]]) -> str:
    """Markdown; a row without a column has an empty cell there."""
    columns = max(rows, key=len, default={})
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "".join(
        f"| {' | '.join(cells.get(column, '') for column in columns)} |\n" for cells in rows)


def by_seed(values: dict[tuple[str, int], float]) -> list[float]:
    """Means over targets: runs of a seed share their first stage, and are not independent."""
    return [statistics.mean(value for (_, own), value in values.items() if own == seed)
            for seed in sorted({seed for _, seed in values})]


def spread(values: dict[tuple[str, int], float]) -> str:
    """Mean over all, and standard deviation over seeds."""
    means = by_seed(values)
    more = f" +- {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{more}"


def error(values: dict[tuple[str, int], float]) -> float:
    """Standard error of the mean; 0 where a single seed shows none.

    Seeds are the independent ones: it is that of a mean of clusters, of whatever number of targets each.
    """
    mean, seeds = statistics.mean(values.values()), {seed for _, seed in values}
    parts = [sum(value - mean for (_, own), value in values.items() if own == seed) / len(values) for seed in seeds]
    return (sum(part * part for part in parts) * len(seeds) / (len(seeds) - 1)) ** 0.5 if len(seeds) > 1 else 0.0


def reach(values: dict[tuple[str, int], float]) -> float:
    """Half the length of the mean's 95 % confidence interval (Student's); 0 where a single seed has none."""
    seeds = len({seed for _, seed in values})
    return error(values) * STUDENT[min(seeds - 1, len(STUDENT)) - 1] if seeds > 1 else 0.0


def interval(gains: dict[tuple[str, int], float]) -> str:
    """Mean of paired differences and its 95 % confidence interval over seeds."""
    if not gains:
        return ""
    mean, half = statistics.mean(gains.values()), reach(gains)
    return f"{mean:+.1f}" + f" [{mean - half:+.1f}, {mean + half:+.1f}]" * (len({seed for _, seed in gains}) > 1)


def closed(runs: list[dict], losses: str, arm: str, stage: str, *metric: str) -> str:
    """The share of the gap that an arm closes, (arm - source) / (exact - source) of means over common pairs.

    Its interval is that of a ratio, to first order. Where the gap is not three standard errors wide, none is closed.
    """
    some, source, exact = (of(runs, losses, name) for name in (arm, "source", "exact"))
    gains, whole = paired(some, source, stage, *metric), paired(exact, source, stage, *metric)
    both = gains.keys() & whole.keys()
    gap = {key: whole[key] for key in both}
    if not both or statistics.mean(gap.values()) <= 3 * error(gap):
        return ""
    share = sum(gains[key] for key in both) / sum(gap.values())
    half = reach({key: gains[key] - share * gap[key] for key in both}) / statistics.mean(gap.values())
    return f"{100 * share:.0f} %" + (f" [{100 * (share - half):.0f}, {100 * (share + half):.0f}]" if half else "")
