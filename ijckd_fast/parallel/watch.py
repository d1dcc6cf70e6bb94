"""Signs of life: each process of a run gives them from a thread, and notices which process gives none any more.

A process that computes, compiles, evaluates or writes gives signs for as long as that takes. One that was stopped
(SIGSTOP) or whose machine is gone gives none. The others would wait for it in C code, where Python hears no signal, so
the thread hears those as well.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from ijckd_fast import signals, streams

_PACKAGE = str(Path(__file__).parents[1])
_WAITS = tuple(str(Path(__file__).with_name(name)) for name in ("processes.py", "sync_bn.py"))
_BETWEEN_SIGNS = 2.0  # seconds, of patience at most a twentieth
_BETWEEN_LINES = 60.0  # seconds, of patience at most a tenth
# Seconds without a sign after which a signal is not kept for the end of the step, which may never come. torchrun kills
# what has not ended 30 s after its SIGTERM.
_STOPPABLE = 15.0
_ONE_REQUEST = 1.0  # as signals has it
_OF_MAIN_THREAD = 0.5  # seconds that the main thread has to end by itself, where it runs Python
_LOOKS = 8  # tenths of a second in which is asked why contact was lost
_FAREWELL = 5.0  # seconds in which the last words must be written; a hung disk or console must not hold the process
_LOST = 5.0  # seconds after the end of the store in which the main thread may notice by itself
_WHOLE_DAY = datetime.timedelta(hours=24)
T = TypeVar("T")


class Watch:
    """The signs of life of this process, and those that it sees of the others.

    rank, world  which of how many processes
    patience     seconds without a sign after which this process ends itself, with a sentence
    where        host:port at which they meet
    step         of the run, for what the others say
    resume       how the run is continued, said at the end of sentences
    """

    def __init__(self, rank: int, world: int, patience: float, where: str) -> None:
        self.rank, self.world, self.patience, self.where = rank, world, patience, where
        self.step: int | None = None
        self.resume = "Continue all of them with ijckd-fast train --resume from the last checkpoint"
        self.last_words: list[Callable[[str], None]] = []  # called with the sentence that ends this process
        self._interval = min(_BETWEEN_SIGNS, patience / 20)
        self._line = min(_BETWEEN_LINES, patience / 10)
        self._stoppable = min(_STOPPABLE, patience / 4)
        self._main = threading.current_thread()
        self._closing = threading.Event()
        self._look = threading.Event()  # there is something to exchange at once
        self._wakes, self._wake = socket.socketpair()
        for end in (self._wakes, self._wake):
            end.setblocking(False)
        self._threads: list[threading.Thread] = []
        # Seconds in which this process was itself awake: one that was stopped must not take the others for silent.
        self._awake = 0.0
        self._met = False
        self._signs: dict[int, dict[str, Any]] = {}  # the last of each rank
        self._fresh: dict[int, float] = {}  # self._awake when it came
        self._store_gone: float | None = None
        self._left: str | None = None
        self._end: str | None = None  # what ends all of them, as rank 0 has found
        self._place, self._still = "", 0.0  # where the main thread is, and since when (self._awake)
        self._waits = False  # whether that is where the processes wait for one another
        self._spot: object = None
        self._expecting: float | None = None
        self._told = 0
        self._first: tuple[int, float] | None = None  # the ending signal that came first, and when
        self._second: tuple[int, float] | None = None

    # --- called by the main thread ---

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Inside, the watch hears signals, also where the main thread waits in C code."""
        with signals.overheard(self._wake):
            self._start(self._judge)
            try:
                yield
            except BaseException as error:
                self.leave(str(error) or type(error).__name__)
                raise
            finally:
                self.leave()
                for end in (self._wakes, self._wake):
                    end.close()

    def meet(self, store: dist.Store) -> None:
        """From here on signs are exchanged, through a client of the store that nothing else uses."""
        store.set_timeout(_WHOLE_DAY)
        self._fresh = dict.fromkeys(range(self.world), self._awake)
        self._met = True
        self._start(self._exchange, store)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items. One that takes longer than the patience to come ends this process: its disk hangs."""
        waiting = iter(items)
        while True:
            self._expecting = self._awake
            try:
                item = next(waiting)
            except StopIteration:
                return
            finally:
                self._expecting = None
            yield item

    def leave(self, why: str = "") -> None:
        """No sign is given or looked for from here on; why: an error, for the others to say."""
        if self._closing.is_set():
            return
        self._left = " ".join(why.split())[:500] if why else "it has come to its end"
        self._closing.set()
        self._look.set()
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        for thread in self._threads:
            thread.join(2.0)  # the store may have gone silent

    def explained(self) -> str | None:
        """Why contact was lost, as far as the others, or the lack of them, have said so."""
        for _ in range(_LOOKS):
            if self._end is not None:
                return self._end
            gone = self._gone()
            if gone:
                rank = min(gone)
                return f"rank {rank} has ended: {gone[rank].rstrip('.')}"
            self._look.set()
            time.sleep(0.1)
        silent = self._silent()
        return self._about(silent) if silent else None

    # --- the thread that talks to the store, which blocks where that is served by a process that was stopped ---

    def _exchange(self, store: dist.Store) -> None:
        others = [r for r in range(self.world) if r != self.rank] if self.rank == 0 else [0]
        number = 0
        try:
            if self.rank == 0:
                for other in others:
                    store.set(f"signs/{other}", "{}")
            while True:
                self._look.clear()
                closing = self._closing.is_set()
                number += 1
                store.set(f"signs/{self.rank}", json.dumps(self._sign(number)))
                if closing:
                    return
                for other, text in zip(others, store.multi_get([f"signs/{r}" for r in others]), strict=True):
                    self._take(other, json.loads(text))
                self._look.wait(self._interval)
        except RuntimeError:
            if not self._closing.is_set():
                self._store_gone = self._awake

    def _gone(self) -> dict[int, str]:
        """Ranks that have left, and why; rank 0 knows of all."""
        mine = {r: sign["left"] for r, sign in self._signs.items() if sign.get("left")}
        return mine | {int(r): why for r, why in self._signs.get(0, {}).get("gone", {}).items() if int(r) != self.rank}

    def _sign(self, number: int) -> dict[str, Any]:
        silent = {str(r): [seconds, place] for r, (seconds, place) in self._silent().items()} if self.rank == 0 else {}
        return {
            "number": number,
            "place": self._place,
            "step": self.step,
            "still": self._awake - self._still,
            "waits": self._waits,
            "left": self._left if self._closing.is_set() else None,
            "end": self._end,
            "silent": silent,
            "gone": {str(r): why for r, why in self._gone().items()} if self.rank == 0 else {},
        }

    def _take(self, other: int, sign: dict[str, Any]) -> None:
        if sign and sign != self._signs.get(other):
            self._signs[other] = sign
            self._fresh[other] = self._awake

    # --- the thread that judges ---

    def _judge(self) -> None:
        tick = min(0.5, self._interval)
        last = time.monotonic()
        while not self._closing.is_set():
            ready, *_ = select.select([self._wakes], [], [], tick)
            heard = b""
            if ready:
                with contextlib.suppress(OSError):
                    heard = self._wakes.recv(256)
            now = time.monotonic()
            self._awake += min(now - last, 2 * tick)
            last = now
            if self._closing.is_set():
                return
            self._look_around()
            self._hear(heard, now)
            if self._met:
                self._look_at_others()
            elif self._awake >= self._line * (self._told + 1):
                self._told += 1
                self._say(
                    f"process {self.rank} of {self.world} has waited {self._awake:.0f} s for the others at {self.where}"
                )

    def _look_around(self) -> None:
        """Where the main thread is: the innermost functions of ours, and whether it is still at the same spot."""
        frame: FrameType | None = sys._current_frames().get(self._main.ident or 0)
        spot = None if frame is None else (id(frame), frame.f_lasti)
        names: list[str] = []
        inner = None
        while frame is not None and len(names) < 3:
            code = frame.f_code
            if code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
                inner = inner or code
                names.append(code.co_name)
            frame = frame.f_back
        self._waits = inner is not None and (inner.co_filename in _WAITS or inner.co_name == "_backward")
        if spot != self._spot:
            self._spot, self._still = spot, self._awake
        self._place = " > ".join(reversed(names))

    def _hear(self, heard: bytes, now: float) -> None:
        for number in heard:
            if number not in signals.ENDING:
                continue
            if self._first is None:
                self._first = number, now
            elif number != signal.SIGHUP and now - self._first[1] >= _ONE_REQUEST and self._second is None:
                self._second = number, now
        if self._awake - self._still < _OF_MAIN_THREAD:
            return  # the main thread runs Python: its handlers do what is to be done
        if self._second is not None and now - self._second[1] >= _OF_MAIN_THREAD:
            number = self._second[0]
            self._finish(f"stopped at once by a second signal, {signal.Signals(number).name}", 128 + number)
        if self._first is None or now - self._first[1] < _OF_MAIN_THREAD:
            return
        number = self._first[0]
        name = signal.Signals(number).name
        if not self._met:
            self._finish(f"stopped by {name} while waiting for the other processes at {self.where}", 128 + number)
        silent = self._silent()
        if silent:
            self._finish(f"stopped by {name}; {self._about(silent)}", 128 + number)

    def _silent(self) -> dict[int, tuple[float, str]]:
        """Ranks without a sign for long enough to be named: seconds, and where they were last seen."""
        if not self._met:
            return {}
        limit = max(self._stoppable, 3 * self._interval)
        mine = {r: self._awake - at for r, at in self._fresh.items() if r != self.rank and (self.rank == 0 or r == 0)}
        found = {r: (seconds, self._seen(r)) for r, seconds in mine.items() if seconds >= limit}
        if self.rank and not found:
            for r, (seconds, place) in self._signs.get(0, {}).get("silent", {}).items():
                if int(r) != self.rank:
                    found[int(r)] = seconds, place
        return found

    def _seen(self, rank: int) -> str:
        sign = self._signs.get(rank)
        if sign is None:
            return "never seen"
        if sign.get("left"):
            return f"it ended: {sign['left']}"
        step = "" if sign["step"] is None else f" at step {sign['step']}"
        return f"last seen{step} in {sign['place'] or 'other code'}"

    def _about(self, silent: dict[int, tuple[float, str]]) -> str:
        longest = max(silent, key=lambda r: silent[r][0])
        seconds, seen = silent[longest]
        more = sorted(set(silent) - {longest})
        others = f" (nor {', '.join(f'rank {r}' for r in more[:5])}{', ...' if len(more) > 5 else ''})" if more else ""
        return f"rank {longest} of {self.world} has given no sign of life for {seconds:.0f} s{others}, {seen}"

    def _look_at_others(self) -> None:
        main = self._signs.get(0, {})
        if self.rank and main.get("end"):
            self._end = main["end"]
            self._finish(self._end, 2)
        if self._store_gone is not None and self._awake - self._store_gone >= _LOST:
            self._without_store()
            return
        for r, sign in self._signs.items():
            if sign.get("end") and self._end is None and self.rank == 0:
                self._end_all(f"rank {r} of {self.world}: {sign['end']}")
        expecting = self._expecting
        if expecting is not None and self._awake - expecting >= self.patience:
            text = (
                f"no batch of images came within {self.patience:.0f} s (--dist-timeout): the disk that the images are "
                "on hangs"
            )
            self._end = text
            self._look.set()
            if self.rank == 0:
                self._end_all(text)
            time.sleep(2 * self._interval)  # for the others to see it
            self._finish(text, 2)
        silent = self._silent()
        longest = max((seconds for seconds, _ in silent.values()), default=0.0)
        if longest >= self.patience:
            self._end_all(
                f"{self._about(silent)}. This process was in {self._place or 'other code'}. It was stopped, its "
                "machine is gone or its disk hangs"
            )
        self._tell(silent, longest)

    def _end_all(self, text: str) -> None:
        self._end = text
        self._look.set()
        if self.rank == 0:
            time.sleep(2 * self._interval + 0.2)  # for the others to read it
        self._finish(text, 2)

    def _without_store(self) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            self._store_gone, self._met, self._told = None, True, 0
            self._fresh.clear()
            if self.rank == 0:
                self._say(
                    f"torchrun, which served {self.where}, has ended: a process that is stopped will not be noticed "
                    "any more"
                )
            self._closing.wait()
            return
        self._finish(
            f"process {self.rank} of {self.world} lost contact with rank 0: it has ended, and what it says "
            "for itself stands in its own output",
            2,
        )

    def _tell(self, silent: dict[int, tuple[float, str]], longest: float) -> None:
        """A line for every minute that somebody is missing; a process at work is named after 1, 2, 4, 8 minutes."""
        if longest and (self.rank == 0 or 0 in silent):
            if longest >= self._line * (self._told + 1):
                self._told = int(longest // self._line)
                rank = max(silent, key=lambda r: silent[r][0])
                self._say(
                    f"waiting for rank {rank} for {longest:.0f} s: no sign of life from it, {silent[rank][1]}; the "
                    f"run ends after {self.patience:.0f} s (--dist-timeout)"
                )
            return
        still = self._awake - self._still
        if self.rank == 0 and self._waits and still >= self._line:
            busy = [r for r, sign in self._signs.items() if not sign.get("waits") and not sign.get("left")]
            if busy and still >= self._line * max(1, 2 * self._told):
                self._told = max(1, 2 * self._told)
                self._say(f"waiting for rank {busy[0]} for {still:.0f} s: it is at work, {self._seen(busy[0])}")
            return
        self._told = 0

    # --- the end ---

    def _say(self, text: str) -> None:
        streams.complain(f"ijckd-fast: {text}")

    def _finish(self, text: str, code: int) -> None:
        """Ends this process, whose main thread may be in C code for ever; does not return."""
        text = f"{text}. {self.resume}"
        farewell = threading.Thread(target=self._farewell, args=(text,), daemon=True)
        farewell.start()
        farewell.join(_FAREWELL)
        os._exit(code)

    def _farewell(self, text: str) -> None:
        streams.complain(f"ijckd-fast: {text}")
        for told in self.last_words:
            with contextlib.suppress(Exception):
                told(text)
        with contextlib.suppress(Exception):
            sys.stdout.flush()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, name="watch", daemon=True)
        self._threads.append(thread)
        thread.start()
