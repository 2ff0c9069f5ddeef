"""The JSON of a trial's events, as files of 2026-11-26 hold it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from search.records.events import (
    METRICS,
    EpochResult,
    Event,
    TrialConfig,
    TrialEnd,
    of_trial,
)
from search.records.journal import Journal
from search.records.ledger import LEDGER, Ledger
from search.sweep.toml import load_sweep
from search.trial.trial_files import TrialFiles
from tests.search.trial_events import config_of, result_of

ASKED = (
    '{"event": "asked", "time": 1795840846891, "config": {"trial": "0000", "origin": "dense", '
    '"plan": "{\\"steps\\": []}", "learned": "", "parameters": {"budget": 0.5, "evit.on": true, '
    '"order": "late"}, "of": "", "seed": 0, "epochs": 0, "cost_ratio": 1.0}}'
)
EPOCH = (
    '{"event": "epoch", "time": 1795840851863, "result": {"val_top1": 20.0, '
    '"val_loss": 1.654982566833496, "train_loss": NaN, "gmacs": 0.000130284, '
    '"effective_gmacs": 0.000130284, "cost_ratio": 1.0, "params": 4757, "density": 1.0, '
    '"images_per_s": 5842.356853627841, "latency_ms": 0.1711637999960658, '
    '"seconds": 0.007177434999903198, "trial": "0000", "epoch": 0, "status": "finished", '
    '"reason": "", "shape": "{\\"dim\\": 12}", "by_class": [0.0, null, 100.0]}}'
)
ENDED = (
    '{"event": "ended", "time": 1795840851863, "trial": "0000", "status": "dense", "reason": "", '
    '"count": 1, "hypervolume": null, "front_size": 0}'
)
SAVED = "e88a2d62cc59d86587be01a8723d2b98a8ac10a731533286a4567aa74e5d6ba4"
"""The digest that such a configuration, of the dense model, has in its `results.json`."""

EVENTS = (ASKED, EPOCH, ENDED)


def part_of(event: Event) -> dict[str, Any]:
    """What an event says of a trial."""
    rest = {key: value for key, value in event.items() if key not in ("event", "time")}
    return rest.get("config") or rest.get("result") or rest


@pytest.mark.parametrize(
    ("line", "kind"), [(ASKED, TrialConfig), (EPOCH, EpochResult), (ENDED, TrialEnd)]
)
def test_what_the_ledger_held_is_read_and_written_as_it_was(line: str, kind: type) -> None:
    event = json.loads(line)
    found = of_trial(event)
    assert isinstance(found, kind)
    assert json.dumps(found.to_json()) == json.dumps(part_of(event))
    if kind is not EpochResult:  # of which NaN is no NaN's equal
        assert kind.from_json(found.to_json()) == found  # type: ignore[attr-defined]


def test_events_of_the_sweep_are_of_no_trial() -> None:
    assert of_trial({"event": "began", "time": 1}) is None
    assert of_trial({"event": "stopped", "time": 1, "why": "6 trials"}) is None


def test_a_result_knows_its_metrics() -> None:
    result = of_trial(json.loads(EPOCH))
    assert isinstance(result, EpochResult)
    assert list(result.metrics()) == [*METRICS] == [*part_of(json.loads(EPOCH))][:11]
    assert math.isnan(result.metrics()["train_loss"])
    assert set(result.finite()) == {*METRICS} - {"train_loss"}
    assert type(result.metrics()["params"]) is float


def test_a_report_is_a_result_that_says_whether_it_is_the_last() -> None:
    for status, done in (("running", False), ("finished", True), ("failed", True)):
        result = result_of("0001", status=status)
        report = result.to_report()
        assert report == {**result.to_json(), "done": done}
        assert EpochResult.from_report({**report, "training_iteration": 1}) == result
    del report["density"]
    with pytest.raises(ValueError, match="a result of trial 0001 has no density; report it after"):
        EpochResult.from_report(report)


def test_the_digest_of_a_configuration_is_what_it_was(tmp_path: Path) -> None:
    dense = of_trial(json.loads(ASKED))
    assert isinstance(dense, TrialConfig)
    assert TrialFiles(tmp_path, dense).digest == SAVED
    assert TrialFiles(tmp_path, dataclasses.replace(dense, parts=4)).digest == SAVED
    assert TrialFiles(tmp_path, dataclasses.replace(dense, seed=1)).digest != SAVED


def test_parts_are_told_where_they_are_more_than_one() -> None:
    whole, parts = config_of("0001"), config_of("0001", parts=2)
    assert "parts" not in whole.to_json()
    assert parts.to_json() == whole.to_json() | {"parts": 2}
    assert TrialConfig.from_json(parts.to_json()) == parts


WRONG = {"trial": "../x", "epoch": "x", "count": None, "params": 1.5, "origin": 3, "status": "new"}


def damaged() -> list[tuple[str, str, dict[str, Any]]]:
    """Each event without one of its keys, with one that it has not, and with odd values."""
    found = []
    for line in EVENTS:
        event = json.loads(line)
        kind, part = event["event"], part_of(event)
        found += [
            (kind, f"{key} missing", {k: v for k, v in part.items() if k != key}) for key in part
        ]
        found += [(kind, f"{k} odd", part | {k: v}) for k, v in WRONG.items() if k in part]
        found.append((kind, "x unknown", part | {"x": 1}))
    return found


@pytest.mark.parametrize(
    ("kind", "part"), [pytest.param(k, part, id=f"{k}: {what}") for k, what, part in damaged()]
)
def test_what_is_no_such_event_is_refused_as_damage_of_the_ledger(
    kind: str, part: dict[str, Any], sweep_file: Path
) -> None:
    sweep = load_sweep(sweep_file)
    sweep.directory.mkdir(parents=True)
    path = sweep.directory / LEDGER
    for line in EVENTS:
        event = json.loads(line)
        if event["event"] == kind:
            inner = {"asked": {"config": part}, "epoch": {"result": part}}.get(kind, part)
            event = {"event": kind, "time": 1, **inner}
        Journal(path).append(event)
    with pytest.raises(ValueError, match=r"ledger\.jsonl lacks what came before") as caught:
        Ledger(sweep)
    assert "\n" not in str(caught.value)


def test_a_ledger_of_these_events_is_read(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    sweep.directory.mkdir(parents=True)
    for line in EVENTS:
        Journal(sweep.directory / LEDGER).append(json.loads(line))
    record = Ledger(sweep).records["0000"]
    assert (record.status, record.val_top1, record.by_class) == ("dense", 20.0, [0.0, None, 100.0])
    assert record.parameters == {"budget": 0.5, "evit.on": True, "order": "late"}
