from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from search.trial.preemption import ToldToEndError
from search.trial.retries import Retries

DIED = "The actor died unexpectedly before finishing this task.\nWorker exit type: SYSTEM_ERROR"


def test_failures_in_a_row_are_counted_for_each_trial() -> None:
    retries = Retries(2)
    assert [retries.allow("0001", DIED) for _ in range(4)] == [True, True, False, False]
    assert retries.allow("0002", DIED)
    retries.progressed("0001")
    assert [retries.allow("0001", DIED) for _ in range(3)] == [True, True, False]
    assert not Retries(0).allow("0001", DIED)


@pytest.mark.parametrize(
    "said",
    [
        "The actor 75a087c5 is unavailable: The actor is temporarily unavailable: Socket closed",
        "The actor is dead because its node has died. Node Id: 1234",
        str(RayTaskError("f", "", ToldToEndError("told")).as_instanceof_cause())
        + "\nsearch.notice.ToldToEndError: the trial's process was told to end",
    ],
)
def test_what_a_node_did_is_not_the_trials_fault(said: str) -> None:
    retries = Retries(0)
    assert all(retries.allow("0001", said) for _ in range(9))
    assert not retries.allow("0001", "ValueError: the trial's own")
