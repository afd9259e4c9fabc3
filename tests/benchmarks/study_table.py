"""The tables of the study in Markdown, those of the README among them, from the runs in a study.json.

    cd tests/benchmarks; python study_table.py study/runs.json > study/tables.md

R@1 by embeddings unless a column says otherwise. The main arms are compared on the pairs of target and seed that all
six have, the others on ICFG style, seed by seed; gaps and differences are those of the pairs that both sides have.
Means are over pairs, +- standard deviations and [95 % intervals] over seeds, since runs of one seed share what they
start from. Of two pairs both differences stand there, since an interval of two says nothing.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mra import contrasts, study  # noqa: E402

LOSSES = {"regions": "with", "pairs": "without", "released": "box ignored"}
TITLES = dict(zip(study.STAGES, ("not fine-tuned", "DaD of a tenth", "fine-tuned on a tenth", "on all")))
Values = dict[tuple[str, int], float]       # of (target, seed)


def mean(values: Values) -> str:
    return f"{statistics.mean(values.values()):.1f}" if values else ""


def difference(gains: Values) -> str:
    return ", ".join(f"{gain:+.1f}" for gain in gains.values()) if len(gains) == 2 else contrasts.interval(gains)


def differences(runs: list[dict], metric: str = "R@1", ranked: str = "embeddings") -> str:
    """Of all that are compared in mra/study.py, those of these runs, after every stage."""
    rows = []
    for name, pair in study.CONTRASTS.items():
        some, others = (contrasts.of(runs, *one) for one in pair)
        if some.keys() & others.keys():
            rows.append({f"difference of {metric}": name})
            learned = any(study.learns(arm) for _, arm in pair)
            for stage, title in TITLES.items():
                if stage == study.STAGES[1] and not learned:
                    continue
                rows[-1][title] = difference(contrasts.paired(some, others, stage, metric, ranked))
    return contrasts.as_table(rows)


def gaps(runs: list[dict]) -> str:
    """What DaD closes of the gap between the source and exact drawings, after every stage."""
    return contrasts.as_table([
        {"gap closed by DaD": f"{title}, {LOSSES[losses]} region losses"}
        | {said: contrasts.closed(runs, losses, "dad", stage, *metric) or "no sure gap"
           for stage, said in TITLES.items()}
        for title, metric in (("R@1", ()), ("mAP", ("mAP",)), ("re-ranked R@1", ("R@1", "re-ranked")))
        for losses in ("regions", "pairs")])


def table(runs: list[dict], groups: list[tuple[str, str]]) -> str:
    """One row an arm; of several seeds with deviations, of one with the shares of the gap in brackets."""
    alone, rows = len({one["seed"] for one in runs}) == 1, []
    for arm, losses in groups:
        some, cells = contrasts.of(runs, losses, arm), {}
        for stage, title in TITLES.items():
            if arm == "none" and "zero-shot" in stage or stage == study.STAGES[1] and not study.learns(arm):
                continue
            share = ""              # a single run's gap after fine-tuning is within the noise
            if alone and "zero-shot" in stage and arm not in ("source", "exact"):
                share = contrasts.closed(runs, losses, arm, stage)
            cells[title] = contrasts.spread(contrasts.scores(some, stage)) + f" ({share})" * bool(share)
        mean_ap, twins, reranked = (mean(contrasts.scores(some, "zero-shot", *metric)) if arm != "none" else ""
                                    for metric in (("mAP",), ("twins R@1",), ("R@1", "re-ranked")))
        first, *others = TITLES.values()
        rows.append({"images": f"`{arm}`", "region losses": LOSSES[losses], first: cells.get(first, ""), "mAP": mean_ap,
                     "twins": twins, "re-ranked": reranked} | {title: cells.get(title, "") for title in others} | {
                     "other targets, after all": mean(contrasts.elsewhere(some, "all"))})
    return contrasts.as_table(rows)


def one_by_one(runs: list[dict]) -> str:
    """The main arms not fine-tuned, a row for each target and seed that has any of them."""
    rows = []
    for target, seed in sorted({(one["target"], one["seed"]) for one in runs}):
        own = [one for one in runs if (one["target"], one["seed"]) == (target, seed)]
        row = {"target": target, "seed": str(seed)}
        for losses in ("regions", "pairs"):
            arms = {arm: contrasts.of(own, losses, arm) for arm in ("source", "dad", "exact")}
            row |= {f"{arm} {LOSSES[losses]}": mean(contrasts.scores(some, "zero-shot")) for arm, some in arms.items()}
            row[f"gap closed, {LOSSES[losses]}"] = (
                contrasts.row(own, losses, "dad", "zero-shot")["gap closed"] if arms["dad"] else "")
        rows.append(row)
    return contrasts.as_table(rows)


def main(path: str) -> None:
    runs = json.loads(Path(path).read_text())
    common = set.intersection(*(set(contrasts.of(runs, losses, arm)) for arm, losses in study.MAIN))
    whole = [one for one in runs
             if (one["target"], one["seed"]) in common and (one["arm"], one["losses"]) in study.MAIN]
    in_icfg = [one for one in runs if one["target"] == "icfg"]
    by_seed = ""
    for seed in sorted({one["seed"] for one in in_icfg}):
        some = [one for one in in_icfg if one["seed"] == seed]
        done = [(arm, losses) for losses in study.LOSSES for arm in study.ARMS if contrasts.of(some, losses, arm)]
        by_seed += f"Seed {seed}:\n\n{table(some, done)}\n"
    pairs = ", ".join(f"{target} {seed}" for target, seed in sorted(common))
    print(f"{len(runs)} of {len(list(study.plan(study.StudyConfig())))} runs.\n\n"
          f"## Main arms (targets and seeds: {pairs})\n\n{table(whole, study.MAIN)}\n"
          f"{differences(whole)}\n{gaps(whole)}\n"
          f"## Each target and seed: main arms with and without region losses, not fine-tuned\n\n{one_by_one(runs)}\n"
          f"## All arms, ICFG style\n\n{by_seed}Differences:\n\n{differences(in_icfg)}\n"
          "## Main arms: differences of other figures\n\n"
          f"Re-ranked:\n\n{differences(whole, 'R@1', 're-ranked')}\n"
          + "\n".join(differences(whole, metric) for metric in ("mAP", "twins R@1", "rest R@1")), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
