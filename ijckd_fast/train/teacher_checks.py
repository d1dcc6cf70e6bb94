"""Whether a teacher is worth learning from: one fixed function, the weights it was, better than chance, pixels as it
expects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ijckd_fast.data import Index, Loader, TooManyUnreadable, parity
from ijckd_fast.data.prepare import pack_loss
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import LEVEL, Evaluation, against_chance, evaluate, known_evaluation, save_evaluation
from ijckd_fast.head import REBUILD
from ijckd_fast.nets import CachedTeacher, Tapped, fingerprint, same
from ijckd_fast.parallel import Processes
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import FIELDS, TrainConfig
from ijckd_fast.train.layered import PIXELS, teachers_run
from ijckd_fast.train.resolving import amp_dtype_of, augment_of, data_folder_of, device_of, teacher_view_of

if TYPE_CHECKING:
    from ijckd_fast.train.build import RunData


_UNFIT_TEACHER = (
    "its classes are probably in another order than the sorted class folders (--class-list), or it expects other"
    " --teacher-mean, --teacher-std or --image-size; or its weights are the wrong file"
)


@torch.no_grad()
def refuse_restless_teacher(teacher: Tapped, image_size: int) -> None:
    """UserError where the teacher, in eval mode, is not one and the same function: its features would be noise to learn
    from.
    """
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
        f"teacher {teacher.name} {what}, wanted a net that eval() makes one fixed function: let its dropout and "
        "BatchNorm follow self.training, or take another teacher"
    )


def teacher_fingerprint(teacher: Tapped | CachedTeacher) -> str:
    """`nets.fingerprint` of the whole teacher, also where only its classifier is here."""
    return teacher.fingerprint if isinstance(teacher, CachedTeacher) else fingerprint(teacher)


def digests(
    train_index: Index, val_index: Index, teacher: Tapped | CachedTeacher | str | None, cache: TeacherCache | None
) -> dict[str, str | None]:
    """What the result of a run depends on besides its settings, a digest each; teacher: itself, or its fingerprint."""
    return {
        "training images": train_index.hash,
        "validation images": val_index.hash,
        "teacher": teacher if teacher is None or isinstance(teacher, str) else teacher_fingerprint(teacher),
        "cached features": None if cache is None else cache.digest,
    }


def check_parity(config: TrainConfig, train: Index, val: Index, say: Callable[[str], None]) -> None:
    """Says, once per dataset, how far the executor's pixels are from Pillow's, and of a pack what packing has lost.
    UserError beyond --max-drift, or where the block executor's are off by more than a level.

    And at every start how many images Pillow decodes all the same. Of several processes only one needs to call it.
    """
    for index in (train, val):
        rows_by_pillow = np.flatnonzero(index.by_pillow(config.decode == "gpu"))
        if len(rows_by_pillow):
            first = int(rows_by_pillow[0])
            say(
                f"{len(rows_by_pillow):,} of {len(index):,} {index.split} images are decoded by Pillow within DALI's "
                f"batches, since DALI cannot or makes other pixels of such files, e.g. {index.paths[first]} "
                f"({index.variant(first)})"
            )
    try:
        rows, known = parity.of_dataset(
            train, val, augment_of(config), threads=config.workers, device=config.device, decode=config.decode
        )
    except TooManyUnreadable as error:  # the loop meets these files too, and knows what to do then
        say(f"warning: {parity.EXECUTORS[config.data_backend]}'s pixels were not compared with Pillow's: {error}")
        return
    if not known:
        for backend in dict.fromkeys(row.backend for row in rows):
            figures = " and ".join(
                f"{row.mean_levels:.2f} on {row.images} {row.split} crops" for row in rows if row.backend == backend
            )
            say(
                f"{parity.EXECUTORS[backend]}'s pixels differ from Pillow's by {figures} (mean, grey levels); kept, "
                "not measured at the next start"
            )
        _say_pack_loss((train, val), say)
    for row in sorted(rows, key=parity.drift, reverse=True):
        if not parity.within(row, config.max_drift):
            raise UserError(_too_far(row, config, train.root))


def _say_pack_loss(indexes: Sequence[Index], say: Callable[[str], None]) -> None:
    """Of the splits that lie in a finished pack."""
    try:
        losses = [str(loss) for index in indexes if (loss := pack_loss(index.root, index.split)) is not None]
    except UserError as error:  # nothing that training needs
        say(f"warning: what packing has lost is not known: {error}")
        return
    if losses:
        say(f"packing itself has cost, against the original images in the evaluation's view: {'; '.join(losses)}")


def _too_far(row: parity.Parity, config: TrainConfig, root: str) -> str:
    """Why a run is refused."""
    crops = [
        word
        for name in ("image_size", "crop_padding", "decode", "max_drift")
        if (value := getattr(config, name)) != FIELDS[name].default
        for word in (f"--{name.replace('_', '-')}", f"{value}")
    ]
    shown = data_folder_of(config).command("bench", "loader", "--parity", "--data-dir", config.data_dir or "", *crops)
    worst = os.path.join(root, row.worst_path)
    if row.backend == "blocks":
        return (
            f"the block executor's pixels differ from Pillow's by up to {row.most_levels:.0f} grey levels on "
            f"{row.images} {row.split} crops, {row.mean_levels:.2f} in the mean, wanted at most 1, and at most "
            f"{config.max_drift:g} in the mean; the farthest is {worst}. The library was built wrongly, or the machine "
            f"miscalculates: look with {shown}, build again with {REBUILD}, or --data-backend pillow"
        )
    return (
        f"DALI's pixels differ from Pillow's by {row.mean_levels:.2f} grey levels in the mean of {row.images} "
        f"{row.split} crops, wanted at most {config.max_drift:g} (rounding makes 0.2); the farthest is "
        f"{worst} with {row.worst_levels:.2f}, wanted at most {parity.ONE_IMAGE * config.max_drift:g}. One of the two "
        f"decodes or resizes in another way here: look with {shown}, try other versions of DALI and Pillow, or "
        f"--data-backend pillow; --max-drift {math.ceil(parity.drift(row))} trains all the same"
    )


def judge_teacher(
    config: TrainConfig,
    folder: Path,
    data: RunData,
    distiller: Distiller,
    val_loader: Loader,
    inputs: Mapping[str, str | None],
    processes: Processes,
    say: Callable[[str], None],
) -> Evaluation | None:
    """The teacher's own answers on val: a cache's, else made once per run and kept in its folder. None where there are
    none.

    raises  UserError where it is near chance
    """
    measured = False
    if data.cache is None:
        evaluation, measured = _teacher_on_val(config, folder, distiller, val_loader, inputs, processes, say)
    else:
        evaluation = data.cache.on_val(data.val, teacher_view_of(config), config.data_backend)
        if evaluation is None:
            say("the cache holds the teacher's answers to other val images, or with other settings: no agreement")
    if evaluation is not None:
        took = f"{evaluation.seconds:.1f} s" if measured else "known from before"
        say(f"teacher: top-1 {evaluation.top1:.2f} % of {evaluation.images} val images, {took}")
        if not config.allow_weak_teacher:
            refuse_weak_teacher(config, evaluation, data.val, say)
    return evaluation


def _teacher_on_val(
    config: TrainConfig,
    folder: Path,
    distiller: Distiller,
    val_loader: Loader,
    inputs: Mapping[str, str | None],
    processes: Processes,
    say: Callable[[str], None],
) -> tuple[Evaluation | None, bool]:
    """(the teacher's own evaluation, made once per run and kept in its folder, None without one; whether it is new)"""
    if distiller.teacher is None:
        return None, False
    pixels = f"{teacher_view_of(config)} {config.data_backend} {config.amp_dtype}"
    key = f"{inputs['teacher']} {inputs['validation images']} {pixels}"
    path = folder / run_folder.TEACHER
    known = processes.from_main(known_evaluation(path, key, say) if processes.is_main else None)
    if known is not None:
        return known, False
    evaluation = evaluate(
        distiller.eval().teacher_logits,
        val_loader,
        device=device_of(config, processes),
        amp_dtype=amp_dtype_of(config),
        processes=processes,
    )
    if processes.is_main:
        save_evaluation(path, key, evaluation)
    return evaluation, True


def refuse_weak_teacher(config: TrainConfig, teacher: Evaluation, val: Index, say: Callable[[str], None]) -> None:
    """UserError unless the teacher's hits on val are more than chance's at LEVEL, see `against_chance`; a warning where
    val has too few images to tell, or where the hits are few although they are more.
    """
    found = against_chance(teacher.predictions.numpy(), val.labels[teacher.ids.numpy()], val.num_classes)
    expected = 100 * found.expected / found.images
    if found.passed:
        if found.weak:
            say(
                f"warning: teacher {config.teacher} is better than chance ({expected:.2f} %), but not by much:"
                f" {_why_unfit(config)}"
            )
        return
    if not found.enough:
        say(
            f"warning: {found.images} val images are too few to tell whether teacher {config.teacher}"
            f" ({found.hits} hits) is better than chance ({found.expected:.1f} hits)"
        )
        return
    counted = "" if found.counted == found.hits else f", {found.counted} without those of the 5 best classes"
    needed = "" if found.needed is None else f" (from {found.needed} hits on)"
    raise UserError(
        f"teacher {config.teacher} has a top-1 of {teacher.top1:.2f} % on the {found.images} val images, near chance"
        f" ({expected:.2f} %): it has {found.hits} hits{counted}; {found.counted} or more come about by chance with a"
        f" probability of {found.probability:.2g}, expected below {LEVEL:g}{needed}. {_why_unfit(config)}."
        " --allow-weak-teacher trains all the same"
    )


def _why_unfit(config: TrainConfig) -> str:
    """What may be wrong with the teacher; where its own run was of images of another size, that first."""
    own = teachers_run({"teacher": config.teacher, "teacher_checkpoint": config.teacher_checkpoint})
    differing = [name for name in PIXELS if own and own[name] != getattr(config, name)]
    if not differing:
        return _UNFIT_TEACHER
    theirs = " ".join(f"--{name.replace('_', '-')} {own[name]}" for name in differing)
    ours = " ".join(f"{getattr(config, name)}" for name in differing)
    return f"it was trained with {theirs}, here it is {ours}; or {_UNFIT_TEACHER}"
