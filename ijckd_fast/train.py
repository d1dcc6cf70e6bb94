"""The training loop, read top to bottom: settings, data, teacher, student, then steps, a log, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ijckd_fast import checkpoint, ops, report, run_folder
from ijckd_fast.config import FREE_ON_RESUME, OBJECTIVE_FIELDS, TrainConfig, make_config
from ijckd_fast.data import (
    Augment,
    EvalPlan,
    Index,
    Loader,
    Plan,
    TooManyUnreadable,
    TrainPlan,
    build_index,
    make_loader,
    parity,
)
from ijckd_fast.distiller import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import Evaluation, evaluate
from ijckd_fast.libraries import REBUILD, load_libraries
from ijckd_fast.models import create_model, is_model_name
from ijckd_fast.objectives import Objective, get_objective
from ijckd_fast.optimize import Ema, FiniteGuard, learning_rate, sgd
from ijckd_fast.progress import Meter, Stopwatch, TrainingProgress

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
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    console = console or Console()
    with run_folder.lock(folder), contextlib.ExitStack() as closing:
        if resume:
            _refuse_other_settings(folder, config)
            finished = run_folder.read_json(folder / run_folder.SUMMARY)
            if finished is not None:
                console.print(f"{folder}: this run is finished, nothing to resume", highlight=False, soft_wrap=True)
                return finished
        else:
            if overwrite:
                _refuse_to_delete_inputs(config, folder)
            else:
                run_folder.refuse_occupied(folder)
        device = torch.device(config.device)
        amp_dtype = torch.bfloat16 if config.amp_dtype == "bfloat16" else None
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic

        # --- data: every batch is a pure function of (index, seed, step)
        train_index, val_index = build_indexes(config)
        plan = TrainPlan(train_index, augment_of(config), config.batch_size, config.seed)
        total_steps = config.epochs * plan.steps_per_epoch
        if config.max_steps is not None:
            total_steps = min(total_steps, config.max_steps)

        def say_bad_file(what: str) -> Callable[[str, str], None]:
            return lambda path, why: show.say(f"warning: {path} cannot be read any more ({why}): {what}")

        val_loader = build_val_loader(config, val_index, device, on_bad=say_bad_file("it is left out"))
        closing.enter_context(val_loader)

        # --- models
        distiller = build_distiller(config, train_index.num_classes, device)
        learner = distiller.learner
        params, macs = distiller.deployed_cost(config.image_size)
        optimizer = sgd(
            learner,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        guard = FiniteGuard(learner, optimizer, device)
        ema = Ema(learner, config.ema_decay) if config.ema_decay else None
        inputs = {
            "training images": train_index.hash,
            "validation images": val_index.hash,
            "teacher": None if distiller.teacher is None else checkpoint.fingerprint(distiller.teacher),
        }

        # --- where the run stands
        step = skipped = 0
        seconds = 0.0  # of the parts of the run before this one
        best: dict[str, Any] | None = None  # rows of the log
        evaluated: dict[str, Any] | None = None
        meter = Meter(device)
        begin_at = folder / resume_from
        if resume and (begin_at.exists() or resume_from != run_folder.LAST):
            state = checkpoint.load(begin_at)
            for what, digest in inputs.items():
                if state["inputs"][what] != digest:
                    raise UserError(
                        f"{folder} cannot be resumed: the {what} differ from those the run began with; put the old ones back"
                        f"{' (ijckd-fast index looks at every file again)' if 'images' in what else ''} or start a new run"
                    )
            checkpoint.load_into(learner, state["live"] or state["learner"], begin_at)
            optimizer.load_state_dict(state["optimizer"])
            if ema is not None:
                ema.load_state_dict(state["ema"])
            meter.load_state_dict(state["meter"])
            checkpoint.set_random_state(state["random"])
            step, skipped, seconds = state["step"], state["skipped_steps"], state["seconds"]
            best, evaluated = state["best"], state["evaluated"]
            if device.type == "cpu" and state["threads"] != torch.get_num_threads():
                # the order of a sum, and so its last bits, depends on the number of threads
                console.print(f"computing with {state['threads']} threads, as the run began, to get the same bits")
                torch.set_num_threads(state["threads"])
            if state["code"] != run_folder.code_hash():
                console.print(f"{folder} was begun with other code of ijckd_fast: the bits of the result may differ")
        started = time.perf_counter()

        def save(name: str) -> None:
            live = learner.state_dict()
            state = {
                "learner": live if ema is None else {**live, **ema.state_dict()},  # what is evaluated and deployed
                "live": None if ema is None else live,
                "ema": None if ema is None else ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "meter": meter.state_dict(),
                "random": checkpoint.random_state(),
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
            checkpoint.save(folder / name, state)

        show = TrainingProgress(console, f"{config.objective} {config.student}", step, total_steps)
        show.say(
            f"{folder}: {config.teacher or 'no teacher'} -> {config.student} by {config.objective}; {len(train_index)} images of "
            f"{train_index.num_classes} classes, {plan.steps_per_epoch} steps an epoch, {total_steps} in all"
            + (f"; going on from step {step}" if step else "")
        )
        if config.data_backend == "dali":
            check_parity(config, train_index, val_index, show.say)
        teacher_val = teacher_on_val(config, folder, distiller, val_loader, inputs)
        if teacher_val is not None:
            show.say(
                f"teacher: top-1 {teacher_val.top1:.2f} % of {teacher_val.images} val images, {teacher_val.seconds:.1f} s"
            )
            if not config.allow_weak_teacher:
                refuse_weak_teacher(config, teacher_val, val_index.num_classes)

        # --- what the run leaves behind besides checkpoints; an earlier run goes only now, when nothing can be refused any more
        if not resume:
            run_folder.clear(folder)
        run_folder.write_config(folder, config)
        run_folder.write_environment(folder)
        log = closing.enter_context(contextlib.closing(run_folder.RunLog(folder, step, tensorboard=config.tensorboard)))

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
        watch = Stopwatch(device)
        saved_at = time.perf_counter()
        while step < total_steps:
            try:
                with watch.waiting():
                    batch = next(batches)  # images [B, 3, S, S], labels [B], and those of mixing
            except TooManyUnreadable as error:
                save(run_folder.LAST)
                raise UserError(
                    f"{error}. Stopped at step {step}, everything is saved: mend the data and continue with ijckd-fast train "
                    f"--resume {folder}, or allow more with --unreadable-limit"
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
            for group in optimizer.param_groups:
                group["lr"] = lr

            guard.before_forward()
            with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                try:
                    out = distiller.step(
                        batch.images,
                        batch.labels,
                        labels_b=batch.labels_b,
                        mix=batch.mix,
                        progress=step / plan.steps_per_epoch,
                    )
                except (RuntimeError, ValueError) as error:
                    if config.batch_size > 1 or "per channel" not in str(error):
                        raise
                    raise UserError(
                        "BatchNorm cannot learn from a single value per channel, which one image with a 1x1 map or a "
                        "pooled vector gives: use --batch-size 2 or more"
                    ) from error
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            ok, grad_norm = guard.after_backward(out.loss)
            optimizer.step()  # changes nothing unless ok
            step += 1
            if ema is not None:
                ema.update(step)

            meter.add(ok, {"loss": out.loss.detach(), **out.parts, "grad_norm": grad_norm, "correct": out.correct})
            watch.count(len(batch.labels))
            show.step(step)
            epoch = step / plan.steps_per_epoch

            if step % config.log_interval == 0 or step == total_steps:
                means, bad = meter.take()
                correct = means.pop("correct")
                skipped += bad
                row = {
                    "epoch": epoch,
                    **means,
                    "top1_train_percent": None if correct is None else 100 * correct / config.batch_size,
                    "lr": lr,
                    **watch.take(),
                    "skipped_steps": skipped,
                    "unreadable_files": len(loader.bad_files),
                }
                log.write("train", step, row)
                show.row(step, row)
                if bad:
                    show.say(
                        f"skipped {bad} of the last steps: loss or gradient was NaN or infinite ({skipped} so far)"
                    )
                if config.head == "fused":
                    bad_rows = ops.take_bad_rows(device)
                    if bad_rows.labels:
                        raise UserError(_bad_labels(config, bad_rows.labels, step, train_index.num_classes))
                    if bad_rows.saturated:
                        show.say(
                            f"warning: {bad_rows.saturated} images of the last steps had a logit so far above their label's that the "
                            "softmax saturated: their part of loss and gradient is too small"
                        )
                if skipped > config.nonfinite_limit:
                    raise UserError(_too_many_skipped(folder, skipped, step))

            if step == total_steps or step % (config.eval_every * plan.steps_per_epoch) == 0:
                with watch.paused(), contextlib.nullcontext() if ema is None else ema.swapped_in():
                    evaluation = evaluate(
                        distiller.eval().predict,
                        val_loader,
                        device=device,
                        amp_dtype=amp_dtype,
                        teacher=teacher_val,
                    )
                    distiller.train()
                evaluated = {"step": step, "epoch": epoch, **evaluation.row()}
                log.write("eval", step, evaluated)
                show.say(_describe(step, total_steps, evaluation))
                if best is None or evaluation.top1 > best["top1_percent"]:
                    best = evaluated
                    with watch.paused():
                        save(run_folder.BEST)

            minutes = (time.perf_counter() - saved_at) / 60
            by_steps = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
            if by_steps or minutes >= config.checkpoint_minutes or stop.signum or step == total_steps:
                with watch.paused():
                    save(run_folder.LAST)
                saved_at = time.perf_counter()
            if stop.signum and step < total_steps:
                raise Stopped(
                    stop.signum,
                    f"stopped by {signal.Signals(stop.signum).name} at step {step} of {total_steps}, everything is saved: "
                    f"continue with ijckd-fast train --resume {folder}",
                )

        log.close()
        rows = run_folder.read_log(folder)
        summary = {
            "complete": True,
            "config": dataclasses.asdict(config),
            "steps": step,
            "last": evaluated,
            "best": best,
            "teacher_top1_percent": None if teacher_val is None else teacher_val.top1,
            "params": params,
            "macs": macs,
            "images_per_s": statistics.median(row["images_per_s"] for row in rows if row["kind"] == "train"),
            "skipped_steps": skipped,
            "unreadable_files": len(loader.bad_files) + len(val_loader.bad_files),
            "seconds": seconds + time.perf_counter() - started,
        }
        report.write_report(folder, summary, rows)
        run_folder.write_text(folder / run_folder.SUMMARY, json.dumps(summary, indent=2) + "\n")
        show.say(f"report: {folder / run_folder.REPORT}")
        return summary


# ----------------------------------------------------------------------------------------------------------------------
# What the loop is made of, in the order of its use


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in every value that was left to be chosen, so that config.yaml says all. UserError for impossible settings."""
    if not config.data_dir:
        raise UserError("no --data-dir given: wanted a folder with train/<class>/* and val/<class>/* image files")
    config = _named_by_path(_named_by_path(config, "teacher"), "student")
    has_weights = config.teacher_checkpoint is not None or config.teacher_pretrained or config.allow_weak_teacher
    if config.teacher is not None and not has_weights:
        raise UserError(
            f"teacher {config.teacher} has no weights: give --teacher-checkpoint FILE, or --teacher-pretrained for the "
            "library's published ones"
        )
    objective = objective_of(config)
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
    return dataclasses.replace(
        config,
        data_dir=os.path.abspath(config.data_dir),  # a run may be resumed from another working directory
        class_list=config.class_list and os.path.abspath(config.class_list),
        val_labels=config.val_labels and os.path.abspath(config.val_labels),
        teacher_checkpoint=config.teacher_checkpoint and os.path.abspath(config.teacher_checkpoint),
        student_checkpoint=config.student_checkpoint and os.path.abspath(config.student_checkpoint),
        output_dir=config.output_dir or f"runs/{objective.name}-{config.student.replace('/', '-')}-seed{config.seed}",
        **{name: getattr(objective, name) for name in OBJECTIVE_FIELDS if name != "connector"},
        connector=objective.connector or "none",
        eval_resize=config.eval_resize or round(config.image_size * 256 / 224),
        workers=config.workers or (max(1, len(os.sched_getaffinity(0)) - 1) if device == "cuda" else 2),
        device=device,
        amp_dtype=config.amp_dtype or ("bfloat16" if device == "cuda" else "float32"),
    )


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


def augment_of(config: TrainConfig) -> Augment:
    """How images become input; config is resolved."""
    assert config.eval_resize is not None
    return Augment(
        image_size=config.image_size,
        scale=config.scale,
        ratio=config.ratio,
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


def build_val_loader(
    config: TrainConfig, index: Index, device: torch.device, *, ids: np.ndarray | None = None, **more: Any
) -> Loader:
    """Every image of `index` once, in its order, or those of `ids` [n] int64; may be iterated again and again."""
    return _loader(config, EvalPlan(index, augment_of(config), config.batch_size, ids=ids), device, **more)


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
    teacher = None
    if config.teacher is not None:
        teacher = create_model(
            config.teacher,
            num_classes,
            checkpoint=config.teacher_checkpoint,
            pretrained=config.teacher_pretrained,
            image_size=config.image_size,
        )
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
    config: TrainConfig, folder: Path, distiller: Distiller, val_loader: Loader, inputs: dict[str, str | None]
) -> Evaluation | None:
    """The teacher's own evaluation, made once per run and kept in its folder; None without a teacher."""
    if distiller.teacher is None:
        return None
    key = f"{inputs['teacher']} {inputs['validation images']} {augment_of(config)} {config.data_backend} {config.amp_dtype}"
    path = folder / run_folder.TEACHER
    if path.exists():
        kept = np.load(path)
        if kept["key"].item() == key and "ids" in kept:
            predictions, ids = torch.from_numpy(kept["predictions"]), torch.from_numpy(kept["ids"])
            top1, top5, seconds = kept["top1_top5_seconds"].tolist()
            return Evaluation(top1, top5, 100.0, len(predictions), seconds, predictions, ids)
    evaluation = evaluate(
        distiller.eval().teacher_logits,
        val_loader,
        device=torch.device(config.device),
        amp_dtype=torch.bfloat16 if config.amp_dtype == "bfloat16" else None,
    )
    with run_folder.replacing(path) as tmp, open(tmp, "wb") as file:
        np.savez(
            file,
            key=key,
            predictions=evaluation.predictions.numpy(),
            ids=evaluation.ids.numpy(),
            top1_top5_seconds=np.array([evaluation.top1, evaluation.top5, evaluation.seconds]),
        )
    return evaluation


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


def _too_many_skipped(folder: Path, skipped: int, step: int) -> str:
    last = folder / run_folder.LAST
    if last.exists():
        good = f"the last good checkpoint is {last} (step {checkpoint.load(last)['step']})"
    else:
        good = "no checkpoint had been written yet"
    return (
        f"stopped at step {step}: {skipped} steps had a NaN or infinite loss or gradient and were skipped, more than "
        f"--nonfinite-limit allows; {good}. A smaller --lr, a longer --warmup-epochs or --amp-dtype float32 usually helps"
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


class _StopSignal:
    signum = 0


@contextlib.contextmanager
def stop_signal() -> Iterator[_StopSignal]:
    """Inside, the first SIGINT or SIGTERM only sets `signum`, so that the loop can save; a second one acts at once."""
    stop = _StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        stop.signum = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
