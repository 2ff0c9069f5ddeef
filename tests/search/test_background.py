from __future__ import annotations

import threading
import time

import pytest

from search.background import Background


def test_calls_are_made_in_order_and_nobody_waits_for_them() -> None:
    release, made = threading.Event(), []
    background = Background()
    background.call(release.wait)
    for number in range(50):
        background.call(made.append, number)
    assert made == []
    release.set()
    background.wait()
    assert made == list(range(50))


def test_they_are_made_on_one_thread_which_is_not_the_callers() -> None:
    background, threads = Background(), []
    for _ in range(20):
        background.call(lambda: threads.append(threading.get_ident()))
    background.wait()
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_what_a_call_raises_is_raised_from_then_on_and_later_calls_are_left_out() -> None:
    background, made, release = Background(), [], threading.Event()
    background.call(release.wait)
    background.call(made.append, 1)
    background.call(int, "no number")
    background.call(made.append, 2)
    release.set()
    for use in (background.wait, background.wait, lambda: background.call(made.append, 3)):
        with pytest.raises(ValueError, match="no number"):
            use()
    assert made == [1]


def test_calls_that_wait_are_bounded() -> None:
    release, waits = threading.Event(), []
    background = Background(most_waiting=3)
    background.call(release.wait)

    def hurry() -> None:
        for number in range(4):
            background.call(int)
            waits.append(number)

    thread = threading.Thread(target=hurry)
    thread.start()
    deadline = time.monotonic() + 5
    while len(waits) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert waits == [0, 1]  # with the one that is being made, three
    release.set()
    thread.join(timeout=5)
    assert waits == [0, 1, 2, 3]
    background.wait()
