"""The training loop, read top to bottom: folder, data, nets, state, then steps, a log, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ijckd_fast import files, signals
from ijckd_fast.data import TooManyUnreadable, parity
from ijckd_fast.parallel import processes as distributed
from ijckd_fast.train import run_folder, same_run, stops
from ijckd_fast.train.begun import finished_summary, refuse_other_run, refuse_other_settings, settings_of
from ijckd_fast.train.build import (
    begin_state,
    build_distiller,
    build_train_loader,
    build_val_loader,
    open_data,
    prepare,
    set_up_torch,
)
from ijckd_fast.train.config import TrainConfig
from ijckd_fast.train.optimizer import learning_rate
from ijckd_fast.train.progress import TrainingProgress
from ijckd_fast.train.resolving import device_of, refuse_to_lose, resolve
from ijckd_fast.train.state import Saved
from ijckd_fast.train.teacher_checks import check_parity, digests, judge_teacher
from ijckd_fast.train.training import Training


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    resume_from: str = run_folder.LAST,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains one net; returns what summary.json in the run's folder says.

    config     every setting, see TrainConfig
    resume     continue from last.pt in config.output_dir; without it from another checkpoint there, which is said, and
               from the first step if the run died before it wrote any. The settings must be the run's, but for
               FREE_ON_RESUME. On a CPU the final weights then have the same bits as those of a run that was never
               interrupted; torch's number of threads becomes the run's for that.
    resume_from  the checkpoint in config.output_dir to continue from, last.pt or best.pt
    overwrite  delete the run in config.output_dir, once nothing else can be refused
    console    where progress is shown; default: standard output
    raises     UserError for mistakes in settings or data, a full disk, and too many steps that are not finite; Stopped
               on SIGINT, SIGTERM or SIGHUP, from the first step on after saving
    """
    config = resolve(config)
    folder = Path(config.output_dir or "")
    begin_at, saved = folder / resume_from, None
    facts = {}
    if distributed.world_size() > 1:
        facts = same_run.facts(config, resume=resume, resume_from=resume_from, overwrite=overwrite)
    patience = datetime.timedelta(minutes=config.dist_timeout)
    with (
        signals.handled(),
        distributed.started(config.device, config.dist_backend, facts=facts, patience=patience) as processes,
        contextlib.ExitStack() as closing,
    ):
        console = (console or Console()) if processes.is_main else Console(quiet=True)
        show = TrainingProgress(console, f"{config.objective} {config.student}", processes.rank)

        # --- the folder is this run's, and nothing in it is lost
        if processes.is_main:
            closing.enter_context(files.lock(folder))
        if resume:
            begin_at = _checkpoint_to_continue_from(folder / resume_from, processes, show.say)
            asked_for, resume_from = resume_from, begin_at.name
            refuse_other_settings(folder, config, settings_of(folder, resume_from, show.say))
            finished = processes.from_main(finished_summary(folder, config, show.say))
            if finished is not None:
                show.say(stops.nothing_to_resume(folder, asked_for))
                return finished
            if processes.from_main(begin_at.exists()) or resume_from != run_folder.LAST:
                saved = Saved.read(begin_at)
                refuse_other_run(begin_at, saved, config)
        elif processes.is_main:
            refuse_to_lose(folder, config, overwrite)
        closing.enter_context(stops.told_in(folder, processes))
        closing.enter_context(stops.memory_told_of(config))
        processes.resumed_by(stops.how_to_resume(folder))
        device = device_of(config, processes)
        set_up_torch(config)

        # --- data: every batch is a pure function of (index, seed, step)
        data = open_data(config, processes)
        left_out = show.bad_file("it is left out")
        val_loader = closing.enter_context(build_val_loader(config, data.val, device, processes, on_bad=left_out))

        # --- nets
        with processes.main_first():  # published weights are downloaded once
            distiller = build_distiller(config, data.train.num_classes, device)
        cost = distiller.deployed_cost(config.image_size)
        inputs = digests(data.train, data.val, distiller.teacher, data.cache)
        same_run.refuse_other_inputs(config, inputs, processes)
        prepare(config, distiller, processes)

        # --- where the run stands
        state = begin_state(config, data, distiller, inputs, device, processes)
        if saved is not None:
            state.restore(saved, begin_at, show.say)
            saved = None  # a copy of the weights less
            same_run.refuse_other_state(state, processes)
        training = Training(config, folder, data, distiller, state, show, val_loader, device, processes)
        training.introduce()
        if config.data_backend in parity.EXECUTORS and processes.is_main:
            check_parity(config, data.train, data.val, show.say)
        training.teacher_val = judge_teacher(config, folder, data, distiller, val_loader, inputs, processes, show.say)

        # --- an earlier run goes only now, when nothing can be refused any more
        closing.enter_context(training.leaving_traces(resume))
        if resume and resume_from != run_folder.LAST:
            training.save(run_folder.LAST)  # what lies there is damaged, gone, or later than the point to continue from

        # --- the loop; the host waits for the device only where it logs, evaluates or saves
        stand_in = show.bad_file("another image of its class stands in for it")
        loader = closing.enter_context(build_train_loader(config, data, device, start=state.step, on_bad=stand_in))
        batches = closing.enter_context(training.running(loader))
        while state.step < data.total_steps:
            try:
                batch, pooled_t = next(batches)  # images [B, 3, S, S], labels [B], those of mixing; [B, Ct] of a cache
            except TooManyUnreadable as error:
                raise stops.too_many_unreadable(error, state.step, folder, saved=training.save_alone()) from error
            except files.Damaged as error:  # of the cached features
                raise stops.cache_damaged(error, state.step, folder, saved=training.save_alone()) from error
            lr = learning_rate(
                state.step,
                steps_per_epoch=data.steps_per_epoch,
                epochs=config.epochs,
                lr=config.lr,
                schedule=config.schedule,
                milestones=config.milestones,
                gamma=config.gamma,
                warmup_epochs=config.warmup_epochs,
            )
            progress = state.step / data.steps_per_epoch
            try:
                figures = state.update(batch, pooled_t, step=state.step, lr=lr, progress=progress)
            except (RuntimeError, ValueError, MemoryError) as error:
                training.explain(error, batch, pooled_t, progress)
                raise
            training.count(figures, len(batch.labels))
            training.log_if_due(lr)
            training.evaluate_if_due()
            training.save_if_due()
        return training.finish(cost)


def _checkpoint_to_continue_from(path: Path, processes: distributed.Processes, say: Callable[[str], None]) -> Path:
    """`path`; where it is last.pt and gone another checkpoint of the run, which is said. The same in every process."""
    if path.name != run_folder.LAST:
        return path
    name = processes.from_main(run_folder.to_continue_from(path.parent))
    if name != run_folder.LAST:
        say(f"{path.parent} has no {run_folder.LAST}: continuing from {name}")
    return path.with_name(name)
