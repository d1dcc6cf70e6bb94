"""Terms: what is derived of their settings and needs, and what is refused of a cache."""

from __future__ import annotations

import dataclasses

import pytest

from ijckd_fast.distill import FROM_CACHE, PARTS, PRESETS, TERMS, Needs, Objective, Term, get_objective
from ijckd_fast.distill.terms.term import weight
from ijckd_fast.errors import UserError
from ijckd_fast.setting import joined, settings_of


def test_an_objective_has_the_settings_of_every_term():
    of_terms = {name for term in TERMS for name in settings_of(term)}
    assert of_terms | {"connector", "connector_init"} == set(settings_of(Objective))
    assert {f.name for f in dataclasses.fields(Objective)} == {"name", *settings_of(Objective)}


def test_the_log_s_names_keep_their_order():
    known = ["ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd", "dkd", "at", "hint"]
    assert [part for part in PARTS if part in known] == known


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
def test_a_term_is_off_by_default(term):
    assert not term().needs


@pytest.mark.parametrize("name", PRESETS)
def test_an_objective_is_its_terms(name):
    """Those that are on, with the settings of the row."""
    objective = PRESETS[name]
    assert objective.terms
    for term in objective.terms:
        assert term.needs
        assert all(getattr(term, key) == getattr(objective, key) for key in settings_of(type(term)))
    assert objective.needs_teacher == (name != "ce")
    assert (Needs.STAGES in objective.needs) == (name in ("fitnet", "at", "reviewkd"))


def test_a_setting_is_declared_once():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Term):
        at: float = weight("another thing of the same name")

    with pytest.raises(TypeError, match="Other declares at again: inherit it"):
        joined("Settings", (*TERMS, Other))


def test_a_cache_serves_what_needs_pooled_features():
    assert {"ijckd-pooled", "srrl", "kd", "dkd", "hard", "ttm", "wttm", "nkd", "dist", "srd"} <= set(FROM_CACHE)
    assert not {"ijckd", "simkd", "fitnet", "at", "reviewkd", "sdd", "sdd-dkd", "catkd", "ce"} & set(FROM_CACHE)
    for name in FROM_CACHE:
        PRESETS[name].refuse_cache("F")
    with pytest.raises(
        UserError, match=r"'ijckd' compares the teacher's maps \(fm\), but the cache F .*: take --objective i"
    ):
        PRESETS["ijckd"].refuse_cache("F")
    with pytest.raises(
        UserError, match=r"\(at, hint\), .*: leave out --at and --hint and --hint-stage, take --objective"
    ):
        get_objective("kd", at=1.0, hint=2.0, hint_stage=3).refuse_cache("F")
    with pytest.raises(UserError, match=r"'sdd' compares the teacher's maps \(sdd, sdd_dkd\), .*: take --objective i"):
        PRESETS["sdd"].refuse_cache("F")
    with pytest.raises(UserError, match=r"\(cat\), .*: leave out --cat and --cat-head, take --objective ijckd-pooled"):
        get_objective("srrl", cat=1.0, cat_head="teacher").refuse_cache("F")
