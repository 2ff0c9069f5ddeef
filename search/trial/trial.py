"""One trial: apply the plan to the dense model, measure it, fine-tune epoch by epoch."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path

import torch

from pruners import Plan, PrunableViT, cost_of
from pruners.families.learned import Learned
from pruners.training.evaluation import Evaluation
from pruners.training.fine_tune import TrainingLeftError
from pruners.training.optimisation import NonFiniteLossError
from search.records.events import EpochResult, TrialConfig
from search.records.lease import check_attempt
from search.trial.context import TrialContext, time_limit
from search.trial.inputs import TrialInputs
from search.trial.measuring import latency_ms, too_slow, validate
from search.trial.memory import is_out_of_memory
from search.trial.preemption import ToldToEndError
from search.trial.training import Training, trial_seed
from search.trial.trial_files import Saved, TrialFiles, TunerState
from search.trial.workers import Workers


class Trial:
    """A trial: a step is an epoch; the first cuts and measures, untrained.

    All trials see the same images in the same epoch, in the same order. Every random number depends
    on (the sweep's seed, the configuration's `seed`, trial, epoch) alone, so a resumed trial is the
    same trial; another `seed` in the configuration trains the same plan on another stream of
    images.

    Its state is saved after each epoch (`search.trial.trial_files`), and in the middle of one if
    its process is told to end. A trial that is resumed, since its actor or the whole sweep died,
    first reports again what was saved: the driver may not have heard all of it.

    A trial that runs out of memory goes back to what was saved and passes batches in twice as many
    parts; one whose epoch takes longer than `max_epoch_hours` has its process ended.
    """

    vit: PrunableViT
    training: Training
    """From the cut to the end."""

    def __init__(self, context: TrialContext, config: TrialConfig, workers: Workers) -> None:
        """Begin, or resume from what was saved.

        Args:
            context: What the process has opened.
            config: What to do.
            workers: Those that train it.
        """
        self.context, self.workers = context, workers
        self._begin(config)

    @classmethod
    def first(cls, inputs: TrialInputs, config: TrialConfig, workers: Workers) -> Trial:
        """Open what the trials of this process share, and begin its first one."""
        with time_limit(inputs.sweep, inputs.directory, config.trial):
            return cls(TrialContext.open(inputs), config, workers)

    def next(self, config: TrialConfig) -> Trial:
        """Begin another trial in this one's place: torch is imported and the images are open."""
        self._release()
        with time_limit(self.context.sweep, self.context.directory, config.trial):
            return Trial(self.context, config, self.workers)

    def step(self) -> EpochResult:
        """Run one epoch and return its result.

        Raises:
            ToldToEndError: If it was; the next process reports again what was saved.
            SweepFailedError: If nothing can be saved, or another driver has taken over.
        """
        if self.repeats:
            return self.repeats.pop(0)
        context = self.context
        limit = time_limit(context.sweep, context.directory, self.config.trial)
        with limit, context.notice.heeded():
            result = self._step()
        if context.notice.given():
            raise ToldToEndError("the trial's process was told to end")
        return result

    def _step(self) -> EpochResult:
        start, fits = time.perf_counter(), True
        status, reason, loss = "running", "", 0.0
        try:
            loss = self._cut() if self.epoch < 0 else self._train()
            self.measured = validate(self.context, self.vit, self.config.parts)
            if self.epoch < 0:
                reason = self._measure_speed()
                status = "stopped" if reason else status
        except TrainingLeftError:
            self.seconds += time.perf_counter() - start
            self._save(self.workers.state(self.training.tuner))
            raise ToldToEndError("the trial's process was told to end") from None
        except NonFiniteLossError as error:
            status, reason = "failed", f"epoch {self.epoch + 1}: {error}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # go on outside: the error holds what filled the memory
        if not fits:
            if 2 * self.config.parts <= self.context.sweep.data.batch_size:
                return self._again_in_more_parts(time.perf_counter() - start)
            status, reason = "failed", f"epoch {self.epoch + 1}: out of memory"
        self.epoch += 1
        if status == "running" and self.epoch >= self.config.epochs:
            status = "finished"
        self.seconds += time.perf_counter() - start
        self.results.append(self._result(status, reason, loss))
        if status != "failed":
            self._save(self.workers.state(self.training.tuner) if status == "running" else None)
        return self.results[-1]

    def _again_in_more_parts(self, taken: float) -> EpochResult:
        """Run an epoch that did not fit into memory from its start: what it changed is not kept."""
        self._release()
        self._begin(dataclasses.replace(self.config, parts=2 * self.config.parts))
        self.repeats.clear()  # what is known
        self.seconds += taken
        return self._step()

    def _begin(self, config: TrialConfig) -> None:
        context = self.context
        self.config, self.plan = config, Plan.from_json(json.loads(config.plan))
        self.files = TrialFiles(context.directory, config)
        self.results: list[EpochResult] = []
        self.repeats: list[EpochResult] = []  # to be reported again
        self.remark = ""
        try:
            saved = self.files.load()
        except ValueError as error:  # what is damaged is never used
            saved, self.remark = None, f"began anew: {error}"
        if saved is not None:
            self._resume(saved)
            return
        self.epoch, self.seconds, self.latency_ms = -1, 0.0, 0.0
        self.measured = Evaluation(top1=0.0, loss=0.0, images=0, images_per_s=0.0)
        uncut = context.dense if config.origin == "dense" else context.start
        self.vit = copy.deepcopy(uncut).to(context.device).requires_grad_(True)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()

    def _release(self) -> None:
        """Free what takes memory on the device."""
        for name in ("training", "vit"):
            self.__dict__.pop(name, None)  # neither is there of a trial that had ended

    def _resume(self, saved: Saved) -> None:
        self.results, last = saved.results, saved.results[-1]
        self.repeats = list(saved.results)
        self.remark = last.reason
        self.epoch, self.seconds, self.latency_ms = last.epoch, saved.seconds, last.latency_ms
        self.measured = Evaluation(
            top1=last.val_top1,
            loss=last.val_loss,
            images=len(self.context.val_images),
            images_per_s=last.images_per_s,
        )
        if saved.tuner is not None:
            self.vit = PrunableViT.load(saved.directory).to(self.context.device)
            self._start_training()
            self.training.tuner.load_state_dict(saved.tuner)
            self.workers.resume(saved.tuner)

    def _cut(self) -> float:
        torch.manual_seed(trial_seed(self.context.sweep, self.config, 0))
        path = self.config.learned
        learned = Learned.load(Path(path)) if path else None
        self.plan.apply(self.vit, self.context.calibration, learned)
        self._start_training()
        return 0.0  # no loss

    def _start_training(self) -> None:
        self.training = Training(self.context, self.config, self.vit, self.workers.peers)

    def _train(self) -> float:
        """Train an epoch, or what is left of one; return its mean loss."""
        if self.training.tuner.steps == 0:
            self.plan.ramp(self.vit, self.context.calibration, self.epoch + 1)
        return self.workers.train(self.training, self.epoch + 1)

    def _measure_speed(self) -> str:
        """Measure the speed, and say why the trial need not be trained if it is too slow."""
        self.latency_ms = latency_ms(self.context, self.vit, self.measured)
        if self.config.origin == "dense":
            return ""
        return too_slow(self.context.sweep, self.latency_ms)

    def _save(self, tuner: TunerState | None) -> None:
        check_attempt(self.context.directory, self.context.attempt)
        self.files.save(self.vit, self.results, tuner, self.seconds)

    def _result(self, status: str, reason: str, loss: float) -> EpochResult:
        shape = self.vit.shape()
        cost = cost_of(shape)
        return EpochResult(
            trial=self.config.trial,
            epoch=self.epoch,
            status=status,
            reason=reason or self.remark,
            val_top1=self.measured.top1,
            val_loss=self.measured.loss,
            train_loss=loss,
            cost_ratio=self.config.cost_ratio,
            gmacs=cost.gmacs,
            effective_gmacs=cost.effective_gmacs,
            params=cost.params,
            density=cost.density,
            images_per_s=self.measured.images_per_s,
            latency_ms=self.latency_ms,
            seconds=self.seconds,
            shape=json.dumps(shape.to_json()),
            by_class=list(self.measured.by_class) if status != "running" else [],
        )
