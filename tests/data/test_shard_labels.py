"""Where the label of an image in a shard is: KEY.cls, a field of KEY.json, its folder; and labels that are none."""

from __future__ import annotations

import json

import pytest
from hub_shards import sample, write_hub, write_info, write_shard
from image_tree import photo

from ijckd_fast.data import Fields, build_index
from ijckd_fast.data.index import scan
from ijckd_fast.data.sources import listing, shards
from ijckd_fast.errors import UserError


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    photo(20, 24).save(path)
    return path.read_bytes()


def write(root, image, labels, about=None, drop=()):
    """Train of one archive: labels of KEY.cls and of KEY.json's `label`; about: more of the .json of each."""
    members = []
    for i, label in enumerate(labels):
        one = sample(f"{i:03d}", image, label, None if about is None else about[i])
        members += [member for member in one if not member[0].endswith(drop)]
    write_shard(root / "x-train-0.tar", members)


def labels(root, key=None):
    found = build_index(root, "train", fields=Fields(label_key=key))
    return [found.classes[label] for label in found.labels]


def test_cls_then_json_then_folder(tmp_path, image):
    write(tmp_path, image, [0, 1, 0])
    assert scan(tmp_path, "train").labels_from == "KEY.cls"
    write(tmp_path, image, [1, 0, 1], drop=(".cls",))
    assert labels(tmp_path) == ["1", "0", "1"]
    assert scan(tmp_path, "train").labels_from == "label in KEY.json"
    write_shard(tmp_path / "x-train-0.tar", [("cat/0.jpg", image), ("dog/0.jpg", image), ("dog/0.json", b'{"w": 3}')])
    found = scan(tmp_path, "train")
    assert (found.index.classes, found.labels_from) == (("cat", "dog"), "folders")
    assert [(row.kind, row.files) for row in found.passed_over] == [(".json", 1)]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("cls", ["0", "1"]),
        ("json:label", ["0", "1"]),
        ("json:fine", ["1", "0"]),
        ("json:name", ["cat", "dog"]),
        ("json:a.b", ["dog", "cat"]),
        ("json:x.y.z", ["0", "1"]),
        ("json:whole", ["1", "0"]),
    ],
)
def test_label_key(tmp_path, image, key, expected):
    about = [
        {"fine": 1 - i, "name": ("cat", "dog")[i], "a.b": ("dog", "cat")[i], "x": {"y": {"z": i}}, "whole": 1.0 - i}
        for i in range(2)
    ]
    write(tmp_path, image, [0, 1], about)
    assert labels(tmp_path, key) == expected


@pytest.mark.parametrize("key", ["json", "json:", "cls:x", "label", "JSON:x", ""])
def test_label_keys_that_are_none(tmp_path, image, key):
    write(tmp_path, image, [0, 1])
    if key == "":
        assert labels(tmp_path, key) == ["0", "1"]  # as if it were not given
        return
    with pytest.raises(UserError, match=r"--label-key must be cls or json:FIELD"):
        labels(tmp_path, key)


def test_a_field_that_is_not_there(tmp_path, image):
    write(tmp_path, image, [0, 1], [{"fine": 0}, {"fine": None}])
    with pytest.raises(UserError, match=r"have the field 'fine' .*but 1 of 2 images have none \('001\.jpg'\), whose"):
        labels(tmp_path, "json:fine")
    with pytest.raises(UserError, match=r"2 of 2 images .*fields are 'label', 'width', 'height', and 2 more"):
        labels(tmp_path, "json:coarse")
    write(tmp_path, image, [0, 1], [{"fine": [1]}, {"fine": 0.5}])
    with pytest.raises(UserError, match=r"'fine' in '000\.json' must be a whole number or a name, found \[1\]"):
        labels(tmp_path, "json:fine")
    write(tmp_path, image, [0, 1], drop=(".cls",), about=[{"label": None, "fine": 3}] * 2)
    with pytest.raises(UserError, match=r"2 have none .*KEY\.json has 'label', .*name one by --label-key json:FIELD"):
        labels(tmp_path)
    write(tmp_path, image, [0, 1], drop=(".json",))
    with pytest.raises(UserError, match="of which there is none or no JSON"):
        labels(tmp_path, "json:label")


def test_labels_that_disagree(tmp_path, image):
    write(tmp_path, image, [0, 1], [{}, {"label": 7}])
    text = r"'001\.jpg' disagree, '1' in '001\.cls' and '7' as 'label' in '001\.json'; choose one by --label-key cls"
    with pytest.raises(UserError, match=text):
        labels(tmp_path)
    assert labels(tmp_path, "cls") == ["0", "1"]
    write(tmp_path, image, ["00", 1], [{"label": 0}, {"label": "one"}])  # the same; a name and a number
    assert len(labels(tmp_path)) == 2
    write(tmp_path, image, ["cat", "dog"], [{}, {"label": "cow"}])
    with pytest.raises(UserError, match=r"'dog' in '001\.cls' and 'cow' as 'label'"):
        labels(tmp_path)
    about = json.dumps({"label": "dog"}).encode()
    write_shard(tmp_path / "x-train-0.tar", [("cat/0.jpg", image), ("cat/0.json", about)])
    with pytest.raises(UserError, match="its folder 'cat' and 'dog' as 'label'"):
        labels(tmp_path)
    assert labels(tmp_path, "json:label") == ["dog"]


@pytest.mark.parametrize("drop", [(), (".cls",)])
def test_negative_labels_are_skipped_and_counted(tmp_path, image, monkeypatch, drop):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    write(tmp_path, image, [0, -1, 1, -1, 0], drop=drop)
    found = scan(tmp_path, "train")
    assert (len(found.index), found.index.skipped, found.opened) == (3, 2, 3)
    assert found.index.labels.tolist() == [0, 1, 0]
    monkeypatch.setattr(shards, "list_shard", None)  # it is not listed again
    again = build_index(tmp_path, "train", trust_folders=True)
    assert (again.hash, again.skipped) == (found.index.hash, 2)
    assert not list(found.index.quarantined)


@pytest.mark.parametrize("counted", [4, 3])  # with the skipped ones, or without
def test_alt_label_of_an_info_file(tmp_path, image, counted):
    """As imagenet-12k's archives have it: a second numbering, with negative numbers for what it lacks."""
    write(tmp_path, image, [30, 40, 50, 60], [{"in12k": n} for n in (1, -1, 0, 1)])
    about = {"name": "train", "num_samples": counted, "filenames": ["x-train-0.tar"], "shard_lengths": [counted]}
    write_info(tmp_path, {"train": {**about, "alt_label": "in12k"}})
    found = scan(tmp_path, "train")
    assert (found.index.labels.tolist(), found.index.skipped, found.labels_from) == ([1, 0, 1], 1, "in12k in KEY.json")
    with pytest.raises(UserError, match="every class"):  # 0 to 60, by the user's word
        labels(tmp_path, "cls")


def test_another_key_is_listed_again_and_opens_nothing(tmp_path, image, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    write(tmp_path, image, [0, 1, 1], [{"fine": n} for n in (1, 0, 0)])
    assert scan(tmp_path, "train").opened == 3
    found = scan(tmp_path, "train", fields=Fields(label_key="json:fine"), trust_folders=True)
    assert (found.opened, found.index.labels.tolist()) == (0, [1, 0, 0])
    back = scan(tmp_path, "train", trust_folders=True)
    assert (back.opened, back.index.labels.tolist()) == (0, [0, 1, 1])


def test_a_key_is_for_shards(tmp_path, image):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpg").write_bytes(image)
    with pytest.raises(UserError, match=r"--label-key would say .* has class folders .*leave the option out"):
        labels(tmp_path, "cls")
    index = build_index(tmp_path, "train")
    shards = write_hub(tmp_path / "hub", [index])
    assert labels(shards, "cls") == ["0", "1"]
