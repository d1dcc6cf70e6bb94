"""Signals that are raised, noted, remembered, kept from children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ijckd_fast import signals
from ijckd_fast.signals import ENDING, Stopped

ENDINGS = pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """What this process does with signals is afterwards what it was."""
    numbers = (*ENDING, signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@ENDINGS
def test_a_signal_is_raised_with_what_was_kept(number):
    with pytest.raises(Stopped) as caught, signals.handled() as asked:
        send(number)
    assert (caught.value.signum, asked.signum) == (number, number)
    assert str(caught.value) == f"stopped by {number.name}"
    assert str(Stopped(number, ", half is there")) == f"stopped by {number.name}, half is there"


@ENDINGS
def test_within_noted_nothing_is_cut_short(number):
    done = []
    with pytest.raises(Stopped), signals.handled():  # noqa: PT012
        with signals.noted() as asked:
            send(number)
            assert asked.signum == number
            with signals.noted() as inner:  # which would end before it begins
                assert inner.signum == number
            done.append("first")
        done.append("second")
    assert done == ["first"]


def test_noted_alone_handles_signals_too():
    with pytest.raises(Stopped), signals.noted() as asked:  # noqa: PT012
        send(signal.SIGTERM)
        assert asked.signum == signal.SIGTERM


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(ValueError, match="disk"), signals.handled(), signals.noted():  # noqa: PT012
        send(signal.SIGTERM)
        raise ValueError("disk")


def test_a_wish_to_save_is_remembered_until_it_is_met():
    with signals.handled():
        send(signal.SIGUSR1)
        with signals.noted() as asked:
            assert asked.save
            asked.save = False  # met for this block alone
        with signals.noted() as asked:
            assert asked.save
            signals.saved()
            assert not asked.save
        with signals.noted() as asked:
            assert not asked.save


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled(), signals.noted() as asked:
            send(signal.SIGHUP)
            assert not asked.signum
        with pytest.raises(Stopped), signals.handled():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_change_nothing():
    seen = []

    def work() -> None:
        with signals.handled(), signals.noted() as asked, signals.at_once():
            seen.append((asked.signum, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, signal.SIG_DFL)]


def test_a_forked_process_is_not_the_command():
    with signals.handled():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        with pytest.raises(Stopped):
            send(signal.SIGTERM)


@pytest.mark.parametrize(
    ("first", "second", "seconds", "ends"),
    [
        (signal.SIGTERM, signal.SIGTERM, 0.9, False),  # as timeout(1) sends them
        (signal.SIGTERM, signal.SIGTERM, 1.1, True),
        (signal.SIGTERM, signal.SIGINT, 1.1, True),
        (signal.SIGHUP, signal.SIGTERM, 1.1, True),
        (signal.SIGHUP, signal.SIGHUP, 60.0, False),  # as a terminal sends them
        (signal.SIGTERM, signal.SIGUSR1, 60.0, False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_second_signal_ends_at_once(monkeypatch, first, second, seconds, ends):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    child = os.fork()
    if child == 0:
        with signals.handled(program=True), signals.noted():
            send(first)
            clock[0] += seconds
            send(second)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-second if ends else 7)


def test_in_a_program_of_others_a_second_signal_does_what_it_did(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt) as caught, signals.noted():  # noqa: PT012
            send(signal.SIGINT)
            clock[0] += 2
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, Stopped)


def test_at_once_a_signal_does_not_wait_for_the_main_thread():
    child = os.fork()
    if child == 0:
        with signals.handled(), signals.at_once():
            with signals.noted() as asked:
                send(signal.SIGUSR1)
                assert asked.save
            try:
                send(signal.SIGTERM)
            finally:  # never
                os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


_TO_ALL = """
import multiprocessing, os, signal, sys
from ijckd_fast import signals

def child(sender):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sender.send("there")
    while signal.sigpending() == set():
        pass
    sender.send("not heard")
    signals.hear()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    signals.start_forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    receiver.recv()
    number = int(sys.argv[1])
    with signals.handled():
        try:
            os.killpg(0, number)
        except signals.Stopped:
            pass
        print(receiver.recv())
        process.join()
    print(process.exitcode)  # which the server says, if it is alive
"""


@pytest.mark.parametrize("number", [*ENDING, signal.SIGUSR1])
def test_forked_processes_do_not_hear_what_is_sent_to_all(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(_TO_ALL)
    command = [sys.executable, str(script), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"not heard\n{-number}\n", "")


def test_signals_needs_nothing_that_is_slow():
    code = "import sys, ijckd_fast.signals, ijckd_fast.streams; print({'torch', 'rich', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
