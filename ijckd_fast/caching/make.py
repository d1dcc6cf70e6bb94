"""`ijckd-fast cache`: a teacher's pooled features of V views of every training image, written once, then checked against the teacher."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ijckd_fast import files
from ijckd_fast.console import say
from ijckd_fast.data import Augment, Index, Loader, TooManyUnreadable
from ijckd_fast.data.plan import StandIns, check_views
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate.accuracy import evaluate, load_evaluation, save_evaluation
from ijckd_fast.nets import Tapped
from ijckd_fast.teacher_cache.reader import AGAIN, VAL, CacheWriter, plan_settings, refuse_other_folder, val_key
from ijckd_fast.train import (
    Stopped,
    TrainConfig,
    augment_of,
    build_indexes,
    build_teacher,
    build_val_loader,
    build_view_loader,
    check_parity,
    refuse_restless_teacher,
    refuse_weak_teacher,
    resolve,
    run_folder,
    stop_signal,
    teacher_fingerprint,
)
from ijckd_fast.train.config import CACHE_CHUNK_IMAGES, CACHE_VERIFY

# How far a feature may be off when it is computed again in another batch, as a share of the largest one of its image, beside bfloat16's
# rounding of the stored number: sums in another order, and TF32 or bfloat16 products on a GPU.
_DRIFT = {"float32": 2.0**-10, "bfloat16": 2.0**-5}
_ROUNDING = 2.0**-8  # bfloat16 has 8 bits


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
    """Writes the cache that `train` takes as teacher cache:OUT, or goes on with it, or only verifies it.

    config        teacher, data and image settings; what belongs to the student is not looked at
    out           folder: new, empty, or an earlier cache of the same things, of which no finished chunk is computed again
    views         V: crops and flips of epochs 0 to V - 1
    chunk_images  images in a chunk, the unit that is written, checked and computed again
    verify        views that are computed again in the end, drawn from all
    verify_seed   of that draw; None: another one each time
    overwrite     delete the cache that is in `out`
    console       where progress is told; default: standard output
    progress      show a bar on stderr
    returns       the figures that the command prints, and a sentence for each view that is not what the teacher says
    raises        UserError: settings or data, a cache of something else in `out`, a full disk, a teacher near chance, features that
                  are not finite; Stopped on SIGINT or SIGTERM
    """
    begun = time.perf_counter()
    for name, value, least in (("--chunk-images", chunk_images, 1), ("--verify", verify, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if config.teacher is None:
        raise UserError("no --teacher given: wanted a model's name with its weights, or an earlier run")
    if config.teacher_cache is not None or config.teacher.startswith("cache:"):
        raise UserError(
            "a cache is made of a teacher itself, got another cache: give its name with --teacher-checkpoint, or its run"
        )
    config = resolve(config)
    assert config.amp_dtype is not None
    check_views(views, augment_of(config))
    console = console or Console()
    tell = _Teller(console)
    folder = Path(out).absolute()
    refuse_other_folder(folder)
    with files.lock(folder, "folder OUT"):
        device = torch.device(config.device)
        train_index, val_index = build_indexes(config)
        augment = augment_of(config)
        teacher = build_teacher(config, train_index.num_classes)
        assert isinstance(teacher, Tapped)
        assert teacher.classifier is not None
        fingerprint = teacher_fingerprint(teacher)
        if config.channels_last:
            teacher.to(memory_format=torch.channels_last)
        teacher.to(device).eval().requires_grad_(False)
        refuse_restless_teacher(teacher, config.image_size)
        features_of = _features_of(teacher, device, config.amp_dtype)
        writer = CacheWriter(
            folder,
            name=teacher.name,
            fingerprint=fingerprint,
            weights=config.teacher_checkpoint or ("published" if config.teacher_pretrained else "random"),
            classifier=teacher.classifier,
            classes=train_index.classes,
            settings={
                **plan_settings(train_index, augment, config.seed, config.data_backend), "amp_dtype": config.amp_dtype
            },
            views=views,
            chunk_images=chunk_images,
            made_with={
                "torch": torch.__version__, "code": run_folder.code_hash(), "device": config.device, "decode": config.decode
            },
            overwrite=overwrite,
        )  # fmt: skip
        with writer:
            layout = writer.layout
            tell(
                f"{folder}: {teacher.name} on {views} views of {len(train_index):,} images, {layout.channels} channels, "
                f"{layout.bytes / 1e6:,.1f} MB; {layout.chunks - len(writer.pending)} of {layout.chunks} chunks are there"
            )
            for chunk in writer.damaged:
                view, ids = layout.part(chunk)
                tell(
                    f"warning: images {ids.start} to {ids.stop - 1} of view {view} are not what was written, and are made anew"
                )
            if config.data_backend == "dali":
                check_parity(config, train_index, val_index, tell)
            _judge(config, folder, teacher, fingerprint, val_index, augment, tell)
            rows = sum(len(layout.part(chunk)[1]) for chunk in writer.pending)
            start = time.perf_counter()
            _fill(config, writer, train_index, features_of, tell, progress)
            seconds = time.perf_counter() - start
            everyones = StandIns(train_index)
            for i, (_, why) in writer.unreadable.items():
                everyones.add(i, why)  # a class without any image is refused here, not in every training
            verified, difference, wrong = _verify(config, writer, train_index, features_of, verify, verify_seed, tell)
            writer.finish(sound=not wrong)
    return {
        "views": views,
        "images": len(train_index),
        "channels": layout.channels,
        "bytes": layout.bytes,
        "seconds": round(time.perf_counter() - begun, 3),
        "images_per_s": round(rows / seconds, 1) if rows else None,
        "verified": verified,
        "max_difference": difference,
        "path": str(folder),
    }, wrong


class _Teller:
    """One line on the console, whatever is in it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str) -> None:
        say(self._console, text)

    def bad_file(self, what: str) -> Callable[[str, str], None]:
        return lambda path, why: self(f"warning: {path} cannot be read any more ({why}): {what}")


def _features_of(teacher: Tapped, device: torch.device, amp_dtype: str) -> Callable[[Tensor], Tensor]:
    """images [B, 3, S, S] -> the teacher's pooled features [B, Ct] float32, computed as in a training step."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp_dtype == "bfloat16"):
            return teacher.features(images)[1].float()

    return features


def _judge(
    config: TrainConfig, folder: Path, teacher: Tapped, fingerprint: str, index: Index, augment: Augment, tell: _Teller
) -> None:
    """The teacher's own evaluation, kept in the cache; UserError where it is near chance."""
    key = val_key(fingerprint, index, augment, config.data_backend)
    kept = load_evaluation(folder / VAL)
    if kept is not None and kept[0] == key:
        evaluation = kept[1]
    else:
        device = torch.device(config.device)
        with build_val_loader(config, index, device, on_bad=tell.bad_file("it is left out")) as loader:
            amp_dtype = torch.bfloat16 if config.amp_dtype == "bfloat16" else None
            evaluation = evaluate(teacher, loader, device=device, amp_dtype=amp_dtype)
        save_evaluation(folder / VAL, key, evaluation)
    tell(f"teacher: top-1 {evaluation.top1:.2f} % of {evaluation.images} val images")
    if not config.allow_weak_teacher:
        refuse_weak_teacher(config, evaluation, index.num_classes)


def _fill(
    config: TrainConfig,
    writer: CacheWriter,
    index: Index,
    features_of: Callable[[Tensor], Tensor],
    tell: _Teller,
    progress: bool,
) -> None:
    """Writes every chunk that is not there."""
    layout, pending = writer.layout, list(writer.pending)
    if not pending:
        return
    parts = [layout.part(chunk) for chunk in pending]
    batches = [
        (view, ids[first : first + config.batch_size])
        for view, ids in parts
        for first in range(0, len(ids), config.batch_size)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = layout.views * layout.images
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar,
        _loader(config, index, batches, writer, tell) as loader,
        stop_signal() as stop,
    ):
        line = bar.add_task("caching", total=total, completed=total - sum(len(ids) for _, ids in parts))
        stream = iter(loader)
        for chunk, (_, ids) in zip(pending, parts, strict=True):
            features, seen = [], []
            for _ in range(0, len(ids), config.batch_size):
                try:
                    batch = next(stream)
                except TooManyUnreadable as error:
                    raise UserError(
                        f"{error}. Finished chunks stay: mend the data and run {AGAIN} again, or allow more with --unreadable-limit"
                    ) from error
                assert loader.followed is not None
                features.append(features_of(batch.images).bfloat16())
                seen.append(loader.followed.ids)
                bar.advance(line, len(loader.followed.ids))
                if stop.signum:
                    finished = layout.chunks - len(writer.pending)
                    raise Stopped(
                        stop.signum,
                        f"stopped by {signal.Signals(stop.signum).name}, {finished} of {layout.chunks} chunks are there: {AGAIN} goes on",
                    )
            bits = torch.cat(features).cpu()  # [n, Ct] bfloat16; the host waits once per chunk
            planned = np.asarray(ids)
            read = np.concatenate(seen) == planned
            finite = bits.isfinite().all(1).numpy()
            if not finite[read].all():
                i = int(planned[read & ~finite][0])
                raise UserError(
                    f"the features of teacher {config.teacher} for {index.absolute(i)} are NaN or infinite, wanted finite numbers: its "
                    "weights are damaged, or they need --amp-dtype float32"
                )
            reasons = loader.plan.stand_ins.reasons
            left_out = [(int(i), index.paths[int(i)], reasons[int(i)]) for i in planned[~read]]
            writer.write(chunk, bits.view(torch.uint16).numpy(), left_out)


def _loader(
    config: TrainConfig, index: Index, batches: list[tuple[int, Any]], writer: CacheWriter, tell: _Teller
) -> Loader:
    on_bad = tell.bad_file("it is left out of the cache, and training has another image of its class in its place")
    loader = build_view_loader(config, index, batches, torch.device(config.device), on_bad=on_bad)
    for i, (_, why) in writer.unreadable.items():
        loader.plan.stand_ins.add(i, why)
    return loader


def _verify(
    config: TrainConfig,
    writer: CacheWriter,
    index: Index,
    features_of: Callable[[Tensor], Tensor],
    count: int,
    seed: int | None,
    tell: _Teller,
) -> tuple[int, float | None, list[str]]:
    """Asks the teacher again for `count` views: how many agree, the largest absolute difference of a feature, and a sentence for
    each that does not.
    """
    if count == 0:
        return 0, None, []
    seed = secrets.randbits(32) if seed is None else seed
    total = writer.layout.views * len(index)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))  # view * N + id
    drawn = drawn[~np.isin(drawn % len(index), list(writer.unreadable))]
    batches: list[tuple[int, Any]] = []
    for view in np.unique(drawn // len(index)).tolist():
        ids = drawn[drawn // len(index) == view] % len(index)
        batches += [(view, ids[first : first + config.batch_size]) for first in range(0, len(ids), config.batch_size)]
    good, largest = 0, 0.0
    wrong = []
    with _loader(config, index, batches, writer, tell) as loader:
        for (view, ids), batch in zip(batches, loader, strict=True):
            assert loader.followed is not None
            again = features_of(batch.images).cpu()  # [n, Ct]
            cached = writer.read(view * len(index) + ids)  # [n, Ct]
            peak = again.abs().amax(1, keepdim=True)
            bound = _ROUNDING * again.abs() + _DRIFT[config.amp_dtype or "float32"] * peak
            difference = (again - cached).abs()
            for row, i in enumerate(ids.tolist()):
                if loader.followed.ids[row] != i:  # it cannot be read any more: nothing to compare with
                    continue
                far = float(difference[row].max())
                largest = max(largest, far)
                if bool((difference[row] <= bound[row]).all()):  # NaN is not
                    good += 1
                else:
                    wrong.append(
                        f"view {view} of {index.absolute(i)}: the cached features differ from the teacher's by {far:.4g}, and the largest "
                        f"of them is {float(peak[row]):.4g}"
                    )
    tell(
        f"verified: {good} of {good + len(wrong)} views computed again agree, largest difference {largest:.3g} (--verify-seed {seed})"
    )
    return good, largest, wrong
