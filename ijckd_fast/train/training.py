"""A run while it trains: what is logged, evaluated and saved, and when. loop.py says in which order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijckd_fast import files, head as ops, signals
from ijckd_fast.data import Batch, Loader
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import UserError, out_of_memory
from ijckd_fast.evaluate import BoundMeter, Evaluation, chain_line, evaluate, overall
from ijckd_fast.nets import Tapped
from ijckd_fast.normalisation import IMAGENET
from ijckd_fast.parallel import Processes
from ijckd_fast.train import checkpoint, report, run_folder, stops
from ijckd_fast.train.build import RunData, cached_features
from ijckd_fast.train.config import TrainConfig
from ijckd_fast.train.log import RunLog
from ijckd_fast.train.meters import Stopwatch, memory_mb
from ijckd_fast.train.overlap import warnings_of_seen_images
from ijckd_fast.train.progress import TrainingProgress
from ijckd_fast.train.resolving import amp_dtype_of, data_folder_of, normalisations_of
from ijckd_fast.train.state import RunState


@dataclass
class Training:
    """A run between its first step and its last: its state, and all that it talks to. `train` is the only one that
    makes it.
    """

    config: TrainConfig
    folder: Path
    data: RunData
    distiller: Distiller
    state: RunState
    show: TrainingProgress
    val_loader: Loader
    device: torch.device
    processes: Processes

    def __post_init__(self) -> None:
        self.teacher_val: Evaluation | None = None
        self._terms = BoundMeter(self.distiller) if self.config.log_bound else None
        self._log: RunLog | None = None  # of the process with rank 0
        self._writer = checkpoint.Writer()
        self._saved_at = time.perf_counter()
        self.state.start_clock()

    def introduce(self) -> None:
        """Says what is trained on what."""
        config, data, state, show = self.config, self.data, self.state, self.show
        show.begin(state.step, data.total_steps)
        show.say(
            f"{self.folder}: {config.teacher or 'no teacher'} -> {config.student} by {config.objective}; "
            f"{len(data.train)} images of {data.train.num_classes} classes at {config.image_size} pixels, "
            f"{data.steps_per_epoch} steps an epoch, "
            f"{data.total_steps} in all"
            + (
                f"; {self.processes.world} processes, {config.global_batch} images a step"
                if self.processes.world > 1
                else ""
            )
            + (f"; continuing from step {state.step}" if state.step else "")
        )
        if said := data_folder_of(config).about_val():
            show.say(f"{said}: {len(data.val):,}")
            for warning in warnings_of_seen_images(config, data.cache):
                show.say(warning)
        for index in (data.train, data.val):
            if index.skipped:
                show.say(f"{index.skipped:,} images of {index.folder} have a negative label and are skipped")
        given, own = normalisations_of(config)
        if given != IMAGENET or own != given:
            teachers = f"; the teacher's by {own}, as its weights expect" if own != given else ""
            show.say(f"images are normalised by {given}{teachers}")
        for role, net in (("teacher", self.distiller.teacher), ("student", self.distiller.student)):
            for note in net.notes if isinstance(net, Tapped) else ():
                show.say(f"{role}: {note}")
        if pairs := self.distiller.stage_pairs:
            named = ", ".join(f"{stage_s.path} with {stage_t.path}" for stage_s, stage_t in pairs)
            show.say(f"stages compared, student's with teacher's: {named}")
        if data.cache is not None:
            show.say(
                f"teacher's features from {data.cache.path}: {data.cache.views} views of each image, begun again every "
                f"{data.cache.views} epochs"
            )
            for i, why in data.cache.unreadable.items():
                show.bad_file("another image of its class stands in for it")(data.train.absolute(i), why)

    @contextlib.contextmanager
    def leaving_traces(self, resume: bool) -> Iterator[None]:
        """Inside, the folder is this run's: an earlier run is gone, settings and environment are written, the log is
        open. A full disk is said with how the run continues.
        """
        remedy = f"free some space, then continue with ijckd-fast train --resume {self.folder}"
        with files.disk_full_told(f"in {self.folder}", remedy), self._writer:
            if self.processes.is_main:
                if not resume:
                    run_folder.clear(self.folder)
                run_folder.write_config(self.folder, self.config)
                run_folder.write_environment(self.folder)
                self._log = RunLog(
                    self.folder,
                    self.state.step,
                    tensorboard=self.config.tensorboard,
                    wandb=self.config.wandb,
                    logged=self.state.logged,
                    say=self.show.say,
                )
            with self._log if self._log is not None else contextlib.nullcontext():
                yield

    @contextlib.contextmanager
    def running(self, loader: Loader) -> Iterator[Iterator[tuple[Batch, Tensor | None]]]:
        """Inside, signals are noted, progress is shown, and the nets are in training mode; gives the batches of
        `loader`.

        Each with the teacher's pooled features [B, Ct] of its images, where they come from a cache.
        """
        self._loader = loader
        stream = self.processes.each(loader)
        if self.config.head == "fused":
            ops.take_bad_rows(self.device)  # what this process did before is not this run's
        with signals.noted() as self._asked, self.show:
            self.distiller.train()
            self._watch = Stopwatch(self.device, self.processes)
            self._saved_at = time.perf_counter()
            yield self._batches(stream)
            if self._asked.signum:
                raise stops.stopped_at_the_end(self._asked.signum, self.folder)

    def _batches(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor | None]]:
        while True:
            with self._watch.waiting():
                batch = next(stream)
                pooled_t = None
                if self.data.cache is not None:
                    pooled_t = cached_features(self.data.cache, self._loader, self.device)  # [B, Ct]
            yield batch, pooled_t

    # --- after a step ---

    def count(self, figures: Mapping[str, Tensor], images: int) -> None:
        """Takes in the figures of a step; the host waits for nothing."""
        self.state.step += 1
        self.processes.at_step(self.state.step)
        self.state.meter.add(figures)
        self._watch.count(images)
        self.show.step(self.state.step)
        self._writer.check()

    @property
    def _epoch(self) -> float:
        return self.state.step / self.data.steps_per_epoch

    @property
    def _at_end(self) -> bool:
        return self.state.step == self.data.total_steps

    def log_if_due(self, lr: float) -> None:
        """A row of the log; UserError where it says that the run is not worth continuing."""
        config, state, show = self.config, self.state, self.show
        if state.step % config.log_interval and not self._at_end:
            return
        means, bad, overflows = state.meter.take()
        correct = means.pop("correct")
        state.skipped_steps += bad
        row = {
            "epoch": self._epoch,
            **means,
            "top1_train_percent": None if correct is None else 100 * correct / config.batch_size,
            "lr": lr,
            **self._watch.take(),
            "memory_mb": memory_mb(self.device),
            "skipped_steps": state.skipped_steps,
            "unreadable_files": sum(self.processes.gather(len(self._loader.bad_files))),
        }
        if state.update.scaler.is_enabled():
            row |= {"loss_scale": state.update.scaler.get_scale(), "overflows": overflows}
        if self._log is not None:
            self._log.write("train", state.step, row)
        show.row(state.step, row)
        if bad:
            show.say(
                f"skipped {bad} of the last steps: loss or gradient was NaN or infinite ({state.skipped_steps} so far)"
            )
        if config.head == "fused":
            self._look_at_bad_rows()
        if state.skipped_steps > config.nonfinite_limit:
            self._end_together()
            raise stops.too_many_skipped(state.skipped_steps, state.step, self.folder)
        if row.get("loss_scale", 1.0) < 1.0:
            self._end_together()
            raise stops.loss_scale_gone(state.step, self.folder)

    def _look_at_bad_rows(self) -> None:
        """Of all processes: labels that a GPU could not use end the run, a saturated softmax is a warning."""
        each = self.processes.gather(tuple(ops.take_bad_rows(self.device)))
        labels, saturated = map(sum, zip(*each, strict=True))
        if labels:
            raise stops.bad_labels(self.config, labels, self.state.step, self.data.train.num_classes)
        if saturated:
            self.show.say(
                f"warning: {saturated} images of the last steps had a logit so far above their "
                f"label's that the softmax "
                "saturated: their part of loss and gradient is too small"
            )

    def evaluate_if_due(self) -> None:
        """The val split, by the averaged weights where there are any; the best so far is saved."""
        state, show = self.state, self.show
        if state.step % (self.config.eval_every * self.data.steps_per_epoch) and not self._at_end:
            return
        ema = state.update.ema
        with self._watch.paused(), contextlib.nullcontext() if ema is None else ema.swapped_in():
            self.processes.share_buffers(state.learner)
            self.distiller.eval()
            evaluation = evaluate(
                self.distiller.predict if self._terms is None else self._terms.predict,
                self.val_loader,
                device=self.device,
                amp_dtype=amp_dtype_of(self.config),
                teacher=self.teacher_val,
                note=None if self._terms is None else self._terms.note,
                processes=self.processes,
            )
            of_bound = None if self._terms is None else bound_row(self._terms, self.processes, show.say)
            self.distiller.train()
        state.evaluated = {"step": state.step, "epoch": self._epoch, **evaluation.row()}
        if self._log is not None:
            self._log.write("eval", state.step, state.evaluated)
        agreement = evaluation.agreement
        against = "" if agreement is None else f", agreement with the teacher {agreement:.2f} %"
        show.say(
            f"step {state.step}/{self.data.total_steps}: val top-1 {evaluation.top1:.2f} %, "
            f"top-5 {evaluation.top5:.2f} %{against}"
        )
        if of_bound is not None:
            show.say(f"bound, % of the images: {chain_line(of_bound)}")
            if self._log is not None:
                self._log.write("bound", state.step, {"epoch": self._epoch, **of_bound})
        if state.best is None or evaluation.top1 > state.best["top1_percent"]:
            state.best = state.evaluated
            with self._watch.paused():
                self.save(run_folder.BEST)

    def save_if_due(self) -> None:
        """last.pt, by the clock, by steps, at the end, or because of a signal to any process. Stopped where that was to
        stop.
        """
        config, state, show, asked = self.config, self.state, self.show, self._asked
        minutes = (time.perf_counter() - self._saved_at) / 60
        by_steps = config.checkpoint_steps is not None and state.step % config.checkpoint_steps == 0
        due = minutes >= config.checkpoint_minutes or by_steps or self._at_end
        signum, usr1, anyone_due = self.processes.most(asked.signum, asked.save, due)
        if usr1 and not signum:
            show.say(f"SIGUSR1: saving {self.folder / run_folder.LAST} at step {state.step}, training continues")
        if signum or usr1 or anyone_due:
            signals.saved()
            with self._watch.paused():
                self.save(run_folder.LAST)
            self._saved_at = time.perf_counter()
        if signum and not self._at_end:
            self._end_together()
            raise stops.stopped_by(signum, state.step, self.data.total_steps, self.folder)

    def save(self, name: str) -> None:
        """Called by all processes, written by the one with rank 0 while training continues."""
        if self._log is not None:
            self.state.logged = self._log.logged
        saved = self.state.saved()
        if saved is None:
            return
        then = functools.partial(self._written, saved.step) if name == run_folder.LAST else None
        self._writer.save(self.folder / name, saved.as_dict(), then)

    def _written(self, step: int) -> None:
        """last.pt of a step is there."""
        self.processes.resumed_by(stops.how_to_resume(self.folder, step))
        if self.config.keep_checkpoints > 1:
            run_folder.keep_as(self.folder, f"checkpoint-{step}.pt", self.config.keep_checkpoints)

    # --- where a run ends ---

    def _end_together(self) -> None:
        """All processes end at this step; those that write nothing need not wait for the one that does."""
        self.processes.leave()
        self._writer.wait()

    def save_alone(self) -> bool:
        """Writes last.pt where this process can do so alone, before an error of its own ends it; returns whether it
        could.
        """
        if self.processes.world > 1:  # to save takes all of them
            return False
        self.save(run_folder.LAST)
        self._writer.wait()
        return True

    def explain(self, error: Exception, batch: Batch, pooled_t: Tensor | None, progress: float) -> None:
        """Raises the sentence for an error of a step, where there is one."""
        config, state = self.config, self.state
        if out_of_memory(error):
            fits = None
            if self.processes.world == 1:
                fits = state.update.largest_part_that_fits(batch, pooled_t, progress)
                self.save_alone()
            raise stops.memory_ran_out(config, state.step, self.folder, fits) from error
        if config.batch_size <= config.accumulate and "per channel" in str(error):
            raise stops.one_value_per_channel() from error

    def finish(self, cost: tuple[int, int]) -> dict[str, Any]:
        """Writes summary and report, and returns the summary; cost as `Distiller.deployed_cost` gives it."""
        self._writer.wait()
        bad_files = len(self._loader.bad_files) + len(self.val_loader.bad_files)
        unreadable = sum(self.processes.gather(bad_files))
        summary: dict[str, Any] = {}
        if self._log is not None:
            self._log.close()
            rows, state = run_folder.read_log(self.folder), self.state
            speeds = [row["images_per_s"] for row in rows if row["kind"] == "train"]
            summary = {
                "complete": True,
                "config": dataclasses.asdict(self.config),
                "inputs": dict(state.inputs),
                "steps": state.step,
                "last": state.evaluated,
                "best": state.best,
                "teacher_top1_percent": None if self.teacher_val is None else self.teacher_val.top1,
                "params": cost[0],
                "macs": cost[1],
                "processes": self.processes.world,
                "images_per_s": statistics.median(speeds) if speeds else None,  # its log may be lost
                "skipped_steps": state.skipped_steps,
                "unreadable_files": unreadable,
                "seconds": state.seconds,
            }
            report.write_report(self.folder, summary, rows)
            files.write_json(self.folder / run_folder.SUMMARY, summary)
            self.show.say(f"report: {self.folder / run_folder.REPORT}")
        self.processes.resumed_by(f"The run in {self.folder} is finished")
        return self.processes.from_main(summary)


def bound_row(terms: BoundMeter, processes: Processes, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The overall figures of the bound that were noted in the last evaluation; None, and a warning, where features are
    not finite.
    """
    try:
        return overall(terms.take(processes))
    except UserError as error:
        say(f"warning: no bound is logged: {error}")
        return None
