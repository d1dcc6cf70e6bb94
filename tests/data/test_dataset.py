import errno
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from image_tree import photo, write_split
from loading import AUGMENT, identical
from PIL import Image

from ijckd_fast.data import (
    Augment,
    Batch,
    DatasetLoader,
    EvalPlan,
    Index,
    PillowLoader,
    TooManyUnreadable,
    TrainPlan,
    build_index,
    index_dataset,
)
from ijckd_fast.errors import UserError


class Items:
    """A dataset of what it is given: (image, label) items, or exceptions to raise."""

    def __init__(self, items, **more) -> None:
        self.items = items
        self.__dict__.update(more)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 images of four shapes in three classes; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    write_split(root, "train", {"cat": 10, "dog": 10, "eel": 10})
    return root


@pytest.fixture(scope="module")
def files(folder) -> Index:
    return build_index(folder, "train")


@pytest.fixture
def dataset(folder) -> torchvision.datasets.ImageFolder:
    return torchvision.datasets.ImageFolder(folder / "train")


def small(n: int = 12, classes: int = 2, **more) -> Items:
    """n PIL images; labels 0, 1, 0, 1, ..."""
    return Items([(photo(32, 40, i), i % classes) for i in range(n)], **more)


def batches(loader) -> list[Batch]:
    with loader:
        return list(loader)


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_is_a_folder_s(dataset, files):
    index = index_dataset(dataset, "train")
    assert (index.classes, index.split, index.quarantined) == (("cat", "dog", "eel"), "train", [])
    assert np.array_equal(index.labels, files.labels)
    assert np.array_equal(index.sizes, files.sizes)
    assert (index.labels.dtype, index.sizes.dtype) == (files.labels.dtype, files.sizes.dtype)
    assert index.absolute(7) == "ImageFolder/train/7"
    assert index_dataset(dataset, "train", workers=3).hash == index.hash


def test_the_hash_is_of_split_classes_labels_and_sizes():
    hashes = [
        index_dataset(small(), "train").hash,
        index_dataset(small(), "val").hash,
        index_dataset(small(), "train", classes=["a", "b"]).hash,
        index_dataset(small(14), "train").hash,
        index_dataset(Items([(photo(32, 41 - (i == 3), i), i % 2) for i in range(12)]), "train").hash,
        index_dataset(Items([(photo(32, 40, i), int(i > 5)) for i in range(12)]), "train").hash,
        *(
            index_dataset(
                Items([OSError("gone") if i == bad else (photo(32, 40), int(i > 5)) for i in range(12)]), "train"
            ).hash
            for bad in (0, 1)
        ),
    ]
    assert len(set(hashes)) == len(hashes)
    assert index_dataset(small(), "train").hash == hashes[0]


def test_classes():
    assert index_dataset(small(classes=3), "train").classes == ("0", "1", "2")
    names = [("tench", "Tinca tinca"), "goldfish"]  # as torchvision's ImageNet has them
    assert index_dataset(small(), "train", names).classes == ("tench, Tinca tinca", "goldfish")
    data = small()
    data.classes = ["a", "b"]
    assert index_dataset(data, "train").classes == ("a", "b")
    assert index_dataset(data, "val", classes=["c", "d"]).classes == ("c", "d")


def test_items_that_raise_are_left_out():
    items = small(12).items
    items[3], items[8] = ValueError("no such row"), OSError("broken")
    index = index_dataset(Items(items, targets=torch.arange(12) % 2), "train")
    assert index.quarantined == [("train/3", "ValueError: no such row"), ("train/8", "OSError: broken")]
    assert list(index.paths) == [f"train/{i}" for i in range(12) if i not in (3, 8)]
    loader = DatasetLoader(EvalPlan(index, AUGMENT, 10), Items(items))
    (batch,) = batches(loader)
    whole = DatasetLoader(EvalPlan(index_dataset(small(), "train"), AUGMENT, 12), small())
    (want,) = batches(whole)
    assert torch.equal(batch.images, want.images[[i for i in range(12) if i not in (3, 8)]])


def test_a_lazy_image_that_cannot_be_decoded_is_left_out(tmp_path):
    write_split(tmp_path, "train", {"cat": 3, "dog": 3})
    bad = tmp_path / "train" / "dog" / "001.jpg"
    bad.write_bytes(bad.read_bytes()[:700])

    class Lazy(Items):
        def __getitem__(self, i):
            path, label = self.items[i]
            return Image.open(path), label

    paths = sorted((tmp_path / "train").rglob("*.jpg"))
    index = index_dataset(Lazy([(path, int(path.parent.name == "dog")) for path in paths]), "train")
    assert [path for path, _ in index.quarantined] == ["train/4"]
    assert "truncated" in index.quarantined[0][1]


def test_trouble_of_the_machine_is_no_item_s_fault():
    items = small().items
    items[3] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OSError, match="Too many open files"):
        index_dataset(Items(items), "train")


def gray(kind):
    return np.zeros((8, 8), kind)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ((torch.zeros(3, 8, 8), 0), r"found an image that is Tensor \[3, 8, 8\] of float32; remove its transform"),
        ((torch.zeros(3, 8, 8, dtype=torch.float16), 0), "of float16; remove its transform"),
        ((torch.zeros(8, 8, 3, dtype=torch.uint8), 0), r"Tensor \[8, 8, 3\] of uint8; convert it"),
        ((torch.zeros(1, 8, 8, dtype=torch.uint8), 0), r"Tensor \[1, 8, 8\] of uint8; convert it"),
        ((np.zeros((3, 8, 8), np.uint8), 0), r"ndarray \[3, 8, 8\] of uint8; convert it"),
        ((np.zeros((8, 8, 3), np.float32), 0), r"ndarray \[8, 8, 3\] of float32; convert it"),
        ((gray(np.uint8), 0), r"ndarray \[8, 8\] of uint8"),
        ((Image.fromarray(gray(np.float32)), 0), "found Pillow mode F; convert it to L or RGB"),
        (("x.jpg", 0), "found an image that is str"),
        ((photo(8, 8), 0.5), "found a label of type float; make it an int"),
        ((photo(8, 8), torch.zeros(2)), "found a label of type Tensor"),
        ((photo(8, 8), 0, 0), "found 3 things; wrap the dataset"),
        (photo(8, 8), "found Image; wrap the dataset"),
        ({"image": photo(8, 8)}, "found dict; wrap the dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "item",  # an image's own would hold its address
)
def test_items_of_another_kind_are_refused(item, why):
    data = Items([(photo(8, 8), 0), (photo(8, 8), 1), item])
    with pytest.raises(UserError, match=rf"^item 2 of Items: expected .*{why}"):
        index_dataset(data, "train")
    good = Items([*data.items[:2], (photo(8, 8), 0)])
    with pytest.raises(UserError, match=why):  # it had no transform when it was indexed
        batches(DatasetLoader(EvalPlan(index_dataset(good, "train"), AUGMENT, 3), data))


def test_datasets_that_do_not_fit_are_refused():
    def complaint(data, *more) -> str:
        with pytest.raises(UserError) as caught:
            index_dataset(data, "train", *more)
        return str(caught.value)

    assert "remove its target_transform" in complaint(small(targets=[1] * 12))
    assert "12 items and 11 targets" in complaint(small(targets=[i % 2 for i in range(11)]))
    assert "must be integer labels" in complaint(small(targets=["cat"] * 12))
    assert "from 0 to 1, one of its 2 classes, found 2" in complaint(small(classes=3), ["a", "b"])
    assert "found -1" in complaint(Items([(photo(8, 8), -1), (photo(8, 8), 0)]))
    assert "label 2 ('c') has none" in complaint(small(), ["a", "b", "c"])
    assert "label 1 ('1') has none" in complaint(Items([(photo(8, 8), 0), (photo(8, 8), 2)]))
    assert "1 items are unreadable (OSError: gone)" in complaint(Items([(photo(8, 8), 0), OSError("gone")]), ["a", "b"])
    assert "none can be read; 2 items" in complaint(Items([OSError("gone")] * 2))
    assert "is empty" in complaint(Items([]))
    assert "workers must be at least 0" in complaint(small(), None, -1)
    assert "map-style dataset, found generator" in complaint(i for i in ())


# --- the loader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_batches_are_the_pillow_loader_s(dataset, files, kind):
    convert = {
        "pil": lambda x: x,
        "array": np.asarray,
        "tensor": lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1),
    }
    dataset.transform = convert[kind]
    index = index_dataset(dataset, "train")
    plans = [
        (TrainPlan(one, AUGMENT, 8, seed=3) for one in (files, index)),
        (EvalPlan(one, AUGMENT, 8) for one in (files, index)),
    ]
    for ours, theirs in plans:
        want = batches(PillowLoader(ours, stop=7 if ours.num_steps is None else None))
        got = batches(DatasetLoader(theirs, dataset, threads=3, stop=len(want)))
        assert identical(got, want)
        assert got[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [0, 5])
def test_mixing_resume_and_ranks_are_the_plan_s(dataset, files, padding):
    augment = Augment(image_size=24, eval_resize=28, mixup=0.2, cutmix=1.0, crop_padding=padding, affine_shift=0.2)
    index = index_dataset(dataset, "train")
    want = batches(PillowLoader(TrainPlan(files, augment, 8, seed=5), stop=9))
    assert identical(batches(DatasetLoader(TrainPlan(index, augment, 8, seed=5), dataset, stop=9)), want)
    later = DatasetLoader(TrainPlan(index, augment, 8, seed=5), dataset, start=5, stop=9, threads=1, prefetch=4)
    assert identical(batches(later), want[5:])
    (rank,) = batches(DatasetLoader(TrainPlan(index, AUGMENT, 4, 5, 1, 2), dataset, stop=1))
    (alone,) = batches(DatasetLoader(TrainPlan(index, AUGMENT, 8, 5), dataset, stop=1))
    assert torch.equal(rank.images, alone.images[4:])


def test_subsets_of_the_index_keep_their_items(dataset, files):
    index = index_dataset(dataset, "train").subset(per_class=4, seed=1)
    want = batches(PillowLoader(EvalPlan(files.subset(per_class=4, seed=1), AUGMENT, 5)))
    assert identical(batches(DatasetLoader(EvalPlan(index, AUGMENT, 5), dataset)), want)


@pytest.mark.parametrize("trouble", [ValueError("no such row"), (photo(33, 40), 1)], ids=["raises", "another size"])
def test_an_item_that_becomes_unreadable_has_a_stand_in(trouble):
    data = small(12)
    index = index_dataset(data, "train")
    plan = TrainPlan(index, AUGMENT, 6, seed=0)
    before = batches(DatasetLoader(plan, data, stop=4))
    data.items[7] = trouble
    said = []
    loader = DatasetLoader(
        TrainPlan(index, AUGMENT, 6, seed=0), data, stop=4, on_bad=lambda path, why: said.append((path, why))
    )
    got = batches(loader)
    ((path, why),) = said
    assert path == "Items/train/7"
    assert "no such row" in why or "40x33 pixels where 40x32 were indexed" in why
    for a, b in zip(before, got, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert b.ids.tolist() == [9 if i == 7 else i for i in a.ids.tolist()]
        for i, x, y in zip(a.ids.tolist(), a.images, b.images, strict=True):
            assert torch.equal(x, y) == (i != 7)
    evaluated = batches(DatasetLoader(EvalPlan(index, AUGMENT, 5), data, on_bad=lambda *_: None))
    assert [i for batch in evaluated for i in batch.ids.tolist()] == [i for i in range(12) if i != 7]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TooManyUnreadable, match="more than the 0 allowed"):
            batches(DatasetLoader(EvalPlan(index, AUGMENT, 5), data, bad_limit=0))


def test_another_dataset_than_the_indexed_one():
    index = index_dataset(small(12), "train")
    with pytest.raises(UserError, match="the plan is of Items with 12 items or more, found Items with 10"):
        DatasetLoader(EvalPlan(index, AUGMENT, 5), small(10))
