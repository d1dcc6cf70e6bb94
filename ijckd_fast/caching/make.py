"""`ijckd-fast cache`: a teacher's pooled features of V views of every training image, written once, then verified."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ijckd_fast import files, signals
from ijckd_fast.caching.verify import verify_cache
from ijckd_fast.caching.views import PlannedViews, Teller, features_of
from ijckd_fast.console import progress_bar
from ijckd_fast.data import Index, StandIns, TooManyUnreadable, check_views, parity
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import evaluate, known_evaluation, save_evaluation
from ijckd_fast.nets import Tapped
from ijckd_fast.normalisation import IMAGENET
from ijckd_fast.teacher_cache import AGAIN, VAL, CacheWriter, plan_settings, refuse_other_folder, val_key
from ijckd_fast.train import (
    TrainConfig,
    amp_dtype_of,
    augment_of,
    build_indexes,
    build_teacher,
    build_val_loader,
    check_parity,
    normalisations_of,
    refuse_restless_teacher,
    refuse_weak_teacher,
    resolve,
    teacher_fingerprint,
    teacher_view_of,
    warnings_of_seen_images,
)
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import CACHE_CHUNK_IMAGES, CACHE_VERIFY
from ijckd_fast.train.layered import CACHE


def make_cache(
    config: TrainConfig,
    out: str | Path,
    views: int,
    *,
    chunk_images: int = CACHE_CHUNK_IMAGES,
    verify: int = CACHE_VERIFY,
    verify_seed: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the cache that `train` takes as teacher cache:OUT, or continues it, or only verifies it.

    config        teacher, data and image settings; what belongs to the student is not looked at
    out           folder: new, empty, or an earlier cache of the same things, of which no finished chunk is computed
                  again
    views         V: crops and flips of epochs 0 to V - 1
    chunk_images  images in a chunk, the unit that is written, checked and computed again
    verify        views that are computed again in the end, drawn from all
    verify_seed   of that draw; None: another one each time
    overwrite     delete the cache that is in `out`
    console       where progress is reported; default: standard output
    progress      show a bar on stderr
    returns       the figures that the command prints, and a sentence for each view that is not what the teacher says
    raises        UserError: settings or data, a cache of something else in `out`, a full disk, a teacher near chance,
                  features that are not finite; signals.Stopped
    """
    begun = time.perf_counter()
    config = _checked(config, views, chunk_images, verify)
    amp_dtype = amp_dtype_of(config)
    tell = Teller(console or Console())
    folder = Path(out).absolute()
    refuse_other_folder(folder)
    with files.lock(folder, "folder OUT"):
        train_index, val_index = build_indexes(config)
        teacher, fingerprint = _still_teacher(config, train_index.num_classes)
        assert teacher.classifier is not None
        writer = CacheWriter(
            folder,
            name=teacher.name,
            fingerprint=fingerprint,
            weights=config.teacher_checkpoint or ("published" if config.teacher_pretrained else "random"),
            classifier=teacher.classifier,
            classes=train_index.classes,
            settings={
                **plan_settings(train_index, teacher_view_of(config), config.seed, config.data_backend),
                "amp_dtype": config.amp_dtype,
            },
            views=views,
            chunk_images=chunk_images,
            made_with={
                "torch": torch.__version__, "code": code_hash(), "device": config.device,
                "decode": config.decode,
            },
            overwrite=overwrite,
        )  # fmt: skip
        with writer:
            layout = writer.layout
            tell(
                f"{folder}: {teacher.name} on {views} views of {len(train_index):,} images, {layout.channels} channels,"
                f" {layout.bytes / 1e6:,.1f} MB; {layout.chunks - len(writer.pending)} of {layout.chunks} chunks are"
                " there"
            )
            for chunk in writer.damaged:
                view, ids = layout.part(chunk)
                tell(
                    f"warning: images {ids.start} to {ids.stop - 1} of view {view} are not what was written, and are"
                    " made again"
                )
            _, own = normalisations_of(config)
            if own != IMAGENET:
                tell(f"the teacher's images are normalised by {own}")
            for note in (*(f"teacher: {note}" for note in teacher.notes), *warnings_of_seen_images(config)):
                tell(note)
            if config.data_backend in parity.EXECUTORS:
                check_parity(config, train_index, val_index, tell)
            _judge(config, folder, teacher, fingerprint, val_index, tell)
            features = features_of(teacher, torch.device(config.device), amp_dtype)
            planned = PlannedViews(config, train_index, writer, features, tell)
            rows = sum(len(layout.part(chunk)[1]) for chunk in writer.pending)
            start = time.perf_counter()
            _fill(planned, progress)
            seconds = time.perf_counter() - start
            everyones = StandIns(train_index)
            for i, (_, why) in writer.unreadable.items():
                everyones.add(i, why)  # a class without any image is refused here, not in every training
            verified = verify_cache(planned, verify, verify_seed, amp_dtype)
            writer.finish(sound=not verified.wrong)
    return {
        "views": views,
        "images": len(train_index),
        "channels": layout.channels,
        "bytes": layout.bytes,
        "seconds": round(time.perf_counter() - begun, 3),
        "images_per_s": round(rows / seconds, 1) if rows else None,
        "verified": verified.agree,
        "max_difference": verified.largest,
        "path": str(folder),
    }, verified.wrong


def _checked(config: TrainConfig, views: int, chunk_images: int, verify: int) -> TrainConfig:
    """The config, resolved; UserError for what makes no cache."""
    for name, value, least in (("--chunk-images", chunk_images, 1), ("--verify", verify, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if config.teacher is None:
        raise UserError("no --teacher given: expected a model's name with its weights, or an earlier run")
    if config.teacher_cache is not None or config.teacher.startswith(CACHE):
        raise UserError(
            "a cache is made of a teacher itself, got another cache: give its name with --teacher-checkpoint, or its"
            " run"
        )
    config = resolve(config)
    check_views(views, augment_of(config))
    return config


def _still_teacher(config: TrainConfig, num_classes: int) -> tuple[Tapped, str]:
    """The teacher on its device, in eval mode and without gradients, and the fingerprint of its weights."""
    teacher = build_teacher(config, num_classes)
    assert isinstance(teacher, Tapped)
    fingerprint = teacher_fingerprint(teacher)
    if config.channels_last:
        teacher.to(memory_format=torch.channels_last)
    teacher.to(torch.device(config.device)).eval().requires_grad_(False)
    refuse_restless_teacher(teacher, config.image_size)
    return teacher, fingerprint


def _judge(config: TrainConfig, folder: Path, teacher: Tapped, fingerprint: str, index: Index, tell: Teller) -> None:
    """The teacher's own evaluation, kept in the cache; UserError where it is near chance."""
    key = val_key(fingerprint, index, teacher_view_of(config), config.data_backend)
    evaluation = known_evaluation(folder / VAL, key, tell)
    if evaluation is None:
        device = torch.device(config.device)
        with build_val_loader(config, index, device, on_bad=tell.bad_file("it is left out")) as loader:
            evaluation = evaluate(teacher, loader, device=device, amp_dtype=amp_dtype_of(config))
        save_evaluation(folder / VAL, key, evaluation)
    tell(f"teacher: top-1 {evaluation.top1:.2f} % of {evaluation.images} val images")
    if not config.allow_weak_teacher:
        refuse_weak_teacher(config, evaluation, index, tell)


def _fill(views: PlannedViews, progress: bool) -> None:
    """Writes every chunk that is not there."""
    config, index, writer = views.config, views.index, views.writer
    layout, pending = writer.layout, list(writer.pending)
    if not pending:
        return
    parts = [layout.part(chunk) for chunk in pending]
    total = layout.views * layout.images
    with progress_bar(progress) as bar, views.loader(views.batches(parts)) as loader, signals.noted() as asked:
        line = bar.add_task("caching", total=total, completed=total - sum(len(ids) for _, ids in parts))
        stream = iter(loader)
        for chunk, (_, ids) in zip(pending, parts, strict=True):
            features, seen = [], []
            for _ in range(0, len(ids), config.batch_size):
                try:
                    batch = next(stream)
                except TooManyUnreadable as error:
                    raise UserError(
                        f"{error}. Finished chunks stay: fix the data and run {AGAIN} again, or allow more with"
                        " --unreadable-limit"
                    ) from error
                assert loader.followed is not None
                features.append(views.features(batch.images).bfloat16())
                seen.append(loader.followed.ids)
                bar.advance(line, len(loader.followed.ids))
                if asked.signum:
                    finished = layout.chunks - len(writer.pending)
                    raise signals.Stopped(
                        asked.signum, f", {finished} of {layout.chunks} chunks are there: {AGAIN} continues"
                    )
            bits = torch.cat(features).cpu()  # [n, Ct] bfloat16; the host waits once per chunk
            planned = np.asarray(ids)
            read = np.concatenate(seen) == planned
            finite = bits.isfinite().all(1).numpy()
            if not finite[read].all():
                i = int(planned[read & ~finite][0])
                raise UserError(
                    f"the features of teacher {config.teacher} for {index.absolute(i)} are NaN or infinite, expected"
                    " finite numbers: its weights are damaged, or they need --amp-dtype float32"
                )
            reasons = loader.plan.stand_ins.reasons
            left_out = [(int(i), index.paths[int(i)], reasons[int(i)]) for i in planned[~read]]
            writer.write(chunk, bits.view(torch.uint16).numpy(), left_out)
