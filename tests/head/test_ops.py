"""What holds for every op: torch's own checks, compilation, what backward makes, and the libraries they are in."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from op_cases import (
    F64,
    assert_equal_to,
    class_map_inputs,
    connector_inputs,
    loss_inputs,
    op_samples,
    projected_inputs,
    refused,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ijckd_fast
from ijckd_fast import head
from ijckd_fast.head import class_map, classifier, connector  # noqa: F401  they register what opcheck asks for

ops = torch.ops.ijckd


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in op_samples()])
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


def test_every_op_is_sampled_and_registered_for_cuda():
    source = (pathlib.Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text()
    names = set(re.findall(r'^\s*"([a-z]\w*)\(|m\.def\("(\w+)\(', source, re.M))
    names = {a or b for a, b in names if not (a or b).startswith("block_")}  # tests/data/test_block_codec.py
    names -= {"limit_stage", "refused_launches"}  # of which the first takes no tensor, the second one on a GPU
    assert names == {op.name().split("::")[1].split(".")[0] for _, op, _ in op_samples()}
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ijckd::{name}", "CPU")
        if ijckd_fast.HAS_CUDA_LIBRARY:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ijckd::{name}", "CUDA")


def test_compile_fullgraph():
    leaves, keywords = connector_inputs((4, 6, 3, 3), dtype=torch.float32)
    weight_t, labels = torch.randn(9, 7), torch.tensor([0, 3, 8, 1])

    def step(u, weight, bn_weight, bn_bias, running_mean, running_var):
        z, fm = head.connector_match(
            u,
            weight,
            bn_weight=bn_weight,
            bn_bias=bn_bias,
            running_mean=running_mean,
            running_var=running_var,
            map_t=keywords["map_t"],
        )
        loss, _, top1 = head.classifier_loss(z, weight_t, None, labels, pooled_t=keywords["map_t"].mean((2, 3)), sr=1.0)
        return loss + fm, top1

    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        mine = [v.detach().clone().requires_grad_() for v in leaves.values()]
        running = [keywords["running_mean"].clone(), keywords["running_var"].clone()]
        loss, top1 = f(*mine, *running)
        loss.backward()
        results.append([loss.detach(), top1, *running, *[m.grad for m in mine]])
    assert_equal_to(results[1], results[0], 1e-5)


@pytest.mark.parametrize("given", ["some", "all"])
def test_compile_with_any_tensors_and_changing_numbers(given):
    """torch.library hands on a list of tensors in another form than one with a None in it; a weight may change each
    step.
    """
    torch.compiler.reset()  # else the other case's compilations count against the limit
    leaves, (weight, *others, labels_b, mix, pooled_t) = projected_inputs(dtype=torch.float32)
    more = {"labels_b": labels_b, "mix": mix, "logits_t": torch.randn(5, 9)} if given == "all" else {}
    more |= {"gram": head.classifier_gram(weight)} if given == "all" else {}

    def step(leaves, kl):
        return head.projected_classifier_loss(*leaves, weight, *others, pooled_t=pooled_t, sr=0.5, kl=kl, **more)[0]

    compiled = torch.compile(step, fullgraph=True)
    for kl in (0.9, 0.7, 0.5):
        results = []
        for f in (step, compiled):
            mine = [x.clone().requires_grad_() for x in leaves]
            loss = f(mine, kl)
            results.append([loss.detach(), *torch.autograd.grad(loss, mine)])
        assert_equal_to(results[1], results[0], 1e-5)
    weight.requires_grad_()
    with pytest.raises(Exception, match="weight must not require grad"):
        torch.compile(step)(leaves, 0.9)


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 6)], ids=str)
@pytest.mark.parametrize("match", ["map", None])
def test_backward_makes_no_zeros_for_results_without_gradient(shape, match):
    """On a GPU each would be a launch, and one as large as the map."""
    leaves, keywords = connector_inputs(shape, norm="bias", match=match, relu=False)
    z, fm = head.connector_match(*leaves.values(), **keywords)
    loss = head.classifier_loss(z, torch.randn(9, 7, dtype=F64), None, torch.tensor([0, 3, 8, 1]))[0]
    results, called = [loss, fm] if match else [loss], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorded():
        torch.autograd.grad(results, list(leaves.values()), [torch.full_like(x, 2) for x in results])
    assert "ijckd::connector" in "".join(called)
    assert [name for name in called if "zero" in name] == []


@pytest.mark.parametrize("op", ["connector_match", "classifier_loss", "projected_classifier_loss", "class_map_loss"])
def test_double_backward_is_refused(op):
    if op == "projected_classifier_loss":
        (x, *projection), (weight, bias, labels, *_) = projected_inputs()
        out = head.projected_classifier_loss(x.requires_grad_(), *projection, weight, bias, labels)[0]
    elif op == "connector_match":
        leaves, keywords = connector_inputs()
        x = leaves["u"]
        out = head.connector_match(x, leaves["weight"], map_t=keywords["map_t"])[1]
    elif op == "class_map_loss":
        x, weight, bias, maps_t, labels, _ = class_map_inputs()
        out = head.class_map_loss(x.requires_grad_(), weight, bias, maps_t, labels, kl=1.0)[0]
    else:
        x, weight, bias, labels, *_ = loss_inputs()
        out = head.classifier_loss(x.requires_grad_(), weight, bias, labels)[0]
    refused(f"{op}: double backward is not supported", lambda: torch.autograd.grad(out, x, create_graph=True))


def test_libraries_use_only_the_stable_abi():
    """What makes one wheel serve every torch >= 2.10: no undefined C++ symbol of torch, only the C shim's."""
    package = pathlib.Path(ijckd_fast.__file__).parent / "head"
    for library in package.glob("_C*.so"):
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split()[-1] for line in listing.splitlines()]
        assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
        assert [s for s in symbols if re.match(r"_ZN\w*(2at|3c10|5torch)", s)] == []


@pytest.mark.parametrize(
    ("content", "text"), [(None, "the compiled library _C.so is not in"), (b"not a library", "cannot load it")]
)
def test_missing_or_broken_library_says_what_to_do(tmp_path, content, text):
    package = tmp_path / "ijckd_fast"
    shutil.copytree(
        pathlib.Path(ijckd_fast.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    if content is not None:
        (package / "head/_C.so").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", "from ijckd_fast import connector_match"], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: ijckd_fast: ")
    assert text in last
    assert "pip install -e ." in last
