"""What a run was begun with, and whether it is finished: what its files say, and whether they say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import FIELDS, FREE_ON_RESUME, TrainConfig, make_config
from ijckd_fast.train.resolving import resolve
from ijckd_fast.train.state import Saved

_NUMBERS = ("steps", "params", "macs", "seconds")  # of a summary


def settings_of(
    folder: Path, checkpoint: str = run_folder.LAST, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The settings that the run in `folder` was begun with, or continued with last.

    config.yaml says them. Where it is lost or damaged, the checkpoint does, and `say` is told so.

    raises  UserError where there is no run, where neither says them, and where config.yaml was changed and differs from
            the checkpoint
    """
    found, path = run_folder.recorded(folder), folder / checkpoint
    if found.values is not None and found.fault is None:
        return found.values
    if not path.exists():
        raise run_folder.config_refused(folder, found)
    saved = Saved.read(path)
    if found.values is not None and (differing := _differing(saved.config, found.values)):
        raise files.Damaged(
            f"{folder / run_folder.CONFIG} {found.fault}: {_named(differing, checkpoint)}. Delete it, and it is written"
            f" again from {checkpoint}; what may be changed in a run that was begun is changed by an option"
        )
    say(f"{folder / run_folder.CONFIG} {found.fault}: the settings are those of {checkpoint}")
    return saved.config


def _differing(saved: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value in the checkpoint, value in config.yaml) of the settings that both have and are not the same."""
    pairs = [(name, saved[name], recorded[name]) for name in saved if name in recorded]
    return [(name, a, b) for name, a, b in pairs if _plain(a) != _plain(b)]


def _plain(value: Any) -> Any:
    """A setting as any file gives it: JSON and YAML have no tuples, and may write 1.0 as 1."""
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _named(differing: list[tuple[str, Any, Any]], checkpoint: str) -> str:
    shown = [f"{name} is {theirs}, {checkpoint} has {ours}" for name, ours, theirs in differing[:3]]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "; ".join(shown) + more


def refuse_other_settings(folder: Path, config: TrainConfig, begun: Mapping[str, Any]) -> None:
    """UserError where the run in `folder` was begun with other settings that its weights depend on.

    config  resolved
    begun   as `settings_of` gives them
    """
    for name, old, new in _changed(begun, config):
        raise UserError(
            f"{folder} was begun with {name} = {old} and cannot be resumed with {new}: the result would be "
            "neither run's; leave the setting out, or start a new run in another --output-dir"
        )


def refuse_other_run(path: Path, saved: Saved, config: TrainConfig) -> None:
    """UserError where the checkpoint `path` was made with other settings, that its weights depend on, than `config`,
    which config.yaml beside it agrees with.
    """
    for name, ours, theirs in _changed(saved.config, config):
        raise UserError(
            f"{path} was made with {name} = {ours}, {run_folder.CONFIG} beside it has {theirs}: one of the two files is"
            f" another run's or was changed. Put back the one that belongs here; without {run_folder.CONFIG} the run"
            " continues with the settings of the checkpoint"
        )


def _changed(begun: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(name, value in `begun`, value in `config`) of the settings that differ and must not."""
    there = resolve(make_config({**begun, "output_dir": config.output_dir}))
    pairs = [(name, getattr(there, name), getattr(config, name)) for name in FIELDS if name not in FREE_ON_RESUME]
    return [(name, old, new) for name, old, new in pairs if old != new]


def refuse_foreign_checkpoint(path: Path, saved: Saved) -> None:
    """UserError where a whole config.yaml beside the checkpoint `path` says that the folder is another run's."""
    try:
        found = run_folder.recorded(path.parent)
    except UserError:  # it may not be read: the checkpoint itself says all that is needed
        return
    if not found.checked or found.fault is not None or found.values is None:
        return
    differing = [each for each in _differing(saved.config, found.values) if each[0] not in FREE_ON_RESUME]
    if differing:
        raise UserError(
            f"{path} does not belong to the run in its folder: in {run_folder.CONFIG} {_named(differing, path.name)}."
            " Put the right file there, or look at this one in a folder of its own"
        )


def finished_summary(folder: Path, config: TrainConfig, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What summary.json says of the run in `folder`; None where it is not finished, or has to be written again from its
    last checkpoint because summary.json is damaged or not this run's, of which `say` is told.

    config  resolved
    raises  UserError where it can neither be believed nor be written again
    """
    path = folder / run_folder.SUMMARY
    remedy = f"{run_folder.SUMMARY} is written again from {run_folder.LAST} and {run_folder.LOG}"
    if not (folder / run_folder.LAST).exists():
        remedy = f"there is no {run_folder.LAST} to write it again from; restore it, or delete it and train again"
    try:
        found = files.read_checked(path, remedy)
        if found is None:
            return None
        summary, checked = found
        fault = _fault_of(summary, config) or (None if checked else _fault_by_log(summary, folder))
        if fault is None:
            return summary
        raise files.Damaged(f"{path} is damaged or was changed ({fault}): {remedy}")
    except files.Damaged as error:
        if not (folder / run_folder.LAST).exists():
            raise
        say(str(error))
        return None


def _fault_of(summary: Mapping[str, Any], config: TrainConfig) -> str | None:
    """What shows that a summary is not that of a run with these settings."""
    rows = [summary.get("last"), summary.get("best")]
    if not all(isinstance(row, dict) and isinstance(row.get("top1_percent"), (int, float)) for row in rows):
        return "it has no accuracies"
    if not all(isinstance(summary.get(name), (int, float)) for name in _NUMBERS):
        return f"it lacks one of {', '.join(_NUMBERS)}"
    theirs = summary.get("config")
    if not isinstance(theirs, dict):
        return "it has no settings"
    for name, value in theirs.items():
        if name in FIELDS and name not in FREE_ON_RESUME and _plain(value) != _plain(getattr(config, name)):
            return f"it is of a run with {name} = {value}, expected {getattr(config, name)}"
    return None


def _fault_by_log(summary: Mapping[str, Any], folder: Path) -> str | None:
    """The same for a summary without a check value, as earlier versions wrote them."""
    rows = [row for row in run_folder.read_log(folder) if row["kind"] == "eval"]
    known = [{name: value for name, value in row.items() if name != "kind"} for row in rows]
    return f"its accuracies are not in {run_folder.LOG}" if known and summary["last"] not in known else None
