"""The order in which trials start, against Ray's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from search.strategy.fifo import InOrder

STATES = (Trial.PENDING, Trial.RUNNING, Trial.PAUSED, Trial.TERMINATED, Trial.ERROR)


@given(st.lists(st.sampled_from(STATES), max_size=30), st.randoms(use_true_random=False))
def test_trials_start_in_rays_own_order(states: list[str], random: Any) -> None:
    trials = [
        SimpleNamespace(config={"trial": f"{i:04d}"}, status=status)
        for i, status in enumerate(states)
    ]
    live = [trial for trial in trials if trial.status not in (Trial.TERMINATED, Trial.ERROR)]
    random.shuffle(live)  # Ray keeps them in a set
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: live)
    chosen = InOrder().choose_trial_to_run(controller)
    assert chosen is FIFOScheduler().choose_trial_to_run(controller)
