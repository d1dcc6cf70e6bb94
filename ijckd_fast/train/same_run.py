"""What the processes of a run must have in common: settings, code, versions, and the weights that they start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ijckd_fast import files
from ijckd_fast.nets import fingerprint
from ijckd_fast.parallel import Processes, refuse_differences
from ijckd_fast.train import run_folder
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import PER_PROCESS, SETTINGS, TrainConfig
from ijckd_fast.train.state import RunState

# Whose code has a part in the bits of a run. Distributions that are not installed are equal where they are nowhere.
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda130")


def facts(config: TrainConfig, *, resume: bool, resume_from: str, overwrite: bool) -> dict[str, str]:
    """Of a resolved config and this installation, by the names that an error calls them. Not among them: where things
    lie on this machine, whose contents are compared, and how fast they are read.
    """
    settings = {
        f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in SETTINGS if name not in PER_PROCESS
    }
    return {
        **settings,
        "--resume": resume_from if resume else "not given",
        "--overwrite": "given" if overwrite else "not given",
        "the version of ijckd-fast": str(run_folder.version_of("ijckd-fast")),
        "the code of ijckd-fast": code_hash(),
        **{f"the version of {name}": str(run_folder.version_of(name)) for name in _LIBRARIES},
        "torch's CUDA": str(torch.version.cuda),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
    }


def refuse_other_inputs(config: TrainConfig, inputs: Mapping[str, str | None], processes: Processes) -> None:
    """UserError where another process has other weights of the teacher, another cache, or another file for the student.
    Images are compared by `build.refuse_other_images`.
    """
    if processes.world == 1:
        return
    mine = {f"the digest of the {what}": str(digest) for what, digest in inputs.items()}
    path = config.student_checkpoint
    mine["the digest of the file --student-checkpoint"] = "none" if path is None else files.digest(Path(path))
    refuse_differences(processes.gather(mine))


def refuse_other_state(state: RunState, processes: Processes) -> None:
    """UserError where another process has read another checkpoint to continue from."""
    if processes.world > 1:
        weights = fingerprint(state.learner)
        refuse_differences(
            processes.gather({"the step of the checkpoint": str(state.step), "the digest of its weights": weights})
        )
