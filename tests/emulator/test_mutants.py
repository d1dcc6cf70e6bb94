"""The kernels' cases notice a broken kernel: a fixed sample of mutate.py's changes now, all of them in the committed
table.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator import build, mutate, switched

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def test_no_survivor_is_unexplained():
    rows = mutate.read_table()
    assert [row for row in rows if row["verdict"] == mutate.SURVIVED and not row["explanation"]] == []


def test_every_mutant_has_a_row():
    """After a change to the kernels: tests/emulator/mutate.py --missing."""
    judged = [mutate.key(row) for row in mutate.read_table()]
    mutants = [m.key for m in mutate.all_mutants()]
    assert len(mutants) > 2000
    assert len(set(judged)) == len(judged)
    assert len(set(mutants)) == len(mutants)
    missing = set(mutants) - set(judged)
    assert not missing, f"{len(missing)} without a row in mutants.csv, e.g. {min(missing)}"
    assert set(judged) <= set(mutants), f"rows of nothing any more, e.g. {min(set(judged) - set(mutants))}"


def test_every_mutant_has_been_judged():
    left = [row for row in mutate.read_table() if row["verdict"] == mutate.NOT_JUDGED]
    assert left == [], f"{len(left)} deferred"


@pytest.mark.parametrize(
    ("line", "mutated", "compiled"),
    [
        ("if (a < b) {", "if (a <= b) {", "if ((emulated_mutant() == 7 ? (a <= b) : (a < b))) {"),
        ("} else if (a) {", "} else if (true) {", "} else if ((emulated_mutant() == 7 ? (true) : (a))) {"),
        (
            "for (int i = 0; i < n; i += 2)",
            "for (int i = 0; i < n; i -= 2)",
            "for (int i = (0); (i < n); (emulated_mutant() == 7 ? void(i -= 2) : void(i += 2)))",
        ),
        (
            "const int a = f(b, c), d = 1;  // why",
            "const int a = f(b, c), d = 2;  // why",
            "const int a = (f(b, c)), d = (emulated_mutant() == 7 ? (2) : (1));",
        ),
        ("x[i] += a * b;", ";", "{ if (emulated_mutant() == 7) { ; } else { x[i] += a * b; } }"),
        ("if (a) return;", ";", "{ if (emulated_mutant() == 7) { ; } else { if (a) return; } }"),
        ("p->f<2>(a);", "p->f<3>(a);", "{ if (emulated_mutant() == 7) { p->f<3>(a); } else { p->f<2>(a); } }"),
        # constants, what declares otherwise, what goes on in the next line
        ("constexpr int a = 1;", "constexpr int a = 2;", None),
        ("if constexpr (a == 1)", "if constexpr (a != 1)", None),
        ("Tile tile(a, 1);", "Tile tile(a, 2);", None),
        ("const int a = b[0], *c = d,", "const int a = b[1], *c = d,", None),
    ],
)  # fmt: skip
def test_a_line_holds_its_mutant(line, mutated, compiled):
    before, after = (f"{{\n#pragma unroll\n  {text}\n  y();" for text in (line, mutated))
    text, lines = switched.switched(before, {7: (3, after)})
    assert text.splitlines()[4].strip() == (compiled or line)
    assert lines.get(3, switched.Line("")).numbers == ({7} if compiled else set())


def test_lines_at_fault_are_found():
    lines = {3: switched.Line("", frozenset({1}), frozenset({"kRows"})), 8: switched.Line("", frozenset({2, 5}))}
    assert switched.at_fault("a.cu", "/tmp/a.cu:8:4: error: no\n a.cu:9:1: error: kRows", lines) == {8}
    assert switched.at_fault("a.cu", "/tmp/a.cu:9:4: error: 'kRows' is not constant", lines) == {3}
    assert switched.at_fault("a.cu", "/tmp/a.cu:9:4: error: other", lines) == set()


@pytest.mark.slow
def test_mutants_compiled_together_are_noticed_as_each_alone(tmp_path):
    """A file's mutants by both ways, of which one compiles each anew."""
    mutants = list(mutate.mutants_of("cuda/anchor_rows.cu"))[::4]
    workshop = mutate.Workshop(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        together = workshop.judge_together(mutants, ["anchor_rows.cu"], pool)
    assert len(together) >= 4
    alone = {m: workshop.judge(m, ["anchor_rows.cu"]) for m in together}
    assert together == alone
    assert len({verdict for verdict, _ in alone.values()}) > 1


def test_a_unit_of_the_sound_ones_code_is_not_run(tmp_path, monkeypatch):
    """A launch bound, which the emulator does not have; beside it a size that makes other code."""
    runs = []
    monkeypatch.setattr(mutate.Workshop, "run", lambda *args: runs.append(args) or ("wrong result", "a case"))
    workshop = mutate.Workshop(tmp_path)
    bound = next(m for m in mutate.mutants_of("cuda/tile.cuh") if "kResident = kThreads" in m.code)
    assert workshop.judge(bound, ["anchor_rows.cu"]) == (mutate.SURVIVED, "")
    assert not runs
    size = next(m for m in mutate.mutants_of("cuda/anchor_rows.cu") if m.code.startswith("__shared__ float slots"))
    assert workshop.judge(size, ["anchor_rows.cu"]) == ("wrong result", "a case")
    assert len(runs) == 1


@pytest.mark.slow
def test_sample_of_mutants_is_noticed():
    """Of every file a barrier or a wait for copies removed, and another of the changes that the table says are noticed;
    by the cases of the unit that noticed it then.
    """
    silent = {mutate.SURVIVED, mutate.NOT_COMPILED, mutate.TIMED_OUT, mutate.NOT_JUDGED}
    unit_of = {kernel: unit for unit, kernels in mutate.UNIT_KERNELS.items() for kernel in kernels}
    by = {
        mutate.key(row): unit_of[row["case"].split()[0]]
        for row in mutate.read_table()
        if row["verdict"] not in silent and row["case"].partition(" ")[0] in unit_of
    }
    sample = []
    for file in mutate.FILES:
        mutants = [m for m in mutate.mutants_of(file) if m.key in by]
        if not mutants:  # a header of macros
            continue
        orders = [m for m in mutants if m.drops_order]
        # by itself, without the line that uses them, variables are unused: that does not compile
        others = [m for m in mutants if m.became != ";"]
        sample += [*orders[len(orders) // 2 :][:1], *others[len(others) // 3 :][:1]]
    assert len(sample) >= 24
    assert sum(m.drops_order for m in sample) >= 7
    for mutant, verdict, _ in mutate.judge_all(sample, units=lambda m: [by[m.key]]):
        assert verdict not in silent, f"{mutant}: {verdict}"
