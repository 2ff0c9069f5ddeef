"""The test accuracy of a trial's model, measured once, at the end of a sweep."""

from __future__ import annotations

from pathlib import Path

import torch

from pruners import PrunableViT
from pruners.training.evaluation import evaluate
from search.data.splits import open_split, trial_device
from search.sweep.spec import Sweep
from search.trial.trial_files import check_model


def measure_on_test(directory: Path, sweep: Sweep, dense: PrunableViT) -> float:
    """Measure a trial's model on the test split, in percent.

    Raises:
        ValueError: If it is not what the trial left.
    """
    check_model(directory)
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    device = trial_device(sweep)
    vit = PrunableViT.load(directory).to(device)
    vit.use_fused_attention(device.type == "cuda")
    images = open_split(sweep, dense, "test")
    return evaluate(
        vit, images.batches(sweep.data.eval_batch_size, seed=None, augment=False, device=device)
    ).top1
