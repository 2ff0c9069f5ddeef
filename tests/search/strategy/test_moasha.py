"""The scheduler by itself, in a simulated sweep, and in real ones that are interrupted."""

from __future__ import annotations

import heapq
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from search.records.events import TrialEnd
from search.records.pareto import front, hypervolume
from search.strategy.moasha import MoAsha, Rung
from search.strategy.rungs import Floats, bracket_of
from tests.search.trial_events import config_of, result_of

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def trial(name: str, origin: str = "search", status: str = Trial.RUNNING) -> Any:
    return SimpleNamespace(config=config_of(name, origin=origin).to_json(), status=status)


def result(
    epoch: int, top1: float, cost: float = 0.5, trial: str = "0007", **more: Any
) -> dict[str, Any]:
    found = result_of(trial, epoch=epoch, val_top1=top1, cost_ratio=cost, **more)
    return found.to_report()


def report(scheduler: MoAsha, name: str, epoch: int, top1: float, cost: float = 0.5) -> str:
    return scheduler.on_trial_result(None, trial(name), result(epoch, top1, cost, name))


def at_rung(scheduler: MoAsha, epoch: int, bracket: int = 0) -> dict[str, tuple[float, bool]]:
    rung = scheduler.rungs[bracket, epoch]
    _, top1s = rung.counted(set(), 1.0, 0.0)
    return {
        name: (top1, passed)
        for (name, passed), top1 in zip(rung.passed.items(), top1s[:-1], strict=True)
    }


def test_the_best_of_a_rung_go_on() -> None:
    # All of one cost, so that who is among the best half is known.
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    arrivals = [70.0, 72.0, 71.0, 73.0, 71.5, 72.5]
    decided = [report(scheduler, f"{i:04d}", 1, top1) for i, top1 in enumerate(arrivals)]
    assert decided == [CONTINUE, CONTINUE, STOP, CONTINUE, STOP, CONTINUE]
    # At the next rung the count begins anew, with those that came.
    assert [report(scheduler, f"{i:04d}", 2, 74.0 + i) for i in (5, 1, 3)] == [
        CONTINUE,
        CONTINUE,
        STOP,
    ]


def test_results_between_rungs_decide_nothing() -> None:
    scheduler = MoAsha(epochs=9, first=1, eta=3.0, brackets=1)
    for epoch in (0, 2, 4, 5, 8, 9):
        for i in range(6):
            assert report(scheduler, f"{i:04d}", epoch, 70.0 - i) == CONTINUE
    assert {key: rung.passed for key, rung in scheduler.rungs.items()} == {(0, 1): {}, (0, 3): {}}


def test_a_trial_is_counted_once_and_hears_the_same_again() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    assert [report(scheduler, f"{i:04d}", 1, 70.0 + i) for i in (3, 2, 1)] == [
        CONTINUE,
        CONTINUE,
        STOP,
    ]
    before = at_rung(scheduler, 1)
    assert report(scheduler, "0001", 1, 90.0) == STOP  # whatever it is now
    assert report(scheduler, "0003", 1, 0.0) == CONTINUE
    assert at_rung(scheduler, 1) == before


def test_a_stopped_trial_that_comes_past_its_rung_is_stopped() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    for i in (3, 2, 1):
        report(scheduler, f"{i:04d}", 1, 70.0 + i)
    assert report(scheduler, "0001", 2, 99.0) == STOP
    assert report(scheduler, "0001", 3, 99.0) == STOP
    # A trial that has to repeat epochs before the rung that stopped it comes to that rung again.
    assert report(scheduler, "0001", 0, 20.0) == CONTINUE


@given(
    results=st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(0.0, 100.0)), max_size=80),
    failed=st.sets(st.integers(0, 90)),
)
def test_a_rung_counts_all_but_failed_trials(
    results: list[tuple[float, float]], failed: set[int]
) -> None:
    rung = Rung()
    for i, (cost, top1) in enumerate(results):
        rung.add(f"{i:04d}", cost, top1, passed=i % 3 == 0)
    costs, top1s = rung.counted({f"{i:04d}" for i in failed}, 0.5, 70.0)
    counted = [r for i, r in enumerate(results) if i not in failed]
    assert [*zip(costs, top1s, strict=True)] == [*counted, (0.5, 70.0)]
    assert rung.passed == {f"{i:04d}": i % 3 == 0 for i in range(len(results))}


@pytest.mark.parametrize("origin", ["dense", "ladder", "confirm", "final"])
def test_some_trials_always_run_to_their_end(origin: str) -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    for i in range(4):
        report(scheduler, f"{i:04d}", 1, 70.0 + i)
    before = at_rung(scheduler, 1)
    exempt = trial("0009", origin)
    assert scheduler.on_trial_result(None, exempt, result(1, 0.0)) == CONTINUE
    assert scheduler.on_trial_result(None, exempt, {"epoch": 1}) == CONTINUE
    assert at_rung(scheduler, 1) == before


@pytest.mark.parametrize("origin", ["alone", "earlier", "search", "refined"])
def test_others_compete(origin: str) -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    trials = [trial(f"{i:04d}", origin) for i in range(3)]
    decided = [
        scheduler.on_trial_result(None, one, result(1, 70.0 - i, 0.5, one.config["trial"]))
        for i, one in enumerate(trials)
    ]
    assert decided == [CONTINUE, CONTINUE, STOP]


@pytest.mark.parametrize("key", ["epoch", "val_top1", "cost_ratio", "status"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_missing_value_is_refused_by_name(key: str, epoch: int) -> None:
    scheduler = MoAsha(epochs=9, first=1, eta=3.0, brackets=1)
    values = result(epoch, 70.0)
    del values[key]
    with pytest.raises(ValueError, match=f"a result of trial 0007 has no {key}"):
        scheduler.on_trial_result(None, trial("0007"), values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["epoch", "val_top1", "cost_ratio"])
def test_a_value_that_is_not_finite_is_refused_by_name(key: str, value: float) -> None:
    scheduler = MoAsha(epochs=9, first=1, eta=3.0, brackets=1)
    with pytest.raises(ValueError, match=f"{key} of trial 0007 is {value}"):
        scheduler.on_trial_result(None, trial("0007"), {**result(1, 70.0), key: value})
    assert at_rung(scheduler, 1) == {}
    failed = {**result(1, 70.0, status="failed"), key: value}  # says so itself
    assert scheduler.on_trial_result(None, trial("0007"), failed) == CONTINUE


def test_a_cost_of_nothing_is_refused() -> None:
    scheduler = MoAsha(epochs=9, first=1, eta=3.0, brackets=1)
    with pytest.raises(ValueError, match=r"cost_ratio of trial 0007 is 0\.0; report a share"):
        scheduler.on_trial_result(None, trial("0007"), result(1, 70.0, cost=0.0))


def fail_by_report(scheduler: MoAsha, name: str) -> None:
    scheduler.on_trial_result(None, trial(name), result(2, math.nan, trial=name, status="failed"))


def fail_at_the_end(scheduler: MoAsha, name: str) -> None:
    scheduler.on_trial_complete(None, trial(name), result(2, math.nan, trial=name, status="failed"))


def die(scheduler: MoAsha, name: str) -> None:
    scheduler.on_trial_error(None, trial(name))


@pytest.mark.parametrize("fail", [fail_by_report, fail_at_the_end, die])
def test_results_of_failed_trials_are_not_counted(fail: Any) -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    for i, top1 in enumerate([75.0, 74.0, 73.0, 72.0]):
        report(scheduler, f"{i:04d}", 1, top1)
    assert report(scheduler, "0010", 1, 72.5) == STOP  # the fourth of five
    fail(scheduler, "0000")
    fail(scheduler, "0001")
    assert report(scheduler, "0011", 1, 72.6) == CONTINUE  # the second of four


def test_a_finished_or_stopped_trial_still_counts() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    for i, top1 in enumerate([75.0, 74.0, 73.0]):
        report(scheduler, f"{i:04d}", 1, top1)
    scheduler.on_trial_complete(None, trial("0000"), result(8, 78.0, status="finished"))
    scheduler.on_trial_complete(None, trial("0002"), result(1, 73.0))
    assert scheduler.failed == set()
    assert report(scheduler, "0003", 1, 73.5) == STOP


def test_a_trial_that_runs_again_counts_again() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    for i, top1 in enumerate([75.0, 74.0, 73.0, 72.0]):
        report(scheduler, f"{i:04d}", 1, top1)
    for name in ("0000", "0001"):
        scheduler.on_trial_error(None, trial(name))
        scheduler.on_trial_add(None, trial(name, status=Trial.PENDING))
    assert report(scheduler, "0010", 1, 73.5) == STOP  # the third of five
    # A continued sweep adds those that have ended as well: they stay failed.
    for name, status in (("0000", Trial.ERROR), ("0001", Trial.TERMINATED)):
        scheduler.on_trial_error(None, trial(name))
        scheduler.on_trial_add(None, trial(name, status=status))
    assert report(scheduler, "0011", 1, 73.2) == CONTINUE  # the second of four


def test_brackets_start_later_and_share_no_rung() -> None:
    scheduler = MoAsha(epochs=9, first=0, eta=3.0, brackets=4)
    assert sorted(scheduler.rungs) == [(0, 0), (0, 1), (0, 3), (1, 1), (1, 3), (2, 3)]
    names: dict[int, list[str]] = {b: [] for b in range(4)}
    for number in range(1, 200):
        names[bracket_of(number, scheduler.weights)].append(f"{number:04d}")
    assert min(map(len, names.values())) > 10
    for b in (0, 1, 2, 3):
        for epoch in (0, 1, 3):
            # Every trial is worse than all before it, in all brackets.
            decided = [
                report(scheduler, name, epoch, 90.0 - 10 * b - i)
                for i, name in enumerate(names[b][4 * epoch : 4 * epoch + 4])
            ]
            stops = (b, epoch) in scheduler.rungs
            assert decided == [CONTINUE] * 3 + [STOP if stops else CONTINUE]
    for b, epoch in scheduler.rungs:
        assert set(at_rung(scheduler, epoch, b)) == set(names[b][4 * epoch : 4 * epoch + 4])


def test_only_a_run_without_objectives_of_its_own_is_accepted() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    assert scheduler.set_search_properties(None, None) is True
    assert scheduler.metric is None  # so that Ray looks for none in the results
    assert scheduler.set_search_properties("val_top1", "max") is False


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eta": 1.0}, "eta is 1.0"),
        ({"first": 8}, "first is 8 of 8 epochs"),
        ({"brackets": 5}, "brackets is 5, with 3 rungs"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoAsha(**{"epochs": 8, "first": 1, "eta": 2.0, "brackets": 1, **wrong})


def test_the_rungs_in_a_line() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=2)
    first = [f"{n:04d}" for n in range(20) if bracket_of(n, scheduler.weights) == 0]
    for i, name in enumerate(first[:3]):
        report(scheduler, name, 1, 70.0 - i)
    die(scheduler, first[0])
    assert scheduler.debug_string() == (
        "MO-ASHA, bracket/epoch: 0/1: 2 of 3, 0/2: 0 of 0, 0/4: 0 of 0, 1/2: 0 of 0, "
        "1/4: 0 of 0; 1 failed"
    )


def told(epoch: int, top1: float, cost: float, trial: str) -> dict[str, Any]:
    """A result as the ledger holds it."""
    return {key: of for key, of in result(epoch, top1, cost, trial).items() if key != "done"}


def ended_as(name: str, status: str) -> dict[str, Any]:
    end = TrialEnd(trial=name, status=status, reason="", count=1, hypervolume=None, front_size=0)
    return {"event": "ended", "time": 1, **end.to_json()}


def events_of(reports: list[tuple[str, int, float, float]]) -> list[dict[str, Any]]:
    """What a ledger holds of reports."""
    names = dict.fromkeys(name for name, *_ in reports)
    asked = [{"event": "asked", "config": trial(name).config} for name in names]
    epochs = [
        {"event": "epoch", "result": told(epoch, top1, cost, name)}
        for name, epoch, top1, cost in reports
    ]
    return [{"event": "began"}, *asked, *epochs]


def decided_at(scheduler: MoAsha) -> dict[tuple[int, int], dict[str, tuple[float, bool]]]:
    return {(b, epoch): at_rung(scheduler, epoch, b) for b, epoch in scheduler.rungs}


def test_a_scheduler_that_goes_on_decides_as_the_one_before() -> None:
    settings = {"epochs": 9, "first": 1, "eta": 3.0, "brackets": 2}
    generator = np.random.default_rng(4)
    reports = [
        (f"{int(i):04d}", epoch, float(generator.normal(70, 3)), float(generator.uniform(0.3, 0.8)))
        for epoch in (1, 3)
        for i in generator.permutation(40)
    ]
    whole = MoAsha(**settings)
    expected = [report(whole, *r) for r in reports[:30]]
    die(whole, "0003")
    expected += [report(whole, *r) for r in reports[30:]]
    ended = [ended_as("0003", "failed")]
    for cut in (0, 1, 17, 30, 55):
        after = MoAsha(**settings)
        after.replay(events_of(reports[: min(cut, 30)]))
        if cut >= 30:
            after.replay([*ended, *events_of(reports[30:cut])])
        decided = [report(after, *r) for r in reports[cut:30]]
        die(after, "0003")
        decided += [report(after, *r) for r in reports[max(cut, 30) :]]
        assert decided == expected[cut:]
        # What it had decided it says again.
        assert [report(after, *r) for r in reports[: min(cut, 30)]] == expected[: min(cut, 30)]
        assert decided_at(after) == decided_at(whole)
        assert after.debug_string() == whole.debug_string()
    assert 20 < expected.count(STOP) < 70


def test_what_is_exempt_or_has_failed_is_repeated_as_such() -> None:
    scheduler = MoAsha(epochs=8, first=1, eta=2.0, brackets=1)
    ladder = {"event": "asked", "config": trial("0009", "ladder").config}
    last = {"event": "epoch", "result": told(1, 10.0, 0.5, "0009")}
    reports = [(f"{i:04d}", 1, 75.0 - i, 0.5) for i in range(4)]
    failures = [
        ended_as(name, status)
        for name, status in (("0000", "failed"), ("0001", "failed"), ("0002", "stopped"))
    ]
    scheduler.replay([ladder, last, *events_of(reports), *failures])
    assert set(at_rung(scheduler, 1)) == {name for name, *_ in reports}
    assert scheduler.failed == {"0000", "0001"}
    assert report(scheduler, "0011", 1, 73.5) == CONTINUE  # the first of three


def curves(trials: int, epochs: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Costs [trials], and accuracies [epochs + 1, trials] without and with noise.

    As seen in sweeps: 30 to 76 % before fine-tuning, 69 to 78 % after, correlation 0.84, and cheap
    plans differ more than dear ones.
    """
    generator = np.random.default_rng(seed)
    costs = generator.uniform(0.3, 0.8, trials)
    best = 66 + 13 * np.log(costs / 0.2) / np.log(4)
    last = best - generator.exponential(1.6, trials) * (1.3 - costs)
    before = 75 - 55 * (79 - last) / 14 + generator.normal(0, 8.0, trials)
    pace = 0.7 * generator.uniform(0.7, 1.4, trials)  # epochs until 63 % is regained
    regained = 1 - np.exp(-np.arange(epochs + 1)[:, None] / pace)
    regained[-1] = 1.0
    true = np.clip(before, 5, 76) * (1 - regained) + last * regained
    return costs, true, true + generator.normal(0, 0.5, true.shape)


def simulate(scheduler: MoAsha, costs: Floats, seen: Floats, workers: int) -> tuple[list[int], int]:
    """Run trials as they become due; return which reached the end, and the epochs trained."""
    epochs, waiting = len(seen) - 1, iter(range(len(costs)))
    due = [(0.01 * next(waiting), i, 0) for i in range(workers)]
    ended, trained = [], 0
    generator = np.random.default_rng(5)
    while due:
        time, i, epoch = heapq.heappop(due)
        if epoch < epochs:
            decision = report(scheduler, f"{i:04d}", epoch, seen[epoch, i], costs[i])
        else:
            ended.append(i)
        if epoch < epochs and decision == CONTINUE:
            trained += 1
            heapq.heappush(due, (time + generator.uniform(0.9, 1.1), i, epoch + 1))
        elif (following := next(waiting, None)) is not None:
            heapq.heappush(due, (time + 0.2, following, 0))
    return ended, trained


def test_the_front_is_found_with_half_the_epochs() -> None:
    near, spent, area = [], [], []
    for seed in range(12):
        costs, true, seen = curves(60, 8, seed)
        last = true[-1]
        scheduler = MoAsha(epochs=8, first=2, eta=2.0, brackets=1)
        ended, trained = simulate(scheduler, costs, seen, workers=4)
        # A member of the true front is kept if something as good is, but for the noise.
        near += [
            any(costs[j] <= 1.05 * costs[i] and last[j] >= last[i] - 0.5 for j in ended)
            for i in np.flatnonzero(front(costs, last))
        ]
        spent.append(trained / (60 * 8))
        corner = {"reference_cost": 1.0, "reference_accuracy": 60.0}
        whole = hypervolume(costs, last, **corner)
        area.append(hypervolume(costs[ended], last[ended], **corner) / whole)
    # Measured: 0.947, 0.559 and 0.990. Where chance decides, 0.540, 0.500 and 0.921; the best of
    # neighbours without regard to the trend, 0.815, 0.535 and 0.973; the epsilon-net, 0.842, 0.500
    # and 0.984.
    assert np.mean(near) > 0.92
    assert np.mean(spent) < 0.6
    assert np.mean(area) > 0.985
