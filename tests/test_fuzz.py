"""Each format, damaged again and again: it is read, or refused in one line that names it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from search.data import decode
from search.trial.trial_files import RESULTS, TUNER
from tests import fuzz_files, fuzz_models
from tests.fuzz_format import Format

FORMATS: dict[str, Callable[[Path], Format]] = {
    "sweep.toml": fuzz_files.sweep,
    "--set": fuzz_files.setting,
    "shards": fuzz_files.shards,
    **{
        kind: partial(fuzz_files.image, kind)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
    },
    "shape.json": fuzz_models.shape,
    "model.safetensors": fuzz_models.weights,
    "vit.safetensors": fuzz_models.plain_weights,
    "learned": fuzz_models.learned,
    "learning state": fuzz_models.state,
    "journal": fuzz_files.journal,
    "ledger.jsonl": fuzz_files.ledger,
    "mlflow.jsonl": fuzz_files.mlflow_notes,
    "front.json": fuzz_files.front,
    "trials.parquet": fuzz_files.trials,
    "teacher answers": fuzz_files.answers,
    "teacher note": fuzz_files.answers_note,
    "decoded images": partial(fuzz_files.decoded, suffix=".arrow"),
    "decoded note": partial(fuzz_files.decoded, suffix=".json"),
    "results.json": partial(fuzz_models.trial, name=RESULTS),
    "served note": fuzz_models.served_note,
    "tuner.pt": partial(fuzz_models.trial, name=TUNER),
}
"""Format -> what builds it in a folder."""

TIMES = int(os.environ.get("FUZZ", "300"))
"""How often each format is damaged; `make fuzz` does it 10,000 times, every night."""

PER_EXAMPLE = 100


@pytest.mark.slow
@pytest.mark.timeout(600 if TIMES > 1000 else 120)
@pytest.mark.filterwarnings("error", "ignore:::PIL")
@pytest.mark.parametrize("build", FORMATS.values(), ids=FORMATS.keys())
def test_what_is_damaged_is_read_or_refused_by_name(
    build: Callable[[Path], Format], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "LARGEST_PIXELS", 1_000_000)  # larger ones take long
    form = build(tmp_path)
    form.read()  # the sample is sound
    ends: Counter[str] = Counter()

    @settings(
        max_examples=TIMES // PER_EXAMPLE,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
    )
    @given(st.integers(0, 2**63 - 1))
    def damage(seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in range(PER_EXAMPLE):
            content = form.damage(random)
            form.path.write_bytes(content)
            try:
                form.read()
            except ValueError as error:
                _check_message(error, form.named, content)
                ends["refused"] += 1
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}, in {form.path}: {content[:2000]!r}")
                raise
            else:
                ends["read"] += 1

    damage()
    assert ends.total() == TIMES
    assert min(ends["read"], ends["refused"]) >= TIMES / 200, ends  # neither too tame nor too wild


def _check_message(error: ValueError, named: str, content: bytes) -> None:
    message = str(error)
    # Of Unicode, JSON and Arrow the errors are ValueErrors too, but say nothing of the file.
    assert named in message, f"{error!r} does not name {named}: {content[:2000]!r}"
    assert "\n" not in message, f"{error!r}: {content[:2000]!r}"
