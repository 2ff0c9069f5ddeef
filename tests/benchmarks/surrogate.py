"""A stand-in for training: top-1 of a plan of the sample's ViT, fitted to real trials.

The trials lie in data/trials.parquet; `surrogate_trials.py` trained them. A Gaussian process per
epoch maps what a plan keeps of each block to top-1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from quality_problem import TUNE_EPOCHS
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import KFold, cross_val_predict

from pruners import Plan

TRIALS = Path(__file__).parent / "data" / "trials.parquet"
KINDS = ("attn.head", "mlp.neuron", "token")
BLOCKS = 6
NOISE = 0.5  # points of top-1 between trainings of one plan; assumed

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """Predicts top-1 before fine-tuning and after each epoch."""

    models: tuple[GaussianProcessRegressor, ...]

    @classmethod
    def fit(cls) -> Surrogate:
        features, top1 = trials()
        return cls(
            models=tuple(_process().fit(features, top1[:, e]) for e in range(TUNE_EPOCHS + 1))
        )

    def curve(self, plan: Plan, rng: np.random.Generator) -> Floats:
        """Return top-1 [epochs + 1] of a plan, with noise that all epochs share.

        It is the prediction less its standard deviation: a search must not win by finding where
        the surrogate knows nothing.
        """
        features = kept(_shares(plan))[None]
        found = [model.predict(features, return_std=True) for model in self.models]
        means = np.array([mean[0] - std[0] for mean, std in found])
        return np.clip(means + rng.normal(0.0, NOISE), 0.0, 100.0)


def trials() -> tuple[Floats, Floats]:
    """Return features [n, 18] and top-1 [n, epochs + 1] of the real trials."""
    table = pq.read_table(TRIALS).to_pandas()
    shares = table[[f"blocks.{i}.{kind}" for kind in KINDS for i in range(BLOCKS)]].to_numpy()
    features = np.stack([kept(row.reshape(len(KINDS), BLOCKS)) for row in shares])
    return features, table[[f"top1_{e}" for e in range(TUNE_EPOCHS + 1)]].to_numpy()


def kept(shares: Floats) -> Floats:
    """Return the shares of heads, neurons and (cumulative) patches that stay, [18]."""
    heads, neurons, tokens = 1.0 - shares
    # ToMe merges at most half of the patches in a block.
    return np.concatenate([heads, neurons, np.cumprod(np.maximum(tokens, 0.5))])


def errors() -> list[tuple[float, float]]:
    """Return the root mean squared error and rank correlation of each epoch, 10-fold."""
    features, top1 = trials()
    folds = KFold(10, shuffle=True, random_state=0)
    found = []
    for epoch in range(TUNE_EPOCHS + 1):
        predicted = cross_val_predict(_process(), features, top1[:, epoch], cv=folds)
        rmse = float(np.sqrt(np.mean((predicted - top1[:, epoch]) ** 2)))
        found.append((rmse, float(spearmanr(predicted, top1[:, epoch]).statistic)))
    return found


def _process() -> GaussianProcessRegressor:
    warnings.simplefilter("ignore", ConvergenceWarning)
    kernel = ConstantKernel(1.0) * Matern(1.0, nu=2.5) + WhiteKernel(0.05)
    return GaussianProcessRegressor(
        kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0
    )


def _shares(plan: Plan) -> Floats:
    shares = {site: share for step in plan.steps for site, share in step.thresholds.items()}
    return np.array(
        [[shares.get(f"blocks.{i}.{kind}", 0.0) for i in range(BLOCKS)] for kind in KINDS]
    )
