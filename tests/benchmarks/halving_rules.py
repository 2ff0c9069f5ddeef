"""Which rule of successive halving loses least: cost bands, or an epsilon-net over ranks.

    python tests/benchmarks/halving_rules.py

Replays the real trials of data/trials.parquet, each with its top-1 before fine-tuning and after
each epoch, in random orders. A rule decides at each rung who goes on; printed is how much of all
epochs was spent, and how much of the hypervolume of all trials is lost by what was stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
from epsilon_net import within_net
from quality_problem import TUNE_EPOCHS
from surrogate import TRIALS
from surrogate import trials as measured

from search.records import pareto
from search.strategy.rungs import Floats, within_band
from search.sweep.milestones import milestones

Rule = Callable[[Floats, Floats, int, float], bool]
RULES: dict[str, Rule] = {
    "cost bands": within_band,
    "epsilon-net": within_net,
    "at random": lambda costs, top1s, i, eta: bool(np.random.default_rng(i).random() < 1.0 / eta),
}
ORDERS = 40


def volume(costs: Floats, top1s: Floats) -> float:
    return pareto.hypervolume(costs, top1s / 100.0, reference_cost=1.0, reference_accuracy=0.5)


def replay(costs: Floats, top1s: Floats, rule: Rule, first: int, eta: float) -> tuple[int, Floats]:
    """Return the epochs that were spent, and which trials ran to their end.

    Args:
        costs: [n].
        top1s: Percent [n, epochs + 1].
        rule: Decides who goes on.
        first: Epoch of the first rung.
        eta: One in eta goes on.
    """
    rungs: dict[int, list[int]] = {rung: [] for rung in milestones(TUNE_EPOCHS, first, eta)}
    spent, ended = 0, []
    for trial in range(len(costs)):
        for rung, came in rungs.items():
            came.append(trial)
            if not rule(costs[came], top1s[came, rung], len(came) - 1, eta):
                spent += rung
                break
        else:
            spent += TUNE_EPOCHS
            ended.append(trial)
    return spent, np.array(ended)


def main() -> None:
    _, top1s = measured()
    costs = pq.read_table(TRIALS).column("cost_ratio").to_numpy()
    print(f"{len(costs)} trials, {ORDERS} orders; mean ± standard error\n")
    print("| first rung | eta | rule | epochs spent | hypervolume lost |")
    print("|---|---|---|---|---|")
    for first in (0, 1):
        for eta in (2.0, 3.0, 4.0):
            for name, rule in RULES.items():
                rows = []
                for seed in range(ORDERS):
                    order = np.random.default_rng(seed).permutation(len(costs))
                    own, curve = costs[order], top1s[order]
                    spent, ended = replay(own, curve, rule, first, eta)
                    kept = volume(own[ended], curve[ended, -1])
                    lost = 1.0 - kept / volume(own, curve[:, -1])
                    rows.append((100.0 * spent / (TUNE_EPOCHS * len(costs)), 100.0 * lost))
                spent, lost = np.mean(rows, axis=0)
                error = np.std(rows, axis=0, ddof=1)[1] / np.sqrt(ORDERS)
                print(
                    f"| {first} | {eta:g} | {name} | {spent:.0f} % | {lost:.2f} ± {error:.2f} % |"
                )


if __name__ == "__main__":
    main()
