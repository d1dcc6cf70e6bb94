"""Glyphs of made typefaces as a data folder: what is drawn and how, and that there is all of a folder or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import complaint, rows_of
from made_typefaces import BOX, NO_INK, make_face, save, write_all
from PIL import Image

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.data.prepare import BlockPack, JpegPack, glyphs, prepare_glyphs
from ijckd_fast.data.prepare.glyph_images import JIS1, pictures_of
from ijckd_fast.data.prepare.typefaces import Face, Found, chosen, read_list
from ijckd_fast.errors import UserError

POINTS = tuple(map(ord, "一丁七万丈三"))
FACE = Face("pen", "regular", "pen", "train", "My Pen", "Regular", "fonts-pen")
ALL = read_list()
FEW = [face for face in chosen(ALL, "kiloji") if face.design in ("kiloji", "klee", "tw-kai")]


@pytest.fixture(autouse=True)
def no_typefaces_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "fonts.conf").write_text("<fontconfig/>")
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))


@pytest.fixture(scope="module")
def all_fonts(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("all"), POINTS)


@pytest.fixture
def few(monkeypatch, tmp_path) -> Path:
    """Three faces of one design to train on, two designs for validation: all that the list has."""
    monkeypatch.setattr(glyphs, "read_list", lambda: FEW)
    return write_all(tmp_path / "fonts", POINTS, FEW)


def drawn(tmp_path: Path, size: int = 32, points=POINTS, **how) -> dict[int, np.ndarray]:
    """The pictures of a typeface made for it."""
    path = save(make_face("My Pen", "Regular", POINTS, **how), tmp_path / "made.ttf")
    return dict(pictures_of(Found(FACE, path, 0, "", ""), size, points))


def ink(picture: np.ndarray) -> tuple[int, ...]:
    """Left, top, right, bottom."""
    return Image.fromarray(picture).getbbox()


def test_the_sets_of_characters():
    assert len(glyphs.SETS["jis1"]) == len(set(JIS1)) == 2965
    assert (chr(JIS1[0]), chr(JIS1[-1])) == ("亜", "腕")
    assert len(glyphs.SETS["cjk"]) == 20902
    assert set(glyphs.SETS["jis1"]) < set(glyphs.SETS["cjk"])
    for points in glyphs.SETS.values():
        assert sorted(map(glyphs.class_of, points)) == list(map(glyphs.class_of, points))


@pytest.mark.parametrize("size", [8, 32, 50, 160])
@pytest.mark.parametrize(
    "square", [(0.05, -0.1, 0.95, 0.8), (0.3, 0.2, 0.6, 0.5), (-0.4, 0.9, 0.6, 1.9), (0, -2, 2, 0)]
)
def test_ink_fills_the_square_alike_wherever_a_typeface_has_it(tmp_path, size, square):
    left, top, right, bottom = ink(drawn(tmp_path, size, square=square)[POINTS[0]])
    margin = size / 16
    for side in (left, top, size - right, size - bottom):
        assert abs(side - margin) <= 1 + size / 64


def test_strokes_are_grey_where_they_cover_part_of_a_pixel(tmp_path):
    """Not drawn at the final size, where hinting would make one and the same bar of them."""
    pictures = [drawn(tmp_path, weight=weight)[POINTS[3]] for weight in (0.3, 0.6)]
    assert len(np.unique(pictures[0])) > 4
    assert 1.5 < pictures[1][16].sum() / pictures[0][16].sum() < 2.5


def test_characters_keep_their_sizes_and_places_beside_each_other(tmp_path):
    small = {POINTS[1]: [(0.6, 0.0, 1.0, 0.4)]}
    left, top, right, bottom = ink(drawn(tmp_path, odd=small)[POINTS[1]])
    assert min(left, top) >= 17
    assert (32 - right, 32 - bottom) == (2, 2)
    half = {point: [(0.4, 0.4, 0.6, 0.6)] for point in POINTS[1:4]}
    left, top, right, bottom = ink(drawn(tmp_path, odd=half)[POINTS[0]])
    assert max(abs(side - 2) for side in (left, top, 32 - right, 32 - bottom)) <= 1


def test_what_reaches_beyond_the_square_is_made_smaller_and_not_cut(tmp_path):
    long = {POINTS[2]: [(0, -1.5, 1, 1), (0.9, 0.9, 3, 1)], POINTS[3]: [(0.4, -8, 0.6, 1)]}
    points = tuple({*JIS1[:100], *POINTS})
    path = save(make_face("My Pen", "Regular", points, odd=long), tmp_path / "long.ttf")
    pictures = dict(pictures_of(Found(FACE, path, 0, "", ""), 64, points))
    usual = ink(pictures[POINTS[0]])
    assert max(abs(side - place) for side, place in zip(usual, (4, 4, 60, 60), strict=True)) <= 1
    left, top, right, bottom = ink(pictures[POINTS[2]])
    assert min(left, top, 64 - right, 64 - bottom) <= 1
    assert bottom - top > 28
    assert right - left > 35
    left, top, right, bottom = ink(pictures[POINTS[3]])
    assert right - left <= 3
    assert 64 - bottom <= 1
    assert bottom - top >= 30


def test_characters_without_a_picture(tmp_path):
    """Not in the table, without ink, drawn as missing ones are."""
    odd = {POINTS[1]: NO_INK, POINTS[2]: BOX}
    there = drawn(tmp_path, odd=odd, points=(*POINTS, 0x4E8C))
    assert set(there) == {*POINTS} - {POINTS[1], POINTS[2]}
    without_a_box = {0: NO_INK, POINTS[2]: BOX}
    assert POINTS[2] in drawn(tmp_path, odd=without_a_box)
    assert drawn(tmp_path, odd=dict.fromkeys(POINTS, NO_INK)) == {}


def test_a_picture_is_the_same_in_every_set_of_characters(tmp_path):
    alone, among = drawn(tmp_path, points=POINTS[:1]), drawn(tmp_path, points=(*POINTS, 0x9FA5))
    np.testing.assert_array_equal(alone[POINTS[0]], among[POINTS[0]])


def test_a_face_without_any_measured_character_is_measured_by_its_own(tmp_path):
    rare = (0x4E02, 0x4E04)  # not of JIS X 0208
    path = save(make_face("My Pen", "Regular", rare, square=(0.4, 0.4, 0.5, 0.5)), tmp_path / "rare.ttf")
    pictures = dict(pictures_of(Found(FACE, path, 0, "", ""), 32, rare))
    assert max(abs(side - place) for side, place in zip(ink(pictures[rare[0]]), (2, 2, 30, 30), strict=True)) <= 1


def test_all_typefaces_of_the_list(all_fonts, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["prepare-glyphs", str(out), "--fonts", str(all_fonts), "--workers", "1"]) == 0
    printed, err = capsys.readouterr()
    train, val = rows_of(printed)
    assert "left out, since no typeface of train, or none of val, has them: 2,959 characters" in printed
    assert err == ""
    assert (train["images"], train["classes"], train["faces"], train["designs"]) == (246, 6, 41, 22)
    assert (val["images"], val["faces"], val["designs"], val["missing_faces"], val["lacking"]) == (30, 5, 5, 0, 0)
    assert f"digest of the pixels {val['pixels_digest']}" in printed
    assert sorted(path.name for path in (out / "train").iterdir()) == sorted(f"u{point:04x}" for point in POINTS)
    assert {path.stem for path in (out / "val" / "u4e00").iterdir()} == {f.name for f in ALL if f.split == "val"}
    assert (out / "characters.txt").read_text().splitlines()[:2] == ["u4e00 一", "u4e01 丁"]
    record = json.loads((out / "glyphs.json").read_text())
    assert [one["name"] for one in record["typefaces"]] == [face.name for face in ALL]
    assert record["typefaces"][0]["version"] == "Version 1.000"
    assert len(record["left_out"]) == 2959
    assert {path.name for path in (out / ".ijckd-index").iterdir()} >= {"train.parquet", "val.parquet"}
    image = Image.open(out / "val" / "u4e00" / "klee_regular.png")
    assert (image.mode, image.size) == ("L", (32, 32))


def test_twice_and_by_other_processes_and_folders_the_pixels_are_the_same(few, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for path in sorted(few.iterdir())[::2]:
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    whole = prepare_glyphs(tmp_path / "a", fonts=[few], workers=1)
    again = prepare_glyphs(tmp_path / "b", fonts=[tmp_path / "two", few, tmp_path / "one"], workers=2)
    assert [row["pixels_digest"] for row in whole] == [row["pixels_digest"] for row in again]
    assert build_index(tmp_path / "a", "train").hash == build_index(tmp_path / "b", "train").hash
    save(make_face("kiloji", "Regular", POINTS, weight=0.5), few / "000.ttf")
    other = prepare_glyphs(tmp_path / "c", fonts=[few], workers=1)
    assert other[0]["pixels_digest"] != whole[0]["pixels_digest"]
    assert other[1]["pixels_digest"] == whole[1]["pixels_digest"]


def test_characters_that_a_face_lacks_are_left_out_and_counted(few, tmp_path):
    said: list[str] = []
    save(make_face("kiloji", "Regular", POINTS[:4], odd={POINTS[1]: NO_INK}), few / "000.ttf")
    for number in (3, 4):
        save(make_face(FEW[number].family, FEW[number].style, POINTS[:5]), few / f"{number:03d}.ttf")
    train, val = prepare_glyphs(tmp_path / "out", fonts=[few], workers=1, say=said.append)
    assert (train["classes"], train["images"], train["lacking"]) == (5, 13, 2)
    assert (val["classes"], val["images"], val["lacking"]) == (5, 10, 0)
    assert said[1:] == ["kiloji_regular lacks 2 characters (丁丈)"]
    record = json.loads((tmp_path / "out" / "glyphs.json").read_text())
    assert (record["faces"][0]["lacks"], record["faces"][0]["images"]) == ("丁丈", 3)
    assert "三" in record["left_out"]
    assert not (tmp_path / "out" / "train" / "u4e09").exists()


def test_missing_typefaces(few, tmp_path, capsys):
    (few / "001.ttf").unlink()
    (few / "004.ttf").unlink()
    words = ("prepare-glyphs", str(tmp_path / "out"), "--fonts", str(few), "--workers", "1")
    text = complaint(capsys, *words)
    assert "kiloji - B Regular, TW-Kai Regular" in text
    assert "fonts-cns11643-kai fonts-kiloji" in text
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "--allow-missing"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("another task than with all typefaces: 2 of 5 typefaces, of 2 designs, are not on this")
    assert [row["missing_faces"] for row in rows_of(out)] == [1, 1]
    missing = json.loads((tmp_path / "out" / "glyphs.json").read_text())["missing"]
    assert [one["name"] for one in missing] == ["kiloji_bold", "tw-kai_regular"]
    (few / "003.ttf").unlink()
    assert "leaves none for val" in complaint(capsys, *words[:1], str(tmp_path / "new"), *words[2:], "--allow-missing")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_kept_if_it_is_the_same(few, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty one is taken
    first = prepare_glyphs(out, fonts=[few], workers=1)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert prepare_glyphs(out, fonts=[few], workers=1) == [{**row, "written": 0} for row in first]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == times
    with pytest.raises(UserError, match="made with other image_size"):
        prepare_glyphs(out, fonts=[few], workers=1, image_size=40)
    with pytest.raises(UserError, match="made with other codec"):
        prepare_glyphs(out, fonts=[few], workers=1, packed=BlockPack(short=0))
    (out / "val" / "u4e00" / "klee_regular.png").unlink()
    with pytest.raises(UserError, match=r"val should hold 12 images, found 11; delete .*out, it will be written again"):
        prepare_glyphs(out, fonts=[few], workers=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for other in (tmp_path / "other", tmp_path / "other" / "mine.txt"):
        with pytest.raises(UserError, match="holds something else"):
            prepare_glyphs(other, fonts=[few], workers=1)
    assert (tmp_path / "other" / "mine.txt").exists()


@pytest.mark.parametrize("where", ["_draw", "_rows"])
def test_what_is_stopped_leaves_nothing(few, tmp_path, monkeypatch, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, where, stop)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prepare_glyphs(tmp_path / "out", fonts=[few], workers=1)
    assert sorted(tmp_path.iterdir()) == before


def test_packs_hold_the_same_images(few, tmp_path):
    rows = prepare_glyphs(tmp_path / "png", fonts=[few], workers=1)
    for settings in (JpegPack(short=0), BlockPack(short=0)):
        out = tmp_path / settings.codec
        packed = prepare_glyphs(out, fonts=[few], workers=1, packed=settings)
        assert [row["pixels_digest"] for row in packed] == [row["pixels_digest"] for row in rows]
        assert {path.name for path in out.iterdir()} >= {"classes.txt", "pack.json", "glyphs.json", "characters.txt"}
        for split in ("train", "val"):
            found, plain = build_index(out, split), build_index(tmp_path / "png", split)
            assert found.classes == plain.classes
            assert found.labels.tolist() == plain.labels.tolist()
        assert prepare_glyphs(out, fonts=[few], workers=1, packed=settings)[0]["written"] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--image-size", "7"], "--image-size must be from 8 to 512 pixels, found 7"),
        (["--workers", "-1"], "--workers must be at least 0, found -1"),
        (["--designs", "nothing"], "found 'nothing'"),
        (["--fonts", "nowhere"], "--fonts must be a folder of typefaces, but nowhere is none"),
        (["--classes", "kana"], "kana"),
    ],
)
def test_mistakes(capsys, tmp_path, options, text):
    assert text in complaint(capsys, "prepare-glyphs", str(tmp_path / "out"), *options)


def test_less_than_two_characters_are_no_task(few, tmp_path):
    for number, face in enumerate(FEW):
        save(make_face(face.family, face.style, POINTS[:1] if number > 2 else POINTS), few / f"{number:03d}.ttf")
    with pytest.raises(UserError, match=r"found 1 of the 2,965: .* have train 6 and val 1"):
        prepare_glyphs(tmp_path / "out", fonts=[few], workers=1)
    assert not (tmp_path / "out").exists()


def test_a_glyph_that_cannot_be_drawn_is_one_that_the_face_lacks(tmp_path):
    there = drawn(tmp_path, odd={POINTS[4]: [(0.4, -30, 0.6, 1)]})
    assert set(there) == {*POINTS} - {POINTS[4]}
