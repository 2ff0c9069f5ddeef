from __future__ import annotations

import torch

from search.data.splits import mixed_seed


def test_a_mixed_seed_depends_on_every_part_and_their_places() -> None:
    parts = [(0, 0), (0, 1), (1, 0), (1, 0, 0, 1), (1, 0, 1, 0), (2**80, 3), (3, 2**80)]
    seeds = {mixed_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    for seed in seeds:
        torch.manual_seed(seed)  # accepts them all
