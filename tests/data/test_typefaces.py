"""Typefaces are found by what they say of themselves, and the same ones wherever they lie."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from made_typefaces import make_face, save, save_collection, write_all

from ijckd_fast.data.prepare import typefaces
from ijckd_fast.data.prepare.typefaces import Face, chosen, read_list, require, search, system_folders
from ijckd_fast.errors import UserError

POINTS = (0x4E00, 0x4E8C, 0x4E09)
PEN = Face("pen", "regular", "pen", "train", "My Pen", "Regular", "fonts-pen")
BRUSH = Face("brush", "bold", "brush", "val", "My Brush", "Bold", "fonts-brush")


@pytest.fixture(autouse=True)
def no_typefaces_of_the_system(tmp_path, monkeypatch):
    """Only those in tmp_path/system, by a configuration as fontconfig has it."""
    (tmp_path / "fonts.conf").write_text("<fontconfig><dir>system</dir></fontconfig>")
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))


def test_the_list_keeps_designs_apart_and_names_each_face_once():
    faces = read_list()
    assert {face.split for face in faces} == {"train", "val"}
    splits = {(face.design, face.split, face.kind) for face in faces}
    assert len(splits) == len({face.design for face in faces})
    for names in ([face.name for face in faces], [face.key for face in faces]):
        assert max(Counter(names).values()) == 1
    assert all("/" not in face.name and face.name.count("_") == 1 for face in faces)
    first = {face.design: face.kind for face in chosen(faces, "10") if face.split == "train"}
    assert len(first) == 10
    assert len(set(first.values())) >= 6


def test_designs_are_chosen_by_number_or_name():
    faces = read_list()
    train = list(dict.fromkeys(face.design for face in faces if face.split == "train"))
    val = {face.design for face in faces if face.split == "val"}
    assert chosen(faces, None) == faces
    assert {face.design for face in chosen(faces, "2")} == {*train[:2], *val}
    assert {face.design for face in chosen(faces, f"{train[5]}, {train[1]}")} == {train[1], train[5], *val}


@pytest.mark.parametrize(
    ("designs", "text"),
    [
        ("0", "--designs must be from 1 to"),
        ("1000", "found 1000"),
        ("helvetica", "found 'helvetica'"),
        ("noto-sans,", "found ''"),
        ("noto-sans,klee", "'klee', which is for validation alone"),
        ("-1", "found '-1'"),
    ],
)
def test_designs_that_there_are_not(designs, text):
    with pytest.raises(UserError, match=text):
        chosen(read_list(), designs)


def test_a_face_is_found_by_its_names_whatever_its_file_is_called(tmp_path):
    fonts = tmp_path / "fonts"
    save(make_face("My  pen", "REGULAR", POINTS), fonts / "deep" / "er" / "x.TTF")
    others = [make_face("My Brush", style, POINTS) for style in ("Regular", "Light", "Bold")]
    save_collection(others, fonts / "My Pen-Regular.ttc")
    (fonts / "circle").symlink_to(fonts)
    (fonts / "gone.otf").symlink_to(tmp_path / "nowhere")
    seen = search([BRUSH, PEN], [fonts])
    assert [(one.face, one.path.name, one.index, one.version) for one in seen.found] == [
        (BRUSH, "My Pen-Regular.ttc", 2, "Version 1.000"),
        (PEN, "x.TTF", 0, "Version 1.000"),
    ]
    assert (seen.missing, seen.unreadable) == ([], [])


def test_of_several_files_the_newest_is_taken_whatever_the_order_of_folders(tmp_path):
    for number, revision in enumerate((2.0, 10.5, 10.5, 9.0)):
        font = make_face("My Pen", "Regular", POINTS, revision=revision, weight=0.5 + 0.1 * number)
        save(font, tmp_path / str(number) / "pen.ttf")
    folders = [tmp_path / str(number) for number in range(4)]
    taken = [search([PEN], order).found for order in (folders, folders[::-1], [folders[2], folders[0], folders[1]])]
    assert taken[0][0].version == "Version 10.500"
    assert taken[0] == taken[1] == taken[2]


def test_given_folders_are_preferred_to_those_of_the_system(tmp_path):
    for folder, revision in (("system", 3.0), ("own", 1.0)):
        save(make_face("My Pen", "Regular", POINTS, revision=revision), tmp_path / folder / "pen.ttf")
    save(make_face("My Brush", "Bold", POINTS), tmp_path / "system" / "brush.ttf")
    found = search([PEN, BRUSH], [tmp_path / "own"]).found
    assert [one.version for one in found] == ["Version 1.000", "Version 1.000"]
    assert search([PEN]).found[0].version == "Version 3.000"
    with pytest.raises(UserError, match=r"--fonts must be a folder of typefaces, but .*nowhere is none"):
        search([PEN], [tmp_path / "nowhere"])


def test_where_the_system_has_its_typefaces(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_DATA_DIRS", f"/one:{tmp_path}")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-more.conf").write_text('<fontconfig><dir prefix="xdg">more</dir></fontconfig>')
    (tmp_path / "conf.d" / "20-broken.conf").write_text("<fontconfig>")
    (tmp_path / "fonts.conf").write_text("<fontconfig><dir>/usr/fonts</dir><dir>~/.fonts</dir></fontconfig>")
    expected = ["/usr/fonts", f"{tmp_path}/home/.fonts", f"{tmp_path}/data/more"]
    assert list(map(str, system_folders())) == expected
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "none"))
    usual = [f"{tmp_path}/data/fonts", f"{tmp_path}/home/.fonts", "/one/fonts", f"{tmp_path}/fonts"]
    assert list(map(str, system_folders())) == usual


def test_missing_faces_are_named_with_what_to_install(tmp_path):
    faces = read_list()
    write_all(tmp_path / "fonts", POINTS, [face for face in faces if face.family not in ("M PLUS 1", "kiloji")])
    (tmp_path / "fonts" / "cut.ttf").write_bytes((tmp_path / "fonts" / "000.ttf").read_bytes()[:300])
    seen = search(faces, [tmp_path / "fonts"])
    with pytest.raises(UserError) as refused:
        require(seen, allow_missing=False)
    text = str(refused.value)
    assert "7 of 46 typefaces, of 2 designs, are not on this machine" in text
    assert "kiloji Regular, M PLUS 1 Thin/Light/Regular/Medium/Bold/Black" in text
    assert "apt-get install --no-install-recommends fonts-kiloji fonts-mplus;" in text
    assert "1 font files could not be read" in text
    assert "cut.ttf" in text
    assert "--allow-missing" in text
    said = require(seen, allow_missing=True)
    assert said is not None
    assert said.startswith("another task than with all typefaces: 7 of 46")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_any_typeface_is_an_error_in_any_case(split, tmp_path):
    faces = read_list()
    write_all(tmp_path / "fonts", POINTS, [face for face in faces if face.split != split])
    for allowed in (False, True):
        with pytest.raises(UserError, match=f"which leaves none for {split}; on Debian or Ubuntu: apt-get"):
            require(search(faces, [tmp_path / "fonts"]), allowed)


def test_nothing_is_said_where_all_are_there(tmp_path):
    write_all(tmp_path / "fonts", POINTS)
    assert require(search(read_list(), [tmp_path / "fonts"]), allow_missing=False) is None


def test_a_link_to_a_file_is_the_file(tmp_path):
    path = save(make_face("My Pen", "Regular", POINTS), tmp_path / "fonts" / "pen.ttf")
    (tmp_path / "fonts" / "also.ttf").symlink_to(path)
    assert list(typefaces._font_files([tmp_path / "fonts"])) == [path.resolve()]
    assert os.listdir(tmp_path / "fonts") != ["pen.ttf"]
