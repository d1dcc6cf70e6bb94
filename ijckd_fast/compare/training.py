"""Trains a comparison: its teacher, then every run that is not there yet."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ijckd_fast import files
from ijckd_fast.compare.comparison import DIGITS, Comparison, refuse_mistakes
from ijckd_fast.compare.launch import one_by_one, reason, side_by_side, train_here
from ijckd_fast.compare.results import RESULTS, append_result, write_results
from ijckd_fast.compare.reuse import InputDigests, state_of
from ijckd_fast.compare.runs import Run, plan
from ijckd_fast.console import say
from ijckd_fast.data import write_digits
from ijckd_fast.errors import UserError
from ijckd_fast.parallel import world_size
from ijckd_fast.train import Saved, TrainConfig, run_folder


@dataclass(frozen=True)
class Outcome:
    """What `train_all` brought."""

    teacher: Mapping[str, Any] | None  # its summary where it was trained here
    runs: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]  # regime -> method -> seed -> summary.json
    failed: Mapping[str, str]  # name of a run -> why it failed


def train_all(
    comparison: Comparison, output: Path, *, jobs: int = 1, any_code: bool = False, console: Console
) -> Outcome:
    """Trains what is not in `output` yet: its teacher, then every run by seeds, on one thread each; writes runs.csv.

    jobs      runs side by side, each a process of its own; 1: one after the other in this process
    any_code  use runs that other code of ijckd_fast finished or began too, even where it lacked some of the settings;
              otherwise they are trained again
    console   one line for each run
    returns   the summaries of all runs, and the errors of those that failed: one that fails does not end the others
    raises    UserError for what cannot be compared, or a teacher that fails; Stopped, after every run was
              saved

    A run that is there with the same settings, code, images and teacher is used again, or continued where it was
    interrupted. Any other in its folder is replaced. runs.csv has one line for each finished run, appended as it ends.
    """
    refuse_mistakes(comparison, jobs)
    if world_size() > 1:
        raise UserError(
            f"a comparison starts processes of its own, got {world_size()} of a launcher: run it without, and see "
            "--jobs"
        )
    teacher_config, runs = plan(comparison, output)
    threads = torch.get_num_threads()
    with files.lock(output, "--output"):
        if comparison.data_dir == DIGITS:
            write_digits(output / DIGITS)
        # the order of a sum, and so its last bits, depends on the number of threads: one, whatever jobs is
        torch.set_num_threads(1)
        try:
            digests = InputDigests()
            teacher = None
            if teacher_config is not None:
                teacher = _train_teacher(comparison, teacher_config, digests, any_code, console)
            states, damaged = _states_of(runs, digests, any_code, console)
            summaries, failed = _train_missing(comparison, output / RESULTS, states, damaged, jobs, console)
        finally:
            torch.set_num_threads(threads)

    nested: dict[str, dict[str, dict[int, dict[str, Any]]]] = {
        regime: {method: {} for method in comparison.methods} for regime in comparison.regimes
    }
    for run, summary in summaries.items():
        nested[run.regime][run.method][run.seed] = summary
    return Outcome(teacher, nested, {run.name: error for run, error in failed.items()})


def _states_of(
    runs: Sequence[Run], digests: InputDigests, any_code: bool, console: Console
) -> tuple[dict[Run, str], dict[Run, str]]:
    """(`state_of` each run; the errors of those that are damaged). UserError where all have the same error."""
    states: dict[Run, str] = {}
    damaged: dict[Run, str] = {}
    for run in runs:
        try:
            states[run] = state_of(run, digests.of(run.config), any_code, functools.partial(say, console))
        except Exception as error:
            damaged[run] = reason(error)
    if not states and len(set(damaged.values())) == 1:  # it is not a matter of the single run
        raise UserError(next(iter(damaged.values())))
    for run, why in damaged.items():
        say(console, f"{run.name} failed: {why}")
    return states, damaged


def _train_teacher(
    comparison: Comparison, config: TrainConfig, digests: InputDigests, any_code: bool, console: Console
) -> dict[str, Any]:
    """The summary of the teacher, which is trained unless it is there."""
    run = Run("", "teacher", config.seed, config)
    state = state_of(run, digests.of(config), any_code, functools.partial(say, console))
    try:
        if state != "finished":
            train_here(config, resume=state == "begun")
        Saved.read(run.folder / run_folder.LAST)  # which every run begins with
    except files.Damaged as error:
        again = f"or delete {run.folder}, and the same command trains it again"
        raise UserError(f"teacher of {comparison.name}: {error}; {again}") from error
    except UserError as error:
        raise UserError(f"teacher of {comparison.name}: {error}") from error
    say(console, _line("teacher", run.summary(), again=state == "finished"))
    return run.summary()


def _train_missing(
    comparison: Comparison,
    results: Path,
    states: Mapping[Run, str],
    damaged: Mapping[Run, str],
    jobs: int,
    console: Console,
) -> tuple[dict[Run, dict[str, Any]], dict[Run, str]]:
    """Trains the runs that are not finished yet.

    results  runs.csv
    states   of all runs but those in `damaged`, see `state_of`
    damaged  why the others are not looked at
    returns  (the summaries of all runs that are finished then, in the order of `states`; the errors of the others)
    """
    summaries = {run: run.summary() for run, state in states.items() if state == "finished"}
    failed = dict(damaged)
    # Written from what is there, then a line for each run that ends: so it never holds a run twice.
    write_results(results, comparison.name, summaries)
    longest = max(len(run.name) for run in (*states, *damaged))
    for run, summary in summaries.items():
        say(console, _line(run.name.ljust(longest), summary, again=True))

    def ended(run: Run, error: str | None) -> None:
        try:
            found = run.summary() if error is None else None
        except UserError as damage:
            found, error = None, str(damage)
        if found is not None:
            summaries[run] = found
            append_result(results, comparison.name, run, summaries[run])
            say(console, _line(run.name.ljust(longest), summaries[run]))
        else:
            failed[run] = str(error)
            say(console, f"{run.name} failed: {error}")

    # a seed of every method before the next seed: what is stopped early has something to compare
    missing: Sequence[tuple[Run, bool]] = [
        (run, states[run] == "begun") for run in sorted(states, key=lambda run: run.seed) if states[run] != "finished"
    ]
    if jobs == 1:
        one_by_one(missing, ended)
    else:
        side_by_side(missing, jobs, ended)
    in_order = {run: summaries[run] for run in states if run in summaries}
    write_results(results, comparison.name, in_order)
    return in_order, failed


def _line(name: str, summary: Mapping[str, Any], again: bool = False) -> str:
    last = summary["last"]
    agreement = "" if last["agreement_percent"] is None else f", agreement {last['agreement_percent']:6.2f} %"
    used = " (finished earlier, used again)" if again else ""
    return f"{name:14}  top-1 {last['top1_percent']:6.2f} %{agreement}, {summary['seconds']:5.1f} s{used}"
