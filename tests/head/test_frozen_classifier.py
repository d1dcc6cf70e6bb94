"""FrozenClassifier: what it serves is always of the weight as it is, whatever has changed that."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from host_waits import HostWaits
from op_cases import refused
from torch import Tensor, nn

from ijckd_fast import head
from ijckd_fast.head import frozen as module

K, Ct = 40, 8


def fresh(seed=0, shape=(K, Ct)) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(frozen, weight, match=True):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return frozen.prepared(weight, match=match)


def check(frozen, weight) -> Tensor:
    """Holds where what is served is of this weight; its gram."""
    rounded, gram = prepared(frozen, weight)
    assert torch.equal(rounded, weight.detach().bfloat16())
    expected = rounded.double().T @ rounded.double()
    torch.testing.assert_close(gram.double().sum(0), expected, rtol=0, atol=2**-15 * expected.abs().max().item())
    return gram


def test_a_frozen_classifier_is_prepared_once_and_again_when_it_changes():
    weight = fresh()
    frozen = head.FrozenClassifier()
    plain, gram = frozen.prepared(weight, match=True)
    assert torch.equal(plain, weight)
    assert gram is None  # float32 goes another way
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, gram = frozen.prepared(weight, match=True)
        assert torch.equal(rounded, weight.bfloat16())
        wanted = rounded.double().T @ rounded.double()
        torch.testing.assert_close(gram.double().sum(0), wanted, rtol=0, atol=2**-15 * wanted.abs().max().item())
        assert frozen.prepared(weight, match=True)[1] is gram
        assert frozen.prepared(weight, match=False)[1] is None
        weight.mul_(2)
        again, doubled = frozen.prepared(weight, match=True)
        assert torch.equal(again, 2 * rounded)
        torch.testing.assert_close(doubled, 4 * gram)
        assert frozen.prepared(torch.randn(24, 8), match=True)[1] is not None  # K = 3 Ct, but few channels
        assert frozen.prepared(torch.randn(24, 1032), match=True)[1] is None  # W d is cheaper
    assert frozen.prepared(weight.double(), match=True)[0].dtype == torch.float64


def by_numpy(weight):
    weight.detach().numpy()[3, 2] += 1


def by_foreach(weight):
    torch._foreach_mul_([weight.data], 2.0)


def by_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 1.0).step()


def by_load_state_dict(weight):
    linear = nn.Linear(Ct, K, bias=False)
    linear.weight = weight
    linear.load_state_dict({"weight": fresh(7)})


def by_set(weight):
    with torch.no_grad():
        weight.set_(fresh(8))


def by_resize(weight):
    with torch.no_grad():
        weight.data.resize_(K + 16, Ct).copy_(fresh(9, (K + 16, Ct)))


def by_swap(weight):
    weight.data = fresh(10)


def by_its_storage(weight):
    weight.untyped_storage().copy_(fresh(11).untyped_storage())


def by_a_view(weight):
    weight.data.T[1:3].zero_()


def by_a_sign(weight):
    weight.data[5, 5] *= -1


CHANGES = [
    by_numpy, by_foreach, by_optimizer, by_load_state_dict, by_set, by_resize, by_swap, by_its_storage, by_a_view,
    by_a_sign,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_any_route_is_seen(change):
    weight, frozen = nn.Parameter(fresh()), head.FrozenClassifier()
    before = check(frozen, weight)
    assert check(frozen, weight) is before
    change(weight)
    assert check(frozen, weight) is not before


def test_a_change_to_nan_and_back_is_seen():
    weight, frozen = fresh(), head.FrozenClassifier()
    check(frozen, weight)
    kept = weight[2, 3].item()
    weight.data[2, 3] = float("nan")
    rounded, gram = prepared(frozen, weight)
    assert rounded.isnan().sum() == 1
    assert gram is None
    weight.data[2, 3] = kept
    check(frozen, weight)


@pytest.mark.parametrize("layout", ["transposed", "wider", "columns"])
def test_layouts_of_the_same_memory_are_told_apart(layout):
    square, frozen = fresh(1, (Ct, Ct)), head.FrozenClassifier()
    check(frozen, square)
    wide = fresh(2, (K, 2 * Ct))
    check(frozen, {
        "transposed": square.T,
        "wider": wide[:, ::2],
        "columns": fresh(4, (Ct, K)).T,
    }[layout])  # fmt: skip
    check(frozen, square)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_serves_its_own_weight(copied):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.linear = head.FrozenClassifier(), nn.Linear(Ct, K)

    holder = Holder() if copied is copy.deepcopy else head.FrozenClassifier()
    if copied is copy.deepcopy:
        check(holder.frozen, holder.linear.weight)
        other = copied(holder)
        other.linear.weight.data.mul_(3)
        check(other.frozen, other.linear.weight)
        check(holder.frozen, holder.linear.weight)
    else:
        check(holder, fresh())
        assert len(pickle.dumps(holder)) < 300  # the weight does not go along
        check(copied(holder), fresh(5))


def test_an_address_that_is_used_again_is_no_weight():
    frozen = head.FrozenClassifier()
    for seed in range(20):  # each freed before the next is made
        check(frozen, fresh(seed))


def test_threads_with_weights_and_dtypes_of_their_own():
    frozen, failures = head.FrozenClassifier(), []
    weights = [fresh(20), fresh(21)]

    def work(i):
        try:
            for turn in range(60):
                dtype = (torch.bfloat16, torch.float16)[(i + turn) % 2 if i < 2 else 0]
                with torch.autocast("cpu", dtype=dtype):
                    rounded, gram = frozen.prepared(weights[i % 2], match=True)
                assert torch.equal(rounded, weights[i % 2].to(dtype))
                if gram is not None:
                    exact = rounded.double().T @ rounded.double()
                    assert (gram.double().sum(0) - exact).abs().max() < 2**-15 * exact.abs().max()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode():
    """A weight without a version counter; a gram made inside that is used outside."""
    frozen = head.FrozenClassifier()
    with torch.inference_mode():
        weight = fresh()
        check(frozen, weight)
        weight.mul_(2)
        check(frozen, weight)
    gram = check(frozen, weight)
    z = torch.randn(4, Ct, requires_grad=True)
    loss, *_ = head.classifier_loss(
        z, weight, None, torch.zeros(4, dtype=torch.int64), pooled_t=z.detach() + 1, sr=1.0, gram=gram
    )
    loss.backward()
    assert z.grad.isfinite().all()


def test_compile_fullgraph():
    torch.compiler.reset()
    frozen, weight, labels = head.FrozenClassifier(), fresh(), torch.zeros(4, dtype=torch.int64)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.linear = frozen, nn.Linear(Ct, K)
            self.linear.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, z):
            rounded, gram = self.frozen.prepared(self.linear.weight, match=True)
            return head.classifier_loss(z, rounded, None, labels, pooled_t=z.detach() + 1, sr=1.0, gram=gram)[0]

    step, z = Step(), torch.randn(4, Ct)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            torch.testing.assert_close(compiled(z), step(z), rtol=1e-3, atol=0)
            step.linear.weight.data.mul_(1.5)


def test_a_gram_that_would_lose_digits_is_not_made():
    """Where a difference could avoid the directions in which W is large (test_logit_match.py has such)."""
    frozen, weight = head.FrozenClassifier(), fresh()
    large, common, dead = (weight.clone() for _ in range(3))
    large[3] *= 1e4
    common += 1e3
    dead[:, 2] = 0
    scaled = weight * torch.logspace(0, 4, Ct)
    for refused_one in (large, common, fresh(1, (Ct // 2, Ct)), torch.full_like(weight, float("inf"))):
        rounded, gram = prepared(frozen, refused_one)
        assert torch.equal(rounded, refused_one.bfloat16())
        assert gram is None
    for served in (dead, scaled, weight):
        check(frozen, served)


def test_a_weight_that_is_no_matrix_is_refused():
    refused(
        "FrozenClassifier: weight must be [K, Ct], got [4, 2, 1]",
        lambda: head.FrozenClassifier().prepared(torch.randn(4, 2, 1), match=True),
    )


# --------------------------------------------------------------------------------------------------------------------
# as on a GPU, where the host must not wait: on a CPU, with the looks that a host may take there


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "_host_sees", lambda weight: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def waits(frozen, weight) -> int:
    with HostWaits() as seen:
        prepared(frozen, weight)
    return seen.count


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_the_host_waits_only_where_a_gram_is_made():
    weight, frozen = fresh(), head.FrozenClassifier()
    assert waits(frozen, weight) > 0
    for _ in range(3):
        # its look at the answer in its own memory is no wait
        assert waits(frozen, weight) <= 1


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("change", CHANGES)
def test_on_a_gpu_no_change_leaves_the_old_gram(change):
    weight, frozen = nn.Parameter(fresh()), head.FrozenClassifier()
    check(frozen, weight)
    check(frozen, weight)
    change(weight)
    rounded, gram = prepared(frozen, weight)
    assert torch.equal(rounded, weight.detach().bfloat16())
    if gram.isnan().any():  # which only the device could see
        assert gram.isnan().all()
    check(frozen, weight)  # the answer has come


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_an_inference_weight_is_compared_on_the_device():
    frozen = head.FrozenClassifier()
    with torch.inference_mode():
        weight = fresh()
        check(frozen, weight)
        weight.mul_(2)
        assert prepared(frozen, weight)[1].isnan().all()
        check(frozen, weight)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_in_a_capture_a_gram_is_taken_or_there_is_none(monkeypatch):
    weight, frozen = fresh(), head.FrozenClassifier()
    gram = check(frozen, weight)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with HostWaits() as seen:
        assert torch.equal(prepared(frozen, weight)[1], gram)
        assert prepared(frozen, fresh(1))[1] is None
    assert seen.count <= 2
    assert [kept.gram is not None for kept in frozen._captured] == [True]


def test_numpy_shares_memory_with_the_weight():
    """What by_numpy relies on."""
    weight = fresh()
    np.testing.assert_array_equal(weight.numpy(), weight)
    by_numpy(weight)
    assert weight[3, 2] != fresh()[3, 2]
