"""All tables of the study in Markdown, from the runs in a study.json.

    python tests/study/study_table.py tests/study/runs.json > tests/study/tables.md

R@1 by embeddings unless a column says otherwise. The main arms are compared on the pairs of target and seed that all
six have, and so are those with augmentation once they have run; the others on ICFG style, seed by seed; gaps and
differences are those of the pairs that both sides have.
Means are over pairs, +- standard deviations and [95 % intervals] over seeds, since runs of one seed share their first
stage. Where there are two pairs, both differences stand in the cell, since an interval of two says nothing.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.study import comparisons, study  # noqa: E402
from tests.study.comparisons import Values  # noqa: E402

LOSSES = {"regions": "with", "pairs": "without", "released": "box ignored"}
TITLES = dict(zip(study.STAGES, ("not fine-tuned", "DaD of a tenth", "fine-tuned on a tenth", "on all")))
METRICS = {"R@1": (), "mAP": ("mAP",), "re-ranked R@1": ("R@1", "re-ranked")}      # of the gaps
BESIDE_AUGMENTED = [(arm, "regions") for arm in ("source", "dad", "exact")] + study.MAIN_AUGMENTED

# gaps that are shown: losses, arm and ends by the words for them
Gaps = dict[str, tuple[str, str, tuple[str, str]]]
GAPS: Gaps = {f"{LOSSES[losses]} region losses": (losses, "dad", comparisons.ENDS) for losses in ("regions", "pairs")}
AUGMENTED_GAPS: Gaps = {f"`augmented dad`, from `{ends[0]}` to `{ends[1]}`": ("regions", "augmented dad", ends)
                        for ends in (comparisons.ENDS, comparisons.AUGMENTED_ENDS)}


def mean(values: Values) -> str:
    return f"{comparisons.mean(values):.1f}" if values else ""


def has_stage(stage: str, *arms: str) -> bool:
    """Whether a stage is shown for these arms: without fine-tuning `none` has no result, and only DaD knows a tenth."""
    if stage == "zero-shot after a tenth":
        return any(map(study.learns, arms))
    return stage != "zero-shot" or "none" not in arms


def differences(runs: list[dict], metric: str = "R@1", ranked: str = "embeddings") -> str:
    """What study.py compares, for these runs, after every stage."""
    rows = []
    for name, pair in study.COMPARED.items():
        some, others = (comparisons.of(runs, *one) for one in pair)
        if not some.keys() & others.keys():
            continue
        row = {f"difference of {metric}": name}
        for stage, title in TITLES.items():
            if has_stage(stage, *(arm for _, arm in pair)):
                row[title] = difference(comparisons.paired(some, others, stage, metric, ranked))
        rows.append(row)
    return comparisons.as_table(rows)


def difference(gains: Values) -> str:
    if len(gains) == 2:
        return ", ".join(f"{gain:+.1f}" for gain in gains.values())
    return comparisons.interval(gains)


def gaps(runs: list[dict], shown: Gaps) -> str:
    """What DaD closes of the gap between the source and exact drawings, after every stage."""
    rows = []
    for title, metric in METRICS.items():
        for told, (losses, arm, ends) in shown.items():
            row = {"gap closed by DaD": f"{title}, {told}"}
            for stage, said in TITLES.items():
                row[said] = comparisons.gap_closed(runs, losses, arm, stage, *metric, ends=ends) or "no sure gap"
            rows.append(row)
    return comparisons.as_table(rows)


def table(runs: list[dict], groups: list[tuple[str, str]]) -> str:
    """One row an arm: with deviations for several seeds, with the gap closed in brackets for a single one."""
    rows = []
    for arm, losses in groups:
        some = comparisons.of(runs, losses, arm)
        cells = {title: "" for title in TITLES.values()}
        for stage, title in TITLES.items():
            if has_stage(stage, arm):
                cells[title] = comparisons.spread(comparisons.scores(some, stage))
                closed = single_gap_closed(runs, losses, arm, stage)
                if closed:
                    cells[title] += f" ({closed})"
        first, *others = TITLES.values()
        row = {"images": f"`{arm}`", "region losses": LOSSES[losses], first: cells[first]}
        for title, metric in (("mAP", ("mAP",)), ("twins", ("twins R@1",)), ("re-ranked", ("R@1", "re-ranked"))):
            row[title] = mean(comparisons.scores(some, "zero-shot", *metric))
        row |= {title: cells[title] for title in others}
        row["other targets, after all"] = mean(comparisons.elsewhere(some, "all"))
        rows.append(row)
    return comparisons.as_table(rows)


def single_gap_closed(runs: list[dict], losses: str, arm: str, stage: str) -> str:
    """The gap closed without fine-tuning where there is a single seed, whose gap after fine-tuning is within noise."""
    single = len({one["seed"] for one in runs}) == 1
    if not single or "zero-shot" not in stage or arm in ("source", "exact"):
        return ""
    return comparisons.gap_closed(runs, losses, arm, stage)


def one_by_one(runs: list[dict]) -> str:
    """The main arms not fine-tuned, a row for each target and seed that has any of them."""
    rows = []
    for target, seed in sorted({(one["target"], one["seed"]) for one in runs}):
        own = [one for one in runs if one["target"] == target and one["seed"] == seed]
        row = {"target": target, "seed": str(seed)}
        for losses in ("regions", "pairs"):
            for arm in ("source", "dad", "exact"):
                some = comparisons.of(own, losses, arm)
                row[f"{arm} {LOSSES[losses]}"] = mean(comparisons.scores(some, "zero-shot"))
            closed = comparisons.gap_closed(own, losses, "dad", "zero-shot")
            row[f"gap closed, {LOSSES[losses]}"] = closed
        rows.append(row)
    return comparisons.as_table(rows)


def all_arms(runs: list[dict]) -> str:
    """A table of all arms for each seed."""
    text = ""
    for seed in sorted({one["seed"] for one in runs}):
        some = [one for one in runs if one["seed"] == seed]
        done = [(arm, losses) for losses in study.LOSSES for arm in study.ARMS if comparisons.of(some, losses, arm)]
        text += f"Seed {seed}:\n\n{table(some, done)}\n"
    return text


def count(runs: list[dict]) -> str:
    """How many of the runs are finished; of the arms that came later once one of them is.

    Those of the retired arm count, though they cannot be made any more.
    """
    told = f"{finished(runs, [arm for arm in study.ARMS if arm not in study.LATER])} runs"
    if any(one["arm"] in study.LATER for one in runs):
        told += f", and {finished(runs, study.LATER)} of the arms that came later"
    return f"{told}."


def finished(runs: list[dict], arms: Sequence[str]) -> str:
    """How many of how many runs of these arms are finished."""
    done = {(one["arm"], one["losses"], one["target"], one["seed"]) for one in runs if one["arm"] in arms}
    missing = [one for one in study.plan(study.StudyConfig())
               if one.arm in arms and (one.arm, one.losses, one.target, one.seed) not in done]
    return f"{len(done)} of {len(done) + len(missing)}"


def on_common_pairs(runs: list[dict], groups: list[tuple[str, str]]) -> tuple[list[dict], str]:
    """The runs of these arms on the pairs of target and seed that all of them have, and a list of the pairs."""
    common = set.intersection(*(set(comparisons.of(runs, losses, arm)) for arm, losses in groups))
    whole = [one for one in runs if (one["target"], one["seed"]) in common and (one["arm"], one["losses"]) in groups]
    return whole, ", ".join(f"{target} {seed}" for target, seed in sorted(common))


def with_augmentation(runs: list[dict]) -> str:
    """The section of the main arms with augmentation beside those without; empty while a pair of all is missing."""
    whole, pairs = on_common_pairs(runs, BESIDE_AUGMENTED)
    if not whole:
        return ""
    return (f"## Main arms with augmentation (targets and seeds: {pairs})\n\n{table(whole, BESIDE_AUGMENTED)}\n"
            f"{differences(whole)}\n{gaps(whole, AUGMENTED_GAPS)}\n")


def main(path: str) -> None:
    runs = json.loads(Path(path).read_text())
    whole, pairs = on_common_pairs(runs, study.MAIN)
    in_icfg = [one for one in runs if one["target"] == "icfg"]
    others = "\n".join(differences(whole, metric) for metric in ("mAP", "twins R@1", "rest R@1"))
    print(f"{count(runs)}\n\n"
          f"## Main arms (targets and seeds: {pairs})\n\n{table(whole, study.MAIN)}\n"
          f"{differences(whole)}\n{gaps(whole, GAPS)}\n{with_augmentation(runs)}"
          f"## Each target and seed: main arms with and without region losses, not fine-tuned\n\n{one_by_one(runs)}\n"
          f"## All arms, ICFG style\n\n{all_arms(in_icfg)}Differences:\n\n{differences(in_icfg)}\n"
          "## Main arms: differences of other figures\n\n"
          f"Re-ranked:\n\n{differences(whole, 'R@1', 're-ranked')}\n{others}", end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
