"""The training loop, read top to bottom: settings, data, teacher, student, then steps, a log, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ijckd_fast import files
from ijckd_fast.data import (
    Augment,
    EvalPlan,
    Index,
    Loader,
    Plan,
    TooManyUnreadable,
    TrainPlan,
    ViewPlan,
    build_index,
    make_loader,
    parity,
)
from ijckd_fast.data.loader import deliver
from ijckd_fast.distill.distiller import Distiller
from ijckd_fast.distill.objectives import Objective, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import bound
from ijckd_fast.evaluate.accuracy import Evaluation, evaluate, load_evaluation, save_evaluation
from ijckd_fast.head import ops
from ijckd_fast.head.libraries import REBUILD, load_libraries
from ijckd_fast.nets.folding import fold_batch_norm
from ijckd_fast.nets.models import CachedTeacher, Stage, Tapped, create_model, is_model_name, same
from ijckd_fast.parallel import processes as distributed
from ijckd_fast.parallel.processes import Processes
from ijckd_fast.teacher_cache.reader import TeacherCache
from ijckd_fast.train import checkpoint, report, run_folder
from ijckd_fast.train.config import FREE_ON_RESUME, OBJECTIVE_FIELDS, TrainConfig, default_eval_resize, make_config
from ijckd_fast.train.optimize import build_optimizer, learning_rate
from ijckd_fast.train.progress import Meter, Stopwatch, TrainingProgress, memory_mb
from ijckd_fast.train.step import TrainStep, out_of_memory

__all__ = ["Stopped", "TrainConfig", "build_distiller", "build_indexes", "build_val_loader", "resolve", "train"]


class Stopped(KeyboardInterrupt):
    """The run was ended by SIGINT or SIGTERM (`signum`), after saving last.pt; not an error, so no Exception."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


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
    resume     go on from last.pt in config.output_dir (from the first step if the run died before it wrote one). The
               settings must be the run's, but for FREE_ON_RESUME. On a CPU the final weights then have the same bits as
               those of a run that was never interrupted; torch's number of threads becomes the run's for that.
    resume_from  the checkpoint in config.output_dir to go on from, last.pt or best.pt
    overwrite  delete the run in config.output_dir, once nothing else can be refused
    console    where progress is shown; default: standard output
    raises     UserError for mistakes in settings or data, a full disk, and too many steps that are not finite; Stopped
               on SIGINT or SIGTERM
    """
    config = resolve(config)
    with distributed.started(config.device, config.dist_backend) as processes:
        return _train(config, processes, resume, resume_from, overwrite, console or Console())


def _train(
    config: TrainConfig, processes: Processes, resume: bool, resume_from: str, overwrite: bool, console: Console
) -> dict[str, Any]:
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    if not processes.is_main:
        console = Console(quiet=True)
    with contextlib.ExitStack() as closing:
        if processes.is_main:
            closing.enter_context(files.lock(folder))
        if resume:
            _refuse_other_settings(folder, config)
            finished = processes.from_main(run_folder.read_json(folder / run_folder.SUMMARY))
            if finished is not None:
                console.print(f"{folder}: this run is finished, nothing to resume", highlight=False, soft_wrap=True)
                return finished
        elif processes.is_main:
            if overwrite:
                _refuse_to_delete_inputs(config, folder)
            else:
                run_folder.refuse_occupied(folder)
        device = device_of(config, processes)
        amp_dtype = amp_dtype_of(config)
        # the call imports the compiler, which takes seconds
        if config.deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic

        # --- data: every batch is a pure function of (index, seed, step)
        augment = augment_of(config)  # what makes no sense is refused before a first scan, which may take minutes
        with processes.main_first():  # a first scan is made once, and kept
            train_index, val_index = build_indexes(config)
        refuse_other_images(config, processes.gather((train_index.hash, val_index.hash)))
        cache = open_cache(config, train_index)
        plan = TrainPlan(
            train_index,
            augment,
            config.batch_size,
            config.seed,
            processes.rank,
            processes.world,
            views=None if cache is None else cache.views,
        )
        for i, why in {} if cache is None else cache.unreadable.items():
            plan.stand_ins.add(i, why)
        total_steps = config.epochs * plan.steps_per_epoch
        if config.max_steps is not None:
            total_steps = min(total_steps, config.max_steps)

        def say_bad_file(what: str) -> Callable[[str, str], None]:
            return lambda path, why: show.say(f"warning: {path} cannot be read any more ({why}): {what}", everyone=True)

        val_loader = build_val_loader(config, val_index, device, processes, on_bad=say_bad_file("it is left out"))
        closing.enter_context(val_loader)

        # --- models
        with processes.main_first():  # published weights are downloaded once
            distiller = build_distiller(config, train_index.num_classes, device)
        learner = distiller.learner
        params, macs = distiller.deployed_cost(config.image_size)
        teacher_digest = None if distiller.teacher is None else teacher_fingerprint(distiller.teacher)
        prepare(config, distiller, processes)
        terms = bound.Meter(distiller) if config.log_bound else None
        optimizer = optimizer_of(config, learner)
        train_step = TrainStep(
            distiller,
            optimizer,
            device,
            amp_dtype=amp_dtype,
            accumulate=config.accumulate,
            clip=config.clip_grad,
            ema_decay=config.ema_decay,
            processes=processes,
            cuda_graph=config.cuda_graph,
        )
        ema = train_step.ema
        inputs = digests(train_index, val_index, teacher_digest, cache)

        # --- where the run stands
        step = skipped = 0
        seconds = 0.0  # of the parts of the run before this one
        best: dict[str, Any] | None = None  # rows of the log
        evaluated: dict[str, Any] | None = None
        meter = Meter(device, processes)
        if processes.rank:  # dropout and the like; rank 0 goes on with the numbers that one process alone would have
            checkpoint.seed_all(config.seed, processes.rank)
        begin_at = folder / resume_from
        if resume and (processes.from_main(begin_at.exists()) or resume_from != run_folder.LAST):
            state = checkpoint.load(begin_at)
            for what, digest in inputs.items():
                if state["inputs"].get(what) != digest:
                    raise UserError(
                        f"{folder} cannot be resumed: the {what} differ from those the run began with; put the old ones back"
                        f"{' (ijckd-fast index looks at every file again)' if 'images' in what else ''} or start a new run"
                    )
            checkpoint.load_into(learner, state["live"] or state["learner"], begin_at)
            optimizer.load_state_dict(state["optimizer"])
            train_step.scaler.load_state_dict(state["scaler"])
            if ema is not None:
                ema.load_state_dict(state["ema"])
            step, skipped, seconds = state["step"], state["skipped_steps"], state["seconds"]
            best, evaluated = state["best"], state["evaluated"]
            begun_with = len(state["random"])
            if begun_with == processes.world:
                meter.load_state_dict(state["meter"][processes.rank])
                checkpoint.set_random_state(state["random"][processes.rank])
            else:
                console.print(
                    f"begun with {begun_with} processes, going on with {processes.world}: the same images in every step, but sums in "
                    "another order and other random numbers in dropout, so not the same bits"
                )
                checkpoint.seed_all(config.seed + step, processes.rank)
            if device.type == "cpu" and state["threads"] != torch.get_num_threads():
                # the order of a sum, and so its last bits, depends on the number of threads
                console.print(f"computing with {state['threads']} threads, as the run began, to get the same bits")
                torch.set_num_threads(state["threads"])
            if state["code"] != run_folder.code_hash():
                console.print(f"{folder} was begun with other code of ijckd_fast: the bits of the result may differ")
        started = time.perf_counter()
        writer = closing.enter_context(checkpoint.Writer())

        def save(name: str) -> None:
            """Called by all processes, written by the one with rank 0 while training goes on."""
            processes.share_buffers(learner)
            each = processes.gather((checkpoint.random_state(), checkpoint.copied(meter.state_dict())))
            if not processes.is_main:
                return
            live = learner.state_dict()
            state = {
                "learner": live if ema is None else {**live, **ema.state_dict()},  # what is evaluated and deployed
                "live": None if ema is None else live,
                "ema": None if ema is None else ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": train_step.scaler.state_dict(),
                "random": [random for random, _ in each],
                "meter": [sums for _, sums in each],
                "step": step,
                "skipped_steps": skipped,
                "seconds": seconds + time.perf_counter() - started,
                "best": best,
                "evaluated": evaluated,
                "config": dataclasses.asdict(config),
                "classes": list(train_index.classes),
                "inputs": inputs,
                "threads": torch.get_num_threads(),
                "code": run_folder.code_hash(),
            }
            keep = None
            if name == run_folder.LAST and config.keep_checkpoints > 1:
                keep = functools.partial(run_folder.keep_as, folder, f"checkpoint-{step}.pt", config.keep_checkpoints)
            writer.save(folder / name, state, keep)

        show = TrainingProgress(console, f"{config.objective} {config.student}", step, total_steps, processes.rank)
        show.say(
            f"{folder}: {config.teacher or 'no teacher'} -> {config.student} by {config.objective}; {len(train_index)} images of "
            f"{train_index.num_classes} classes, {plan.steps_per_epoch} steps an epoch, {total_steps} in all"
            + (f"; {processes.world} processes, {config.global_batch} images a step" if processes.world > 1 else "")
            + (f"; going on from step {step}" if step else "")
        )
        if distiller.stage_pairs:
            show.say(f"stages compared, student's with teacher's: {_describe_stages(distiller.stage_pairs)}")
        if cache is not None:
            show.say(
                f"teacher's features from {cache.path}: {cache.views} views of each image, begun again every {cache.views} epochs"
            )
            for i, why in cache.unreadable.items():
                say_bad_file("another image of its class stands in for it")(train_index.absolute(i), why)
        if config.data_backend == "dali" and processes.is_main:
            check_parity(config, train_index, val_index, show.say)
        if cache is None:
            teacher_val = teacher_on_val(config, folder, distiller, val_loader, inputs, processes)
        else:
            teacher_val = cache.on_val(val_index, augment, config.data_backend)
            if teacher_val is None:
                show.say(
                    "the cache holds the teacher's answers to other val images, or with other settings: no agreement"
                )
        if teacher_val is not None:
            show.say(
                f"teacher: top-1 {teacher_val.top1:.2f} % of {teacher_val.images} val images, {teacher_val.seconds:.1f} s"
            )
            if not config.allow_weak_teacher:
                refuse_weak_teacher(config, teacher_val, val_index.num_classes)

        # --- what the run leaves behind besides checkpoints; an earlier run goes only now, when nothing can be refused any more
        log: run_folder.RunLog | None = None
        if processes.is_main:
            if not resume:
                run_folder.clear(folder)
            run_folder.write_config(folder, config)
            run_folder.write_environment(folder)
            log = run_folder.RunLog(folder, step, tensorboard=config.tensorboard, wandb=config.wandb)
            closing.enter_context(contextlib.closing(log))

        if resume and resume_from != run_folder.LAST:
            save(run_folder.LAST)  # what lies there is damaged, or later than the point to go on from

        # --- the loop; the host waits for the device only where it logs, evaluates or saves
        loader = closing.enter_context(
            _loader(
                config,
                plan,
                device,
                start=step,
                stop=total_steps,
                on_bad=say_bad_file("another image of its class stands in for it"),
            )
        )
        batches = iter(loader)
        if config.head == "fused":
            ops.take_bad_rows(device)  # what this process did before is not this run's
        stop = closing.enter_context(stop_signal())
        closing.enter_context(show)
        distiller.train()
        watch = Stopwatch(device, processes)
        saved_at = time.perf_counter()
        while step < total_steps:
            try:
                with watch.waiting():
                    batch = next(batches)  # images [B, 3, S, S], labels [B], and those of mixing
                    pooled_t = None if cache is None else cached_features(cache, loader, device)  # [B, Ct]
            except TooManyUnreadable as error:
                if processes.world == 1:  # to save takes all of them
                    save(run_folder.LAST)
                    writer.wait()
                kept = "everything is saved" if processes.world == 1 else "the last checkpoint is kept"
                raise UserError(
                    f"{error}. Stopped at step {step}, {kept}: mend the data and continue with ijckd-fast train --resume {folder}, or "
                    "allow more with --unreadable-limit"
                ) from error
            lr = learning_rate(
                step,
                steps_per_epoch=plan.steps_per_epoch,
                epochs=config.epochs,
                lr=config.lr,
                schedule=config.schedule,
                milestones=config.milestones,
                gamma=config.gamma,
                warmup_epochs=config.warmup_epochs,
            )
            progress = step / plan.steps_per_epoch
            try:
                figures = train_step(batch, pooled_t, step=step, lr=lr, progress=progress)
            except (RuntimeError, ValueError, MemoryError) as error:
                if out_of_memory(error):
                    fits = None
                    if processes.world == 1:  # to save takes all of them
                        fits = train_step.largest_part_that_fits(batch, pooled_t, progress)
                        save(run_folder.LAST)
                        writer.wait()
                    raise UserError(_out_of_memory(config, folder, step, fits)) from error
                if config.batch_size > config.accumulate or "per channel" not in str(error):
                    raise
                raise UserError(
                    "BatchNorm cannot learn from a single value per channel, which one image with a 1x1 map or a "
                    "pooled vector gives: use --batch-size 2 or more, and --accumulate for less than all of it"
                ) from error
            step += 1

            meter.add(figures)
            watch.count(len(batch.labels))
            show.step(step)
            writer.check()
            epoch = step / plan.steps_per_epoch

            if step % config.log_interval == 0 or step == total_steps:
                means, bad, overflows = meter.take()
                correct = means.pop("correct")
                skipped += bad
                row = {
                    "epoch": epoch,
                    **means,
                    "top1_train_percent": None if correct is None else 100 * correct / config.batch_size,
                    "lr": lr,
                    **watch.take(),
                    "memory_mb": memory_mb(device),
                    "skipped_steps": skipped,
                    "unreadable_files": sum(processes.gather(len(loader.bad_files))),
                }
                if train_step.scaler.is_enabled():
                    row |= {"loss_scale": train_step.scaler.get_scale(), "overflows": overflows}
                if log is not None:
                    log.write("train", step, row)
                show.row(step, row)
                if bad:
                    show.say(
                        f"skipped {bad} of the last steps: loss or gradient was NaN or infinite ({skipped} so far)"
                    )
                if config.head == "fused":
                    labels, saturated = map(sum, zip(*processes.gather(tuple(ops.take_bad_rows(device))), strict=True))
                    if labels:
                        raise UserError(_bad_labels(config, labels, step, train_index.num_classes))
                    if saturated:
                        show.say(
                            f"warning: {saturated} images of the last steps had a logit so far above their label's that the "
                            "softmax saturated: their part of loss and gradient is too small"
                        )
                if skipped > config.nonfinite_limit or row.get("loss_scale", 1.0) < 1.0:
                    writer.wait()
                    what = f"{skipped} steps had a NaN or infinite loss or gradient and were skipped, more than --nonfinite-limit allows"
                    if skipped <= config.nonfinite_limit:
                        what = "float16's loss scale fell below 1, the gradient is infinite at any"
                    raise UserError(_not_finite(folder, what, step))

            if step == total_steps or step % (config.eval_every * plan.steps_per_epoch) == 0:
                with watch.paused(), contextlib.nullcontext() if ema is None else ema.swapped_in():
                    processes.share_buffers(learner)
                    distiller.eval()
                    evaluation = evaluate(
                        distiller.predict if terms is None else terms.predict,
                        val_loader,
                        device=device,
                        amp_dtype=amp_dtype,
                        teacher=teacher_val,
                        note=None if terms is None else terms.note,
                        processes=processes,
                    )
                    of_bound = None if terms is None else bound_row(terms, processes, show.say)
                    distiller.train()
                evaluated = {"step": step, "epoch": epoch, **evaluation.row()}
                if log is not None:
                    log.write("eval", step, evaluated)
                show.say(_describe(step, total_steps, evaluation))
                if of_bound is not None:
                    show.say(f"bound, % of the images: {bound.chain_line(of_bound)}")
                    if log is not None:
                        log.write("bound", step, {"epoch": epoch, **of_bound})
                if best is None or evaluation.top1 > best["top1_percent"]:
                    best = evaluated
                    with watch.paused():
                        save(run_folder.BEST)

            minutes = (time.perf_counter() - saved_at) / 60
            by_steps = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
            due = minutes >= config.checkpoint_minutes or by_steps or stop.save or step == total_steps
            signum, anyone_due = processes.most(stop.signum, due)
            if signum or anyone_due:
                stop.save = False
                with watch.paused():
                    save(run_folder.LAST)
                saved_at = time.perf_counter()
            if signum and step < total_steps:
                writer.wait()
                raise Stopped(
                    signum,
                    f"stopped by {signal.Signals(signum).name} at step {step} of {total_steps}, everything is saved: "
                    f"continue with ijckd-fast train --resume {folder}",
                )

        writer.wait()
        unreadable = sum(processes.gather(len(loader.bad_files) + len(val_loader.bad_files)))
        summary: dict[str, Any] = {}
        if log is not None:
            log.close()
            rows = run_folder.read_log(folder)
            summary = {
                "complete": True,
                "config": dataclasses.asdict(config),
                "inputs": inputs,
                "steps": step,
                "last": evaluated,
                "best": best,
                "teacher_top1_percent": None if teacher_val is None else teacher_val.top1,
                "params": params,
                "macs": macs,
                "processes": processes.world,
                "images_per_s": statistics.median(row["images_per_s"] for row in rows if row["kind"] == "train"),
                "skipped_steps": skipped,
                "unreadable_files": unreadable,
                "seconds": seconds + time.perf_counter() - started,
            }
            report.write_report(folder, summary, rows)
            files.write_text(folder / run_folder.SUMMARY, json.dumps(summary, indent=2) + "\n")
            show.say(f"report: {folder / run_folder.REPORT}")
        return processes.from_main(summary)


# ----------------------------------------------------------------------------------------------------------------------
# What the loop is made of, in the order of its use


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in every value that was left to be chosen, so that config.yaml says all. UserError for impossible settings."""
    if not config.data_dir:
        raise UserError("no --data-dir given: wanted a folder with train/<class>/* and val/<class>/* image files")
    config = _named_by_path(_named_by_path(_named_by_cache(config), "teacher"), "student")
    has_weights = config.teacher_checkpoint is not None or config.teacher_pretrained or config.allow_weak_teacher
    if config.teacher is not None and not has_weights and config.teacher_cache is None:
        raise UserError(
            f"teacher {config.teacher} has no weights: give --teacher-checkpoint FILE, or --teacher-pretrained for the "
            "library's published ones"
        )
    objective = objective_of(config)
    if config.teacher_cache is not None and objective.needs_stages:
        raise UserError(
            f"objective {objective.name!r} compares maps of the teacher's stages (at {objective.at:g}, hint {objective.hint:g}), but the "
            f"cache {config.teacher_cache} holds pooled features only: take --objective kd, or ijckd-pooled, without --at and --hint, or "
            "the teacher itself (--teacher NAME or RUN)"
        )
    if config.teacher_cache is not None and objective.needs_teacher_map:
        raise UserError(
            f"objective {objective.name!r} matches the teacher's maps, wanted one that needs pooled features, all that the cache "
            f"{config.teacher_cache} holds: take --objective ijckd-pooled (or srrl, kd, dkd), or the teacher itself (--teacher NAME or RUN)"
        )
    if config.log_bound and (objective.connector is None or config.teacher_cache is not None):
        found = (
            f"objective {objective.name!r}, which has no connector"
            if objective.connector is None
            else f"the cache {config.teacher_cache}, which has no features of the val images"
        )
        raise UserError(
            f"--log-bound compares the student's connected features with the teacher's on val, found {found}: leave it out, or train by "
            "ijckd, ijckd-pooled, srrl or simkd with the teacher itself (--teacher NAME or RUN)"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda wanted, but torch finds no GPU here: see ijckd-fast doctor, or use --device cpu")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and config.head == "fused" and not load_libraries():
        raise UserError(
            f"the fused head needs the CUDA library on a GPU, but _C_cuda.so was not built: install nvcc and run {REBUILD}, "
            "or use --device cpu, or --head reference"
        )
    amp_dtype = config.amp_dtype or ("bfloat16" if device == "cuda" else "float32")
    if amp_dtype == "float16" and device == "cpu":
        raise UserError("--amp-dtype float16 needs a GPU, got --device cpu: use bfloat16 or float32")
    world = distributed.world_size()
    if config.cuda_graph and (device != "cuda" or world > 1 or config.optimizer == "lamb"):
        raise UserError(
            f"--cuda-graph is for one GPU and sgd or adamw, got --device {device}, {world} processes and --optimizer {config.optimizer}: "
            "leave it out"
        )
    global_batch = config.global_batch or config.batch_size * world
    if global_batch % world or (global_batch // world) % config.accumulate:
        raise UserError(
            f"the global batch of {global_batch} images cannot be shared out to {world} processes with --accumulate {config.accumulate} in "
            f"equal parts: wanted a multiple of {world * config.accumulate}"
        )
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb} needs the package: pip install wandb, or leave it out")
    cores = len(os.sched_getaffinity(0))
    return dataclasses.replace(
        config,
        data_dir=os.path.abspath(config.data_dir),  # a run may be resumed from another working directory
        class_list=config.class_list and os.path.abspath(config.class_list),
        val_labels=config.val_labels and os.path.abspath(config.val_labels),
        teacher_checkpoint=config.teacher_checkpoint and os.path.abspath(config.teacher_checkpoint),
        teacher_cache=config.teacher_cache and os.path.abspath(config.teacher_cache),
        student_checkpoint=config.student_checkpoint and os.path.abspath(config.student_checkpoint),
        output_dir=config.output_dir or f"runs/{objective.name}-{config.student.replace('/', '-')}-seed{config.seed}",
        **{name: getattr(objective, name) for name in OBJECTIVE_FIELDS if name != "connector"},
        connector=objective.connector or "none",
        eval_resize=config.eval_resize or default_eval_resize(config.image_size, config.crop_padding),
        workers=config.workers or (max(1, cores // distributed.local_world_size() - 1) if device == "cuda" else 2),
        device=device,
        amp_dtype=amp_dtype,
        global_batch=global_batch,
        batch_size=global_batch // world,
    )


def _named_by_cache(config: TrainConfig) -> TrainConfig:
    """Where the teacher is given as cache:FOLDER, or the folder alone is: the model that the cache is of, and the folder."""
    given, folder = config.teacher or "", config.teacher_cache
    if given.startswith("cache:"):
        if folder is not None:
            raise UserError(f"--teacher {given} is a cache and --teacher-cache {folder} is given too: leave out one")
        folder = os.path.expanduser(given.removeprefix("cache:"))
    elif given or folder is None:
        return config
    return dataclasses.replace(config, teacher=TeacherCache(folder).name, teacher_cache=folder)


def _named_by_path(config: TrainConfig, role: str) -> TrainConfig:
    """Where `role` (teacher or student) is a run's folder or checkpoint: the model that the run trained, and its weights.

    A model's name is never taken for a path, whatever lies in the working directory: write ./resnet8 for the folder.
    """
    given = getattr(config, role)
    if given is None:
        return config
    path = Path(given) / run_folder.LAST if Path(given).is_dir() else Path(given)
    if not path.is_file() or is_model_name(given):
        return config
    if getattr(config, f"{role}_checkpoint") is not None or getattr(config, f"{role}_pretrained"):
        raise UserError(
            f"--{role} {given} is a file with weights, and other weights for the {role} are given too: leave out one"
        )
    try:
        name = checkpoint.load(path)["config"]["student"]
    except UserError as error:
        raise UserError(f"{error}; weights from elsewhere need --{role} NAME --{role}-checkpoint {path}") from error
    return dataclasses.replace(config, **{role: name, f"{role}_checkpoint": str(path)})


def objective_of(config: TrainConfig) -> Objective:
    """The preset with the weights and heads that the settings change."""
    return get_objective(config.objective, **{name: getattr(config, name) for name in OBJECTIVE_FIELDS})


def device_of(config: TrainConfig, processes: Processes) -> torch.device:
    """This process's device; config is resolved."""
    return torch.device("cuda", processes.local_rank) if config.device == "cuda" else torch.device(config.device)


def optimizer_of(config: TrainConfig, learner: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a resolved config names, over every parameter of `learner`."""
    return build_optimizer(
        learner,
        name=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        betas=config.betas,
        weight_decay=config.weight_decay,
        decay_norms=config.decay_norms,
    )


def amp_dtype_of(config: TrainConfig) -> torch.dtype | None:
    """What to autocast to; None for float32. config is resolved."""
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.amp_dtype or "float32"]


def augment_of(config: TrainConfig) -> Augment:
    """How images become input; config is resolved."""
    assert config.eval_resize is not None
    return Augment(
        image_size=config.image_size,
        scale=config.scale,
        ratio=config.ratio,
        crop_padding=config.crop_padding,
        hflip=config.hflip,
        eval_resize=config.eval_resize,
        mean=config.mean,
        std=config.std,
        mixup=config.mixup,
        cutmix=config.cutmix,
        repeats=config.repeats,
        sizes=_progressive(config.sizes),
    )


def _progressive(sizes: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """('128@0', '192@30') -> ((0, 128), (30, 192))"""
    pairs = [text.split("@") for text in sizes]
    if not all(len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() for pair in pairs):
        raise UserError(f"--sizes must be PIXELS@EPOCH for every change, e.g. 128@0,192@30, got {','.join(sizes)}")
    return tuple((int(epoch), int(side)) for side, epoch in pairs)


def build_indexes(config: TrainConfig) -> tuple[Index, Index]:
    """(train, val): val has the classes of train; train is cut down and mislabelled as the settings say."""
    how: dict[str, Any] = {
        "verify": config.index_verify,
        "trust_folders": not config.check_files,
        "progress": sys.stderr.isatty(),
    }
    whole = build_index(config.data_dir, "train", class_list=config.class_list, **how)
    val = build_index(config.data_dir, "val", classes=whole.classes, labels=config.val_labels, **how)
    return whole.subset(config.train_per_class, config.label_noise, config.seed), val


def refuse_other_images(config: TrainConfig, hashes: Sequence[tuple[str, str]]) -> None:
    """UserError unless all processes have the hashes (train, val) of the first; each machine may have a copy of the data."""
    for rank, theirs in enumerate(hashes):
        for split, mine, other in zip(("train", "val"), hashes[0], theirs, strict=True):
            if mine != other:
                raise UserError(
                    f"processes 0 and {rank} see different images in {config.data_dir}/{split}, wanted the same files on every machine: "
                    "ijckd-fast index lists them; or give one shared folder"
                )


def build_val_loader(
    config: TrainConfig,
    index: Index,
    device: torch.device,
    processes: Processes = Processes(),  # noqa: B008 - frozen
    *,
    ids: np.ndarray | None = None,
    **more: Any,
) -> Loader:
    """This process's share of the images of `index`, or of those of `ids` [n] int64, each once over all processes, in order; may be
    iterated again and again.
    """
    plan = EvalPlan(index, augment_of(config), config.batch_size, processes.rank, processes.world, ids=ids)
    return _loader(config, plan, device, **more)


def build_view_loader(
    config: TrainConfig, index: Index, batches: Sequence[tuple[int, Sequence[int]]], device: torch.device, **more: Any
) -> Loader:
    """Given views of given training images, see ViewPlan; once."""
    plan = ViewPlan(index, augment_of(config), batches, config.batch_size, config.seed)
    return _loader(config, plan, device, **more)


def _loader(config: TrainConfig, plan: Plan, device: torch.device, **more: Any) -> Loader:
    settings: dict[str, Any] = {
        "threads": config.workers,
        "prefetch": config.prefetch,
        "bad_limit": config.unreadable_limit,
    }
    if config.data_backend == "dali":
        settings |= {"decode": config.decode, "hw_decoder_load": config.hw_decoder_load}
    return make_loader(config.data_backend, plan, device=device, **settings, **more)


def build_distiller(config: TrainConfig, num_classes: int, device: torch.device) -> Distiller:
    """Teacher and student on `device`. The student's first weights depend on the seed alone, not on teacher or objective."""
    teacher = build_teacher(config, num_classes)
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 - for third-party nets that draw from it
    torch.manual_seed(config.seed)
    student = create_model(
        config.student,
        num_classes,
        checkpoint=config.student_checkpoint,
        pretrained=config.student_pretrained,
        image_size=config.image_size,
    )
    distiller = Distiller(
        student, teacher, objective_of(config), label_smoothing=config.label_smoothing, head=config.head
    )
    if config.channels_last:
        distiller.to(memory_format=torch.channels_last)
    return distiller.to(device)


def prepare(config: TrainConfig, distiller: Distiller, processes: Processes) -> None:
    """Makes the nets ready to train as the settings say, after what is asked of them as they were built: statistics of BatchNorm over all
    processes, the teacher's BatchNorm folded, compilation.
    """
    learner, teacher = distiller.learner, distiller.teacher
    if isinstance(teacher, Tapped):
        refuse_restless_teacher(teacher, config.image_size)
    if config.sync_bn and processes.group is not None:
        learner.synchronise(processes.group)
    if isinstance(teacher, Tapped) and config.fold_teacher:
        images = torch.rand(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
        with torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False
        ):  # whose rounding would look like a wrong formula
            fold_batch_norm(teacher.net, images.to(next(teacher.parameters()).device))
    if config.compile:
        torch.compiler.reset()  # what an earlier run of this process compiled is taken again without a look at the hooks of the layers
        learner.student.net.compile()
        if learner.connector is not None:
            learner.connector.trunk.compile()
        if isinstance(teacher, Tapped):
            teacher.net.compile()


@torch.no_grad()
def refuse_restless_teacher(teacher: Tapped, image_size: int) -> None:
    """UserError where the teacher, in eval mode, is not one and the same function: its features would be noise to learn from."""
    training = next((name for name, part in teacher.named_modules() if part.training), None)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(teacher.parameters()).device)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    first, second = (teacher.features(images)[1] for _ in range(2))  # [2, Ct]
    moved = next((name for name, buffer in teacher.named_buffers() if not torch.equal(buffer, before[name])), None)
    if training is not None:
        what = f"has a layer ({training}) that stays in training mode"
    elif moved is not None:
        what = f"changes its own buffers ({moved})"
    elif not same(first, second):
        what = "gives other features for the same images a second time (dropout that is always on?)"
    else:
        return
    raise UserError(
        f"teacher {teacher.name} {what}, wanted a net that eval() makes one fixed function: let its dropout and BatchNorm follow "
        "self.training, or take another teacher"
    )


def build_teacher(config: TrainConfig, num_classes: int) -> Tapped | CachedTeacher | None:
    """The teacher on the CPU: of a cache the classifier alone; None for none."""
    if config.teacher is None:
        return None
    if config.teacher_cache is not None:
        return TeacherCache(config.teacher_cache).teacher()
    return create_model(
        config.teacher,
        num_classes,
        checkpoint=config.teacher_checkpoint,
        pretrained=config.teacher_pretrained,
        image_size=config.image_size,
    )


def teacher_fingerprint(teacher: Tapped | CachedTeacher) -> str:
    """checkpoint.fingerprint of the whole teacher, also where only its classifier is here."""
    return teacher.fingerprint if isinstance(teacher, CachedTeacher) else checkpoint.fingerprint(teacher)


def digests(
    train_index: Index, val_index: Index, teacher_digest: str | None, cache: TeacherCache | None
) -> dict[str, str | None]:
    """What the result of a run depends on besides its settings, a digest each; teacher_digest as `teacher_fingerprint` gives it."""
    return {
        "training images": train_index.hash,
        "validation images": val_index.hash,
        "teacher": teacher_digest,
        "cached features": None if cache is None else cache.digest,
    }


def open_cache(config: TrainConfig, index: Index) -> TeacherCache | None:
    """The cache the teacher's features come from; None where the teacher itself gives them. config is resolved.

    raises UserError: the cache is damaged, or is not of this teacher, these training images or these settings. Teachers are
           compared by name; by their weights where --teacher-checkpoint is given too
    """
    if config.teacher_cache is None:
        return None
    cache = TeacherCache(config.teacher_cache)
    if config.teacher != cache.name:
        raise UserError(
            f"{cache.path} is a cache of {cache.name}, wanted of {config.teacher}: leave out --teacher, or make a cache of that one"
        )
    if config.teacher_pretrained and not cache.published:
        raise UserError(
            f"{cache.path} is not a cache of the published weights of {cache.name}, which --teacher-pretrained wants: leave that out "
            "(--no-teacher-pretrained), or make a cache of them"
        )
    if config.teacher_checkpoint is not None:
        itself = build_teacher(dataclasses.replace(config, teacher_cache=None), index.num_classes)
        assert itself is not None
        if teacher_fingerprint(itself) != cache.fingerprint:
            raise UserError(
                f"{cache.path} is a cache of other weights of {cache.name} than those in {config.teacher_checkpoint}: leave out "
                "--teacher-checkpoint, or make a cache of that one"
            )
    cache.check(index, augment_of(config), config.seed, config.data_backend)
    return cache


def cached_features(cache: TeacherCache, loader: Loader, device: torch.device) -> Tensor:
    """[B, Ct] float32 on `device`: the teacher's pooled features of the batch that `loader` handed over last."""
    batch = loader.followed
    assert batch is not None
    assert batch.view is not None
    return deliver(cache.pooled(batch.ids, batch.view), device)


def check_parity(config: TrainConfig, train: Index, val: Index, say: Callable[[str], None]) -> None:
    """Says, once per dataset, how far DALI's pixels are from Pillow's. UserError beyond --max-drift.

    Of several processes only one needs to call it.
    """
    try:
        rows, known = parity.of_dataset(
            train, val, augment_of(config), threads=config.workers, device=config.device, decode=config.decode
        )
    except TooManyUnreadable as error:  # the loop meets these files too, and knows what to do then
        say(f"warning: DALI's pixels were not compared with Pillow's: {error}")
        return
    if not known:
        figures = " and ".join(f"{row.mean_levels:.2f} on {row.images} {row.split} crops" for row in rows)
        say(
            f"DALI's pixels differ from Pillow's by {figures} (mean, grey levels); kept, not measured at the next start"
        )
    row = max(rows, key=lambda row: row.mean_levels)
    if row.mean_levels > config.max_drift:
        raise UserError(
            f"DALI's pixels differ from Pillow's by {row.mean_levels:.2f} grey levels in the mean of {row.images} {row.split} crops, "
            f"wanted at most {config.max_drift:g} (rounding makes 0.2); the farthest is {os.path.join(train.root, row.worst_path)} with "
            f"{row.worst_levels:.2f}. One of the two decodes or resizes in another way here: look with ijckd-fast bench loader --parity "
            f"--data-dir {config.data_dir}, try other versions of DALI and Pillow, or --data-backend pillow; --max-drift "
            f"{math.ceil(row.mean_levels)} trains all the same"
        )


def teacher_on_val(
    config: TrainConfig,
    folder: Path,
    distiller: Distiller,
    val_loader: Loader,
    inputs: dict[str, str | None],
    processes: Processes,
) -> Evaluation | None:
    """The teacher's own evaluation, made once per run and kept in its folder; None without a teacher."""
    if distiller.teacher is None:
        return None
    key = f"{inputs['teacher']} {inputs['validation images']} {augment_of(config)} {config.data_backend} {config.amp_dtype}"
    path = folder / run_folder.TEACHER
    known = processes.from_main(load_evaluation(path) if processes.is_main else None)
    if known is not None and known[0] == key:
        return known[1]
    evaluation = evaluate(
        distiller.eval().teacher_logits,
        val_loader,
        device=device_of(config, processes),
        amp_dtype=amp_dtype_of(config),
        processes=processes,
    )
    if processes.is_main:
        save_evaluation(path, key, evaluation)
    return evaluation


def bound_row(terms: bound.Meter, processes: Processes, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The overall figures of the bound that were noted in the last evaluation; None, and a warning, where features are not finite."""
    try:
        return bound.overall(terms.take(processes))
    except UserError as error:
        say(f"warning: no bound is logged: {error}")
        return None


def refuse_weak_teacher(config: TrainConfig, teacher: Evaluation, num_classes: int) -> None:
    """UserError when the teacher's top-1 on val is below twice chance (or chance plus a quarter of the rest, if that is less)."""
    chance = 100 / num_classes
    wanted = min(2 * chance, chance + 0.25 * (100 - chance))
    if teacher.top1 < wanted:
        raise UserError(
            f"teacher {config.teacher} has a top-1 of {teacher.top1:.2f} % on the {teacher.images} val images, near chance "
            f"({chance:.2f} %), wanted at least {wanted:.2f} %: its classes are probably in another order than the sorted class "
            "folders, or it expects other --mean, --std or --image-size; or its weights are the wrong file. "
            "--allow-weak-teacher trains all the same"
        )


def _refuse_other_settings(folder: Path, config: TrainConfig) -> None:
    begun = resolve(make_config({**run_folder.read_config(folder), "output_dir": config.output_dir}))
    for field in dataclasses.fields(config):
        old, new = getattr(begun, field.name), getattr(config, field.name)
        if field.name not in FREE_ON_RESUME and old != new:
            raise UserError(
                f"{folder} was begun with {field.name} = {old} and cannot be resumed with {new}: the result would be neither "
                "run's; leave the setting out, or start a new run in another --output-dir"
            )


def _refuse_to_delete_inputs(config: TrainConfig, folder: Path) -> None:
    for role, path in (("teacher", config.teacher_checkpoint), ("student", config.student_checkpoint)):
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise UserError(
                f"--overwrite would delete the {role}'s weights {path}, which are in the --output-dir: choose another"
            )


def _not_finite(folder: Path, what: str, step: int) -> str:
    return (
        f"stopped at step {step}: {what}; {_last_good(folder)}. A smaller --lr, a longer --warmup-epochs or --amp-dtype float32 usually "
        "helps"
    )


def _last_good(folder: Path) -> str:
    last = folder / run_folder.LAST
    if not last.exists():
        return "no checkpoint had been written yet"
    return f"the last good checkpoint is {last} (step {checkpoint.load(last)['step']})"


def _out_of_memory(config: TrainConfig, folder: Path, step: int, fits: int | None) -> str:
    """fits: images that went through when tried; None where that was not tried."""
    whole = config.batch_size // config.accumulate
    what = f"out of memory at step {step} with {whole} images going through the nets at once on {config.device}; {_last_good(folder)}. "
    if fits == 0:
        return (
            what
            + "Not even one image fits: choose a smaller student, a smaller --image-size, or a machine with more memory"
        )
    parts = (
        config.accumulate * 2
        if fits is None
        else next(n for n in range(1, whole + 1) if whole % n == 0 and whole // n <= fits) * config.accumulate
    )
    tried = "Half of them may fit" if fits is None else f"{fits} fit"
    return (
        f"{what}{tried}: start anew with --accumulate {parts} (the same update but for BatchNorm's statistics) or a smaller --batch-size, "
        "or resume where more memory is free"
    )


def _bad_labels(config: TrainConfig, count: int, step: int, num_classes: int) -> str:
    return (
        f"stopped at step {step}: {count} images of the last steps had a label outside [0, K) = [0, {num_classes}), the classes of "
        f"teacher {config.teacher}, and no loss: the index or its class list does not fit the teacher's K. Build the index of "
        f"{config.data_dir} anew with ijckd-fast index, and give a teacher with weights for these {num_classes} classes"
    )


def _describe(step: int, total_steps: int, evaluation: Evaluation) -> str:
    agreement = "" if evaluation.agreement is None else f", agreement with the teacher {evaluation.agreement:.2f} %"
    return f"step {step}/{total_steps}: val top-1 {evaluation.top1:.2f} %, top-5 {evaluation.top5:.2f} %{agreement}"


def _describe_stages(pairs: Sequence[tuple[Stage, Stage]]) -> str:
    return ", ".join(f"{stage_s.path} with {stage_t.path}" for stage_s, stage_t in pairs)


class _StopSignal:
    signum = 0  # SIGINT or SIGTERM: save and stop
    save = False  # SIGUSR1: save and go on


@contextlib.contextmanager
def stop_signal() -> Iterator[_StopSignal]:
    """Inside, the first SIGINT or SIGTERM only sets `signum`, so that the loop can save; a second one acts at once. SIGUSR1, which batch
    systems send some time before they end a job, sets `save`, as often as it comes.
    """
    stop = _StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            stop.save = True
            return
        stop.signum = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, before[each])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
