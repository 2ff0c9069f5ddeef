"""One trial: apply the plan to the dense model, report, fine-tune epoch by epoch."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import Tensor

from pruners import Plan, PrunableViT, cost_of
from pruners.families.learned import Learned
from pruners.training.evaluation import Evaluation, evaluate, measured_rate
from pruners.training.fine_tune import FineTuner, TrainingLeftError
from pruners.training.optimisation import NonFiniteLossError
from pruners.training.recipe import Recipe
from search.data.augment import Epoch
from search.data.splits import Calibration, make_teacher, mixed_seed, open_split, trial_device
from search.records.lease import check_attempt
from search.sweep.spec import SweepFailedError
from search.trial.inputs import TrialInputs
from search.trial.memory import is_out_of_memory
from search.trial.preemption import Notice, ToldToEndError
from search.trial.trial_files import Saved, TrialFiles, hung_path
from search.trial.watchdog import ends_if_hung

LATENCY_BATCHES = 5
"""Batches that a model's speed is the median of; one more before them warms up."""


class PlanTrial(tune.Trainable):
    """A trial as Ray Tune runs it: a step is an epoch; the first cuts and measures, untrained.

    The actor is reused from trial to trial, so that torch is imported and the data opened only
    once. All trials see the same images in the same epoch, in the same order. Every random number
    depends on (the sweep's seed, the configuration's `seed`, trial, epoch) alone, so a resumed
    trial goes on as if nothing had happened; another `seed` in the configuration, 0 by default,
    trains the same plan on another stream of images.

    What it comes to is saved after each epoch (`search.trial.trial_files`), and in the middle of
    one if its process is told to end. A trial that starts anew, since its actor or the whole sweep
    died, first reports again what was saved: the driver may not have heard all of it.

    A trial that runs out of memory goes back to what was saved and passes batches in twice as many
    parts; one whose epoch takes longer than `max_epoch_hours` has its process ended.
    """

    vit: PrunableViT
    tuner: FineTuner
    epoch: int
    seconds: float
    latency_ms: float
    share = (0, 1)  # of each training batch that this process passes: the first of one

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        """Prepare the actor, then the first trial."""
        if inputs is None:
            raise ValueError("inputs is None; give TrialInputs through tune.with_parameters")
        self.sweep, self.directory, self.attempt = inputs.sweep, inputs.directory, inputs.attempt
        self.notice = Notice()
        torch.set_num_threads(max(1, int(self.sweep.resources.cpu)))
        self.device = trial_device(self.sweep)
        with self._ends_if_hung(config):
            self._open(inputs)
            self._begin(config)

    def _open(self, inputs: TrialInputs) -> None:
        self.dense = inputs.dense.eval().requires_grad_(False)
        self.start = inputs.start.eval().requires_grad_(False)
        for vit in (self.dense, self.start):
            vit.use_fused_attention(self.device.type == "cuda")
        self.train_images = open_split(self.sweep, self.dense, "train")
        self.val_images = open_split(self.sweep, self.dense, "val")
        for key, images in (("train", self.train_images), ("val", self.val_images)):
            _refuse_changed(f"data.{key}", images.digest, inputs)
        self.calibration = Calibration(self.sweep, self.train_images, self.device)
        self.teacher = make_teacher(self.sweep, self.dense, self.train_images, self.device)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare the next trial on the same actor."""
        with self._ends_if_hung(new_config):
            self._begin(new_config)
        return True

    def _ends_if_hung(self, config: dict[str, Any]) -> AbstractContextManager[None]:
        path = self.directory / hung_path(config["trial"])
        return ends_if_hung(path, 3600.0 * self.sweep.max_epoch_hours)

    def step(self) -> dict[str, Any]:
        """Run one epoch and return its metrics; the last result of a trial has `done`.

        Raises:
            ToldToEndError: If it was; the next process reports again what was saved.
        """
        if self.repeats:
            return self.repeats.pop(0)
        with self._ends_if_hung(self.config), self.notice.heeded():
            result = self._step()
        if self.notice.given():
            raise ToldToEndError("the trial's process was told to end")
        return result

    def _step(self) -> dict[str, Any]:
        start, fits = time.perf_counter(), True
        status, reason, loss = "running", "", 0.0
        try:
            loss = self._cut() if self.epoch < 0 else self._train()
            self.measured = evaluate(self.vit, self._val_batches())
            if self.epoch < 0:
                self.latency_ms = self._latency_ms()
                reason = self._too_slow()
                status = "stopped" if reason else status
        except TrainingLeftError:
            self.seconds += time.perf_counter() - start
            self._save(self.tuner.state_dict())
            raise ToldToEndError("the trial's process was told to end") from None
        except NonFiniteLossError as error:
            status, reason = "failed", f"epoch {self.epoch + 1}: {error}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # go on outside: the error holds what filled the memory
        if not fits:
            if 2 * self.parts <= self.sweep.data.batch_size:
                return self._again_in_more_parts(time.perf_counter() - start)
            status, reason = "failed", f"epoch {self.epoch + 1}: out of memory"
        self.epoch += 1
        if status == "running" and self.epoch >= self.config["epochs"]:
            status = "finished"
        self.seconds += time.perf_counter() - start
        self.results.append(self._result(status, reason, loss))
        if status != "failed":
            self._save(self.tuner.state_dict() if status == "running" else None)
        return dict(self.results[-1])  # Ray adds to it

    def _save(self, tuner: dict[str, Any] | None) -> None:
        check_attempt(self.directory, self.attempt)
        self.files.save(self.vit, self.results, tuner, self.seconds)

    def _again_in_more_parts(self, taken: float) -> dict[str, Any]:
        """Run an epoch that did not fit into memory from its start: what it changed is not kept."""
        del self.vit
        self.__dict__.pop("tuner", None)  # there is none before the cut
        self._begin({**self.config, "parts": 2 * self.parts})
        self.repeats.clear()  # what is known
        self.seconds += taken
        return self._step()

    def _begin(self, config: dict[str, Any]) -> None:
        self.config = config
        self.plan = Plan.from_json(json.loads(config["plan"]))
        self.files = TrialFiles(self.directory, config)
        self.parts = self.config.get("parts", 1)  # that a batch is passed in
        self.results: list[dict[str, Any]] = []
        self.repeats: list[dict[str, Any]] = []  # to be reported again
        self.remark = ""
        try:
            saved = self.files.load()
        except ValueError as error:  # what is damaged is never used
            saved, self.remark = None, f"began anew: {error}"
        if saved is not None:
            self._continue(saved)
            return
        self.epoch, self.seconds, self.latency_ms = -1, 0.0, 0.0
        self.measured = Evaluation(top1=0.0, loss=0.0, images=0, images_per_s=0.0)
        uncut = self.dense if config["origin"] == "dense" else self.start
        self.vit = copy.deepcopy(uncut).to(self.device).requires_grad_(True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _continue(self, saved: Saved) -> None:
        """Go on from what was saved."""
        self.results, last = saved.results, saved.results[-1]
        self.repeats = [dict(result) for result in saved.results]
        self.remark = last["reason"]
        self.epoch, self.seconds = last["epoch"], saved.seconds
        self.latency_ms = last["latency_ms"]
        self.measured = Evaluation(
            top1=last["val_top1"],
            loss=last["val_loss"],
            images=len(self.val_images),
            images_per_s=last["images_per_s"],
        )
        if saved.tuner is not None:
            self.vit = PrunableViT.load(saved.directory).to(self.device)
            self._new_tuner()
            self.tuner.load_state_dict(saved.tuner)

    def _cut(self) -> float:
        torch.manual_seed(self._trial_seed(0))
        path = self.config.get("learned", "")
        learned = Learned.load(Path(path)) if path else None
        self.plan.apply(self.vit, self.calibration, learned)
        self._new_tuner()
        return 0.0  # no loss

    def _train(self) -> float:
        """Train an epoch, or what is left of one; return its mean loss."""
        if self.tuner.steps == 0:
            self.plan.ramp(self.vit, self.calibration, self.epoch + 1)
        return self._pass()

    def _pass(self) -> float:
        return self.tuner.train_taught(self._train_batches(), self.notice.given)

    def _latency_ms(self) -> float:
        """Return the time per image; measured for itself where the sweep asks for speed."""
        data, sweep = self.sweep.data, self.sweep
        if sweep.cost != "latency" and sweep.constraints.min_images_per_s is None:
            return 1000.0 / self.measured.images_per_s
        images, _ = next(
            iter(self.val_images.batches(data.eval_batch_size, seed=None, augment=False))
        )
        rate = measured_rate(self.vit, images.to(self.device), LATENCY_BATCHES)
        return 1000.0 / rate

    def _too_slow(self) -> str:
        """Say why a trial need not be trained: it is slower than the sweep allows."""
        least = self.sweep.constraints.min_images_per_s
        rate = 1000.0 / self.latency_ms
        if least is None or rate >= least or self.config["origin"] == "dense":
            return ""
        return f"{rate:.4g} images/s is below min_images_per_s = {least:g}"

    def _new_tuner(self) -> None:
        batch = self.sweep.data.batch_size
        steps = max(1, len(self.train_images) // batch)
        recipe = Recipe(
            epochs=self.config["epochs"], **self.sweep.finetune.model_dump(exclude={"augment"})
        )
        distils = recipe.distill > 0.0
        # A loss on tokens compares them with the teacher's own, which are too many to keep.
        kept = self.vit.token_loss is None and self.teacher.fits(recipe.epochs)
        self.answered = distils and kept
        live = self.teacher.live if distils and not kept else None
        self.tuner = FineTuner(self.vit, recipe, steps, live)
        self.tuner.parts = self.parts

    def _train_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        number = self.epoch + 1
        stream = Epoch(mixed_seed(self.sweep.seed, self._own_seed()), number)
        answers = self.teacher.answers(stream) if self.answered else None
        done = self.tuner.steps
        if done == 0:  # else the generators are where they were
            torch.manual_seed(self._trial_seed(number))  # dropout and drop path
        batches = self.train_images.numbered(
            self.sweep.data.batch_size,
            order=stream,
            views=stream if self.sweep.finetune.augment else None,
            device=self.device,
            share=self.share,
        )
        for images, labels, rows in islice(batches, done, None):
            yield images, labels, None if answers is None else torch.from_numpy(answers[rows])

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, self.sweep.data.eval_batch_size // self.parts)
        return self.val_images.batches(size, seed=None, augment=False, device=self.device)

    def _trial_seed(self, epoch: int) -> int:
        return mixed_seed(self.sweep.seed, self._own_seed(), int(self.config["trial"]), epoch)

    def _own_seed(self) -> int:
        return int(self.config.get("seed", 0))

    def _result(self, status: str, reason: str, loss: float) -> dict[str, Any]:
        shape = self.vit.shape()
        cost = cost_of(shape)
        return {
            "trial": self.config["trial"],
            "epoch": self.epoch,
            "status": status,
            "reason": reason or self.remark,
            "val_top1": self.measured.top1,
            "val_loss": self.measured.loss,
            "train_loss": loss,
            "cost_ratio": self.config["cost_ratio"],
            "gmacs": cost.gmacs,
            "effective_gmacs": cost.effective_gmacs,
            "params": cost.params,
            "density": cost.density,
            "images_per_s": self.measured.images_per_s,
            "latency_ms": self.latency_ms,
            "seconds": self.seconds,
            "shape": json.dumps(shape.to_json()),
            "by_class": list(self.measured.by_class) if status != "running" else [],
            "done": status != "running",
        }


def _refuse_changed(key: str, digest: str, inputs: TrialInputs) -> None:
    """Stop the sweep if the images of a split are no longer those that it began with."""
    if inputs.identity.get(key, digest) != digest:
        raise SweepFailedError(f"{key} has changed since sweep {inputs.sweep.name} began")
