"""Terms between two nets' logits: values, gradients and limits in closed form, each against its published formula."""

from __future__ import annotations

import dataclasses

import logit_losses
import pytest
import torch
import torch.nn.functional as F
from test_distiller import batch, pair

from ijckd_fast.distill import PRESETS, Distiller, Seen, Term, get_objective
from ijckd_fast.distill.terms.dist import Dist, column_correlations, row_correlations
from ijckd_fast.distill.terms.dkd import Dkd
from ijckd_fast.distill.terms.hard import Hard
from ijckd_fast.distill.terms.kl import Kl
from ijckd_fast.distill.terms.nkd import Nkd
from ijckd_fast.distill.terms.through_teacher import ThroughTeacher
from ijckd_fast.distill.terms.ttm import Ttm
from ijckd_fast.errors import UserError

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
HEADS = ("student", "teacher")


def shown(logits, logits_t, labels=None, classifier="student", **mixing) -> Seen:
    """What a step that needs logits and no more shows its terms."""
    nothing = dict.fromkeys(Seen.__dataclass_fields__)
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    of = "logits" if classifier == "student" else "logits_z"
    return Seen(**{**nothing, of: logits, "logits_t": logits_t, "labels": labels, "progress": 0.0, **mixing})


def value_of(term: Term, logits, logits_t, labels=None, classifier="student", **mixing):
    """The term's value of those logits; where the fused op has it, by that, with the identity as the classifier."""
    if classifier == "student" or not isinstance(term, (Hard, Kl, Nkd, Ttm)):
        return term.value(shown(logits, logits_t, labels, classifier, **mixing))
    K = logits.shape[1]
    identity = torch.nn.Linear(K, K, bias=False, dtype=logits.dtype).requires_grad_(False)
    torch.nn.init.eye_(identity.weight)
    step = {"z": logits, "pooled_t": logits_t, "classifier": identity, "head": "fused", "label_smoothing": 0.0}
    fused = ThroughTeacher(**dataclasses.asdict(term))
    return fused.value(dataclasses.replace(shown(logits, None, labels), logits=None, **step, **mixing))


def of_images(loss, *settings):
    """The mean over a batch of a loss of two rows."""
    return lambda x, t: torch.stack([loss(a, b, *settings) for a, b in zip(x, t, strict=True)]).mean()


def z_scores(x):
    return torch.stack([logit_losses.z_score(row) for row in x])


SOFT = {"temperature": 2.5}
# Term (its head's setting is filled in), and the published formula of a batch of logits and the teacher's.
TERMS = {
    "hard": (lambda **head: Hard(hard=0.7, **head), "hard_head", of_images(logit_losses.hard), 0.7),
    "ttm": (lambda **head: Ttm(ttm=0.7, ttm_power=0.3, **head), "ttm_head", of_images(logit_losses.ttm, 0.3), 0.7),
    "wttm": (lambda **head: Ttm(wttm=0.7, ttm_power=0.3, **head), "ttm_head", of_images(logit_losses.wttm, 0.3), 0.7),
    "inter": (lambda **head: Dist(dist_inter=0.7, **SOFT, **head), "dist_head",
              lambda x, t: logit_losses.dist_inter(x, t, 2.5), 0.7),
    "intra": (lambda **head: Dist(dist_intra=0.7, **SOFT, **head), "dist_head",
              lambda x, t: logit_losses.dist_intra(x, t, 2.5), 0.7),
    "kl of z-scores": (lambda **head: Kl(kl=0.7, standardize_logits=True, **SOFT, **head), "kl_head",
                       lambda x, t: of_images(logit_losses.kl, 2.5)(z_scores(x), z_scores(t)), 0.7),
    "wttm of z-scores": (lambda **head: Ttm(wttm=0.7, ttm_power=0.3, standardize_logits=True, **head), "ttm_head",
                         lambda x, t: of_images(logit_losses.wttm, 0.3)(z_scores(x), z_scores(t)), 0.7),
}  # fmt: skip


def drawn(B: int, K: int, seed: int = 0):
    """Logits of student and teacher, the student's with a gradient, and labels."""
    draw = torch.Generator().manual_seed(seed)
    logits, logits_t = 3 * torch.randn(2, B, K, dtype=torch.float64, generator=draw)
    return logits.requires_grad_(), logits_t, torch.randint(K, (B,), generator=draw)


@pytest.mark.parametrize("classifier", HEADS)
@pytest.mark.parametrize(("B", "K"), [(2, 3), (9, 5), (4, 40)])
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_the_formula_s(name, B, K, classifier):
    make, head, formula, weight = TERMS[name]
    logits, logits_t, _ = drawn(B, K)
    value = value_of(make(**{head: classifier}), logits, logits_t, classifier=classifier)
    expected = formula(logits, logits_t)
    torch.testing.assert_close(value.loss, weight * expected, **CLOSE)
    torch.testing.assert_close(next(iter(value.parts.values())), expected.detach(), **CLOSE)
    found, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (value.loss, weight * expected))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("classifier", HEADS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("z", [False, True], ids=["raw", "z-scores"])
@pytest.mark.parametrize(("B", "K"), [(2, 3), (9, 5), (4, 40)])
@pytest.mark.parametrize("name", ["nkd", "dkd"])
def test_terms_with_labels_are_their_formulas(name, B, K, z, mixed, classifier):
    logits, logits_t, labels = drawn(B, K)
    settings = {**SOFT, "standardize_logits": z, f"{name}_head": classifier}
    if name == "nkd":
        term: Term = Nkd(nkd=0.7, nkd_gamma=0.4, **settings)
    else:
        term = Dkd(dkd_alpha=0.7, dkd_beta=0.28, dkd_warmup=0.0, **settings)

    def formula(a, b, y):
        if name == "nkd":
            return 0.7 * logit_losses.nkd(a, b, y, 0.4, 2.5)
        return logit_losses.dkd(a, b, y, 0.7, 0.28, 2.5)

    labels_b, mix = labels.flip(0), torch.linspace(0, 1, B, dtype=torch.float64)
    mixing = {"labels_b": labels_b, "mix": mix} if mixed else {}
    x, t = (z_scores(logits), z_scores(logits_t)) if z else (logits, logits_t)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        rows = formula(x[i], t[i], int(labels[i]))
        if mixed:
            rows = mix[i] * rows + (1 - mix[i]) * formula(x[i], t[i], int(labels_b[i]))
        expected = expected + rows / B
    value = value_of(term, logits, logits_t, labels, classifier, **mixing)
    torch.testing.assert_close(value.loss, expected, **CLOSE)
    found, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (value.loss, expected))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", ["nkd", "dkd"])
def test_a_class_that_is_left_out_stays_out_whatever_the_logits(name):
    """A constant added to every logit of both nets, far below any number that might stand for "none"."""
    logits, logits_t, labels = drawn(4, 6)
    term: Term = Nkd(nkd=1) if name == "nkd" else Dkd(dkd_alpha=1, dkd_beta=8, dkd_warmup=0.0)
    want, got = (term.value(shown(logits + by, logits_t + by, labels)).loss for by in (0.0, -(2.0**20)))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


# --- limits


AT_REST = {
    "kl": lambda: Kl(kl=1),
    "ttm": lambda: Ttm(ttm=1, ttm_power=1.0),
    "wttm": lambda: Ttm(wttm=1, ttm_power=1.0),
    "dkd": lambda: Dkd(dkd_alpha=1, dkd_beta=8, dkd_warmup=0.0),
    "dist": lambda: Dist(dist_inter=1, dist_intra=1),
    "kl of z-scores": lambda: Kl(kl=1, standardize_logits=True),
}


@pytest.mark.parametrize("name", AT_REST)
def test_equal_logits_are_a_minimum(name):
    """Loss 0, gradient 0; and where the loss does not see the scale or an offset of the student's logits, of those."""
    logits, _, labels = drawn(5, 6)
    same = logits.detach().clone()
    cases = [same, same + torch.randn(5, 1, dtype=torch.float64)]
    if name == "kl of z-scores":
        cases.append(7 * same - 2)
    for logits_t in cases:
        loss = AT_REST[name]().value(shown(logits, logits_t, labels)).loss
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6 if "z-scores" in name else 1e-12)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6 if "z-scores" in name else 1e-12)


@pytest.mark.parametrize("power", [0.1, 0.5, 2.0])
def test_ttm_s_minimum_is_the_teacher_s_logits_times_the_power(power):
    """TTM is KD at temperature 1 / power whose student has none: softmax(power l_t) = p_t^power / U."""
    _, logits_t, _ = drawn(5, 6)
    logits = (power * logits_t + 3).requires_grad_()
    loss = Ttm(ttm=1, wttm=1, ttm_power=power).value(shown(logits, logits_t)).loss
    torch.testing.assert_close(loss, torch.zeros_like(loss), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits), **CLOSE)


def test_wttm_weighs_by_how_soft_the_teacher_is():
    """From 1 for a teacher that is sure to K^(1 - power) for one that has no idea."""
    K, logits_t = 6, torch.stack([1e3 * F.one_hot(torch.tensor(2), 6).double(), torch.zeros(6, dtype=torch.float64)])
    logits, _, _ = drawn(2, K)
    for row, mass in ((0, 1.0), (1, K**0.75)):
        seen = shown(logits[row : row + 1], logits_t[row : row + 1])
        parts = Ttm(ttm=1, wttm=1, ttm_power=0.25).value(seen).parts
        torch.testing.assert_close(parts["wttm"], mass * parts["ttm"], **CLOSE)


def test_at_a_high_temperature_the_kl_term_matches_centred_logits():
    """T^2 KL -> sum_k (l - l_t - mean)^2 / (2 K), Hinton et al. 2015, section 2.1; DIST's rows correlate them."""
    logits, logits_t, _ = drawn(5, 6)
    centred, centred_t = (x - x.mean(1, keepdim=True) for x in (logits, logits_t))
    kl = Kl(kl=1, temperature=1e5).value(shown(logits, logits_t)).loss
    torch.testing.assert_close(kl, (centred - centred_t).square().sum(1).mean() / 12, rtol=1e-4, atol=0)
    inter = Dist(dist_inter=1, temperature=1e4).value(shown(logits, logits_t)).loss
    cosines = F.cosine_similarity(centred, centred_t, 1)
    torch.testing.assert_close(inter / 1e8, 1 - cosines.mean(), rtol=1e-3, atol=0)


def test_of_a_teacher_that_is_sure_hard_is_the_target_part_of_nkd():
    logits, _, labels = drawn(5, 6)
    sure = 1e3 * F.one_hot(labels, 6).double()
    hard = Hard(hard=1).value(shown(logits, sure, labels)).loss
    nkd = Nkd(nkd=1, nkd_gamma=0.0).value(shown(logits, sure, labels)).loss
    torch.testing.assert_close(nkd, hard, **CLOSE)
    torch.testing.assert_close(hard, F.cross_entropy(logits, labels), **CLOSE)
    plain = Ttm(ttm=1, ttm_power=1.0).value(shown(logits, sure, labels)).loss
    torch.testing.assert_close(plain, hard, **CLOSE)


@pytest.mark.parametrize("name", ["hard", "ttm", "wttm", "nkd", "dist", "dkd"])
def test_answers_that_are_sure_stay_finite(name):
    """Logits of hundreds, as half-trained nets have them, in float32: probabilities of exactly 0 and 1."""
    logits = torch.tensor([[900.0, 0.0, -900.0], [-900.0, 0.0, 900.0]], requires_grad=True)
    logits_t = torch.tensor([[0.0, 900.0, 1.0], [1e4, -1e4, 0.0]])
    objective = get_objective(name, dkd_warmup=0.0)
    for T in (0.5, 4.0):
        for term in (type(t).of(get_objective(name, dkd_warmup=0.0, temperature=T)) for t in objective.terms):
            if type(term).__name__ != "CrossEntropy":
                loss = term.value(shown(logits, logits_t, torch.tensor([0, 0]))).loss
                assert loss.isfinite()
                assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_what_does_not_vary_has_no_correlation_and_no_gradient():
    """Equal probabilities of all classes, as a classifier of zeros gives them; a class that nobody expects."""
    x = torch.full((3, 4), 0.25, requires_grad=True)
    rows = row_correlations(x, torch.rand(3, 4))
    columns = column_correlations(x, torch.rand(3, 4), None)
    assert rows.tolist() == [0] * 3
    assert columns.tolist() == [0] * 4
    grads = torch.autograd.grad(rows.sum() + columns.sum(), x)[0]
    assert torch.equal(grads, torch.zeros(3, 4))


# --- in a step


def test_logits_through_the_teacher_s_classifier_are_made_once(monkeypatch):
    """For all terms; and not for an objective whose terms the fused op has."""
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: (calls.append(w.shape), linear(x, w, *b))[1])
    through = {f"{name}_head": "teacher" for name in ("hard", "ttm", "nkd", "dist")}
    everything = {"hard": 1.0, "wttm": 1.0, "nkd": 1.0, "dist_inter": 1.0}
    for more, products in (({}, 0), ({**through, **everything}, 1)):
        distiller = Distiller(*pair(torch.float32), get_objective("ijckd", **more)).train()
        of_teacher = distiller.classifier_t.weight.shape
        calls.clear()
        monkeypatch.setattr(distiller, "teacher_side", lambda *a, f=distiller.teacher_side: noted(f, a, calls))
        distiller(*batch(torch.float32))
        assert calls.count(of_teacher) == products


def noted(function, arguments, calls):
    """What a function gives, without its calls."""
    before = len(calls)
    given = function(*arguments)
    del calls[before:]
    return given


def test_a_batch_of_one_has_no_correlation_over_images():
    distiller = Distiller(*pair(), get_objective("dist")).train()
    images, labels = batch()
    with pytest.raises(UserError, match=r"expected 2 or more of them, got 1: use a larger batch .* dist_intra to 0"):
        distiller.eval()(images[:1], labels[:1])


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("ce", {"standardize_logits": True}, "expected kl, dkd, ttm, wttm or nkd, got none of them: set the weight"),
        ("ijckd", {"standardize_logits": True}, "standardize_logits is for terms that compare logits"),
        ("dist", {"standardize_logits": True}, "standardize_logits is for terms that compare logits"),
        ("wttm", {"ttm_power": 0.0}, "ttm_power must be a finite number > 0, got 0.0"),
        ("nkd", {"nkd_gamma": -1.0}, "nkd_gamma must be a finite number >= 0, got -1.0"),
        ("nkd", {"nkd_head": "both"}, "nkd_head must be one of teacher, student, got 'both'"),
        ("nkd", {"nkd_head": "teacher"}, "need a connector from the student's features"),
        ("hard", {"ce": 0.0, "hard": 0.0}, "nothing to learn"),
        ("kd", {"connector": "conv1x1", "kl": 0.0}, "would not be trained"),
    ],
)
def test_unfit_settings_are_refused(name, overrides, text):
    with pytest.raises(UserError, match=text):
        get_objective(name, **overrides)


def test_a_batch_in_parts_is_refused_where_it_must_be_whole():
    text = (
        r"'dist' has statistics over all images of a batch \(dist_inter, dist_intra\), expected it in one piece, got"
        r" --accumulate 2: leave that out"
    )
    with pytest.raises(UserError, match=text):
        PRESETS["dist"].refuse_parts(2)
    PRESETS["dist"].refuse_parts(1)
    get_objective("dist", dist_intra=0.0).refuse_parts(2)
    PRESETS["nkd"].refuse_parts(4)
