"""Names that are no model's are known without the libraries; names that are, are never refused."""

from __future__ import annotations

import sys

import pytest
import timm
import torchvision

from ijckd_fast.errors import UserError
from ijckd_fast.nets import cifar_names, listed


@pytest.fixture
def not_imported(monkeypatch):
    """As if neither library had been imported yet."""
    for library in listed.LIBRARIES:
        monkeypatch.delitem(sys.modules, library)
    sources = {library: listed._sources(library) for library in listed.LIBRARIES}
    monkeypatch.setattr(listed, "_sources", sources.get)  # read once
    assert all(sources.values())


def test_no_name_of_a_library_or_of_ours_is_refused(not_imported):
    names = [*torchvision.models.list_models(module=torchvision.models), *timm.list_models(), *cifar_names.NAMES]
    assert len(names) > 1000
    for name in names[::7]:
        listed.refuse_unknown(name)
    for name in (
        "cifar/vgg16",
        "torchvision/resnet18",
        "timm/resnet18.a1_in1k",
        "timm/vit_tiny_patch16_224",
        "wrn_40_2",
    ):
        listed.refuse_unknown(name)


def test_the_nearest_registered_names_are_given(not_imported):
    for name, near in (("resnte50", "resnet50"), ("timm/conv_next_tiny", "convnext_tiny"), ("wrn_40_222", "wrn_40_2")):
        with pytest.raises(UserError, match=f"unknown model '{name}'.*did you mean.*'{near}'"):
            listed.refuse_unknown(name)
    with pytest.raises(UserError, match=r"expected 'cifar/' and a net for small images.*did you mean 'resnet8x4'"):
        listed.refuse_unknown("cifar/resnet8x44x")


def test_a_library_that_is_imported_may_have_nets_of_others():
    listed.refuse_unknown("my_small_net")  # registered, perhaps: is_model_name knows


def test_a_library_without_sources_is_left_to_its_import(not_imported, monkeypatch):
    monkeypatch.setattr(listed, "_sources", lambda library: [] if library == "timm" else ["def resnet18("])
    listed.refuse_unknown("resnte50")
