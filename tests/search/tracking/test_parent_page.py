from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from pruners.families.learned import Learned
from search.records.front import Front, build_front
from search.records.journal import Journal
from search.records.ledger import LEDGER
from search.records.trial_record import TrialRecord
from search.tracking.addresses import local_uri
from search.tracking.parent_page import ParentPage
from tests.search.logged import SHAPE, tracked
from tests.search.trial_records import DENSE, record


@pytest.fixture
def page(tmp_path: Path) -> ParentPage:
    client = MlflowClient(tracking_uri=local_uri(tmp_path))
    experiment = client.create_experiment("a", (tmp_path / "mlartifacts").as_uri())
    parent = client.create_run(experiment).info.run_id
    return ParentPage(client, parent, tracked(tmp_path), "sweep a", None)


def note_of(page: ParentPage) -> str:
    return page.client.get_run(page.parent).data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_the_note_follows_each_trial_and_pictures_now_and_then(
    page: ParentPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture takes long."""
    drawn: list[int] = []
    now = [0.0]

    def slowly(front: Front, records: Sequence[TrialRecord], *budgets: object) -> str:
        drawn.append(len(records))
        now[0] += 10.0
        return ""

    monkeypatch.setattr("search.tracking.parent_page.front_html", slowly)
    monkeypatch.setattr("search.tracking.parent_page.time.monotonic", lambda: now[0])
    records = [dataclasses.replace(DENSE, shape=SHAPE)]
    for number, later in enumerate((0.0, 100.0, 89.0, 2.0), 1):
        now[0] += later
        failed = number == 2  # the front is as it was
        records.append(
            record(
                f"{number:04d}",
                1.0 - 0.1 * number,
                None if failed else 50.0,
                "failed" if failed else "finished",
                shape=SHAPE,
            )
        )
        page.show(build_front(records, "effective_gmacs"), list(records), {})
        assert f"**Trials**: {number - (number > 1)} finished" in note_of(page)
    assert "1 failed" in note_of(page)
    assert drawn == [2, 5]  # 190 s after the first, which took 10 s


@pytest.mark.slow
def test_what_was_learned_is_drawn_by_class(page: ParentPage) -> None:
    path = page.sweep.directory / "x_pruner.safetensors"
    masks = {"blocks.0.mlp.neuron": torch.rand(5, 96), "blocks.0.attn.head": torch.rand(5, 3)}
    Learned(scores={}, by_class=masks, report={"seconds": 1.0}).save(path)
    runs = [{"label": "x_pruner", "learns": True, "path": str(path)}]
    Journal(page.sweep.directory / LEDGER).append({"event": "learned", "runs": runs})
    page.draw_learned()
    drawn = page.client.download_artifacts(page.parent, "units_by_class-x_pruner.png")
    assert np.asarray(Image.open(drawn).convert("L")).std() > 5  # not blank
