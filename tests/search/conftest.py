from __future__ import annotations

from pathlib import Path

import pytest

MINIMAL = """
name = "a"
budget = [0.3, 0.8]
trials = 4
epochs = 1
model.name = "vit_tiny_patch16_224"
data = { train = "t", val = "v", test = "s" }
steps = [{ method = "magnitude", scope = "layer" }]
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path
