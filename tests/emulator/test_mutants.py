"""The kernels' cases notice a broken kernel: a fixed sample of mutate.py's changes now, all of them in the committed table."""

import pytest
from emulator import build, mutate

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def test_no_survivor_is_unexplained():
    rows = mutate.read_table()
    assert len(rows) > 500
    assert [row for row in rows if row["verdict"] == mutate.SURVIVED and not row["explanation"]] == []


@pytest.mark.slow
def test_sample_of_mutants_is_noticed():
    """Every barrier removed in turn, and every fortieth of the other changes that the table says are noticed."""
    silent = {mutate.SURVIVED, mutate.NOT_COMPILED}
    noticed = {mutate.key(row) for row in mutate.read_table() if row["verdict"] not in silent}
    mutants = mutate.all_mutants()
    barriers = [m for m in mutants if m.was.startswith("__syncthreads")]
    others = [m for m in mutants if m.key in noticed and m not in barriers]
    sample = [*barriers, *others[::40]]
    assert len(barriers) >= 7
    assert len(sample) >= 18
    for mutant, verdict, _ in mutate.judge_all(sample):
        assert verdict not in silent, f"{mutant}: {verdict}"
