"""A process that gives no sign of life is named by the others, which end; one that is at work is waited for."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest
import torch
from processes import Run

from ijckd_fast import signals
from ijckd_fast.errors import UserError
from ijckd_fast.parallel import Processes, refuse_differences, started

SHORT, LONG = 2.0, 100.0  # seconds of patience


def _in_run(patience: float, work: str, facts: dict[int, dict[str, str]]) -> int:
    """One of the processes of a run that does `work`; ends as a command does."""
    rank = int(os.environ["RANK"])
    limit = datetime.timedelta(seconds=patience)
    try:
        with signals.handled(program=True):
            print("here", flush=True)
            with started("cpu", facts=facts.get(rank), patience=limit) as processes:
                processes.resumed_by("Continue so")
                globals()[f"_{work}"](processes)
    except (UserError, signals.Stopped) as error:
        print(error, flush=True)
        os._exit(128 + error.signum if isinstance(error, signals.Stopped) else 2)
    print("done", flush=True)
    os._exit(0)


@pytest.fixture
def begin(tmp_path):
    """Begins a run; what is left of it in the end, stopped perhaps, is killed."""
    runs = []

    def begun(world: int, work: str, patience: float = SHORT, facts: dict | None = None) -> Run:
        runs.append(Run(tmp_path, world, _in_run, patience, work, facts or {}))
        return runs[-1]

    yield begun
    for process in (process for run in runs for process in run.processes):
        process.kill()
        process.join()


def _wait_for(run: Run, rank: int, text: str) -> None:
    run.wait_until(lambda: run.has_begun(rank) and text in run.output(rank))
    time.sleep(0.3)  # for what comes after it, in C code


def _stop_last(processes: Processes) -> None:
    """Of several processes the last one is stopped, the others wait for it in C code, each in another way."""
    print("begun", flush=True)
    processes.at_step(7)
    if processes.rank == processes.world - 1:
        time.sleep(0.4)  # for a sign
        os.kill(os.getpid(), signal.SIGSTOP)
    if processes.world == 3:
        processes.wait()
    processes.sum(torch.ones(1))


def _stop_first(processes: Processes) -> None:
    if processes.is_main:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.gather(processes.rank)


def _work_long(processes: Processes) -> None:
    """Rank 0 is busy for longer than a process may be silent, the others wait for it."""
    print("begun", flush=True)
    with processes.main_first():
        if processes.is_main:
            time.sleep(1.5 * SHORT)


def _raise_in_last(processes: Processes) -> None:
    if not processes.is_main:
        raise UserError("no images in train")
    processes.wait()


def _wait_for_batch(processes: Processes) -> None:
    """The last process's images do not come, the others wait in the exchange of gradients."""

    def hung():
        yield 1
        time.sleep(60)

    for _ in processes.each(hung() if not processes.is_main else [1, 2]):
        processes.sum(torch.ones(1))


def _nothing(processes: Processes) -> None:
    pass


@pytest.mark.parametrize("world", [2, 3])
def test_a_stopped_process_is_named_with_what_it_did(world, begin):
    run = begin(world, "stop_last")
    for rank in range(world - 1):
        run.processes[rank].join(60)
        assert run.processes[rank].exitcode == 2, run.output(rank)
        assert f"rank {world - 1} of {world} has given no sign of life for 2 s" in run.output(rank)
        assert "last seen at step 7 in" in run.output(rank)
        assert run.output(rank).endswith("Continue so\n")
    assert f"waiting for rank {world - 1} for" in run.output()  # before that, a line again and again


def test_the_first_process_stopped_is_named_by_the_others(begin):
    """Through the store that it serves nothing can be said then."""
    run = begin(3, "stop_first")
    for rank in (1, 2):
        run.processes[rank].join(60)
        assert run.processes[rank].exitcode == 2, run.output(rank)
        assert "rank 0 of 3 has given no sign of life for 2 s" in run.output(rank)


def test_a_process_that_continues_is_as_if_it_had_not_been_stopped(begin):
    run = begin(2, "stop_last", LONG)
    _wait_for(run, 1, "begun")
    time.sleep(1)
    run.signal(signal.SIGCONT, rank=1)
    assert run.ends() == [0, 0], run.output()


def test_a_process_at_work_is_waited_for(begin):
    run = begin(2, "work_long")
    assert run.ends() == [0, 0], run.output() + run.output(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_a_process_that_waits_for_a_stopped_one(number, begin):
    run = begin(2, "stop_last", 8)
    _wait_for(run, 0, "begun")
    run.signal(number)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 128 + number, run.output()
    assert f"stopped by {number.name}; rank 1 of 2 has given no sign of life for 2 s" in run.output()
    assert "Continue so" in run.output()


def test_a_second_signal_ends_a_process_that_waits_in_c_code(begin):
    run = begin(2, "stop_last", LONG)
    _wait_for(run, 0, "begun")
    _wait_for(run, 1, "begun")
    run.signal(signal.SIGTERM)
    time.sleep(1.2)
    assert run.processes[0].is_alive()  # the first is kept for the end of the step
    run.signal(signal.SIGTERM)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 128 + signal.SIGTERM, run.output()
    assert "stopped at once by a second signal, SIGTERM. Continue so" in run.output()


def test_what_another_process_ended_with_is_said(begin):
    run = begin(2, "raise_in_last")
    assert run.ends() == [2, 2]
    assert "lost contact with the others: rank 1 has ended: no images in train" in run.output()


def test_a_batch_that_does_not_come_ends_all(begin):
    run = begin(2, "wait_for_batch")
    assert run.ends() == [2, 2], run.output()
    assert "no batch of images came within 2 s" in run.output(1)
    assert "rank 1 of 2: no batch of images came within 2 s" in run.output()


def test_a_signal_ends_the_wait_for_a_process_that_never_starts(begin):
    run = begin(2, "nothing")
    run.signal(signal.SIGKILL, rank=1)
    _wait_for(run, 0, "here")
    run.signal(signal.SIGTERM)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM while waiting for the other processes at 127.0.0.1:" in run.output()


# --- what must be equal ---


def test_processes_that_differ_are_refused_before_they_are_connected(begin):
    run = begin(3, "nothing", facts={0: {"--lr": "0.1"}, 1: {"--lr": "0.2"}, 2: {"--lr": "0.1"}})
    assert run.ends() == [2, 2, 2]
    for rank in range(3):
        assert "--lr is 0.1 on ranks 0 and 2 and 0.2 on rank 1: expected the same" in run.output(rank)


def test_differences_are_named_and_counted():
    same = {"a": "1", "b": "2"}
    refuse_differences([same, dict(reversed(same.items()))])
    with pytest.raises(UserError, match=r"^c is not there on rank 0 and 3 on rank 1: expected"):
        refuse_differences([same, {**same, "c": "3"}])
    many = {str(i): "1" for i in range(6)}
    with pytest.raises(UserError, match=r"3 is 1 on ranks 0, 1, 2 and 4 more and 2 on rank 7; and 2 more differ:"):
        refuse_differences([many] * 7 + [dict.fromkeys(many, "2")])
