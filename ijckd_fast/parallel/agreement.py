"""What must be equal in all processes of a run, compared before they begin: a difference is refused by its name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from ijckd_fast.errors import UserError

_NAMED = 4  # differences that a sentence names; the others are counted
_READERS = 30.0  # seconds that rank 0 waits for the others to read what it found, before it may end


def refuse_differences(each: Sequence[Mapping[str, str]]) -> None:
    """UserError where what the processes give, in order of rank, differs in anything."""
    found = differences(each)
    if found:
        raise UserError(found)


def differences(each: Sequence[Mapping[str, str]]) -> str:
    """A sentence with the names, the values and the ranks of what differs; "" where nothing does."""
    names = list(dict.fromkeys(name for facts in each for name in facts))
    told = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(each):
            ranks.setdefault(facts.get(name, "not there"), []).append(rank)
        if len(ranks) > 1:
            told.append(f"{name} is " + " and ".join(f"{value} on {_named(of)}" for value, of in ranks.items()))
    if not told:
        return ""
    more = f"; and {len(told) - _NAMED} more differ" if len(told) > _NAMED else ""
    return (
        f"{'; '.join(told[:_NAMED])}{more}: expected the same in all processes of a run; start all of them with one "
        "command, the same files and the same installed versions"
    )


def agree(store: dist.Store, rank: int, world: int, facts: Mapping[str, str]) -> None:
    """Compares through a store, so before any backend connects the processes: those may differ in it.

    raises  UserError in every process where `facts` differ in anything
    """
    store.set(f"facts/{rank}", json.dumps(dict(facts)))
    if rank == 0:
        each = store.multi_get([f"facts/{other}" for other in range(world)])
        store.set("differences", json.dumps(differences([json.loads(text) for text in each])))
    found = json.loads(store.get("differences"))
    with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, has waited long enough
        store.add("readers", 1)
    if found:
        until = time.monotonic() + _READERS
        while rank == 0 and store.add("readers", 0) < world and time.monotonic() < until:
            time.sleep(0.01)
        raise UserError(found)


def _named(ranks: Sequence[int]) -> str:
    """'rank 1' or 'ranks 0, 2 and 3', many of them shortened."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 6:
        return f"ranks {', '.join(map(str, ranks[:3]))} and {len(ranks) - 3} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
