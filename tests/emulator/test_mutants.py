"""The kernels' cases notice a broken kernel: a fixed sample of mutate.py's changes now, all of them in the committed table."""

import pytest
from emulator import build, mutate

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def test_no_survivor_is_unexplained():
    rows = mutate.read_table()
    assert [row for row in rows if row["verdict"] == mutate.SURVIVED and not row["explanation"]] == []


def test_every_mutant_has_been_judged():
    """After a change to the kernels: tests/emulator/mutate.py --missing."""
    judged = [mutate.key(row) for row in mutate.read_table()]
    mutants = [m.key for m in mutate.all_mutants()]
    assert len(mutants) > 2000
    assert len(set(judged)) == len(judged)
    assert len(set(mutants)) == len(mutants)
    missing = set(mutants) - set(judged)
    assert not missing, f"{len(missing)} without a row in mutants.csv, e.g. {min(missing)}"
    assert set(judged) <= set(mutants), f"rows of nothing any more, e.g. {min(set(judged) - set(mutants))}"


def spaced(mutants: list[mutate.Mutant], n: int) -> list[mutate.Mutant]:
    return mutants[:: max(1, len(mutants) // n)][:n] if len(mutants) > n else mutants


def noticed_at_once(row: dict[str, str]) -> bool:
    first = mutate.FILES[row["file"]][:2]
    return any(row["case"].partition(" ")[0] in mutate.UNIT_KERNELS[unit] for unit in first)


@pytest.mark.slow
def test_sample_of_mutants_is_noticed():
    """Barriers and waits for copies removed, and some of the other changes that the table says are noticed.

    Of a header's changes, those noticed by a case of the first two units that include it: for others unit after unit is compiled and run.
    """
    silent = {mutate.SURVIVED, mutate.NOT_COMPILED}
    quick = {
        mutate.key(row)
        for row in mutate.read_table()
        if row["verdict"] not in {*silent, mutate.TIMED_OUT} and noticed_at_once(row)
    }
    mutants = [m for m in mutate.all_mutants() if m.key in quick]
    orders = [m for m in mutants if m.drops_order]
    assert len(orders) >= 7
    sample = spaced(orders, 12)
    sample += spaced([m for m in mutants if not m.drops_order], 24 - len(sample))
    assert len(sample) >= 24
    for mutant, verdict, _ in mutate.judge_all(sample):
        assert verdict not in silent, f"{mutant}: {verdict}"
