"""Packs of images in blocks: their files, their index, and what damage does to them."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import damages
from image_tree import write_odd_tree, write_split
from PIL import Image

from ijckd_fast import cli
from ijckd_fast.data import Augment, BatchPlan, EvalPlan, Index, TrainPlan, build_index, make_loader
from ijckd_fast.data.blocks import BITS, Bits, checksum, encode, layout, open_file, planes, write_file
from ijckd_fast.data.index import scan, summarize
from ijckd_fast.data.load.planes import arrange_planes
from ijckd_fast.data.prepare import BlockPack, JpegPack, pack, pack_blocks
from ijckd_fast.data.prepare.pack_jpeg import encode as encode_jpeg
from ijckd_fast.data.sources import listing
from ijckd_fast.errors import UserError
from ijckd_fast.files import digest

SMALL = BlockPack(short=40, shard_gb=9000 / 2**30)
VIEW = Augment(image_size=24, eval_resize=28)
HEADER, RECORD = 64, 40  # bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """14 training images, one of each odd kind among them, and 4 for validation."""
    return write_odd_tree(tmp_path_factory.mktemp("data"), 5)


def resized(index: Index, i: int) -> Image.Image:
    """Image i as it is to be in the pack, before it is encoded."""
    image = Image.open(index.absolute(i)).convert("RGB")
    short = min(image.size)
    if short <= 40:
        return image
    size = [40 if side == short else round(side * 40 / short) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def resummed(out: Path) -> None:
    """Makes the checksums of the files those of what is there now."""
    for split in ("train", "val"):
        names = [f"{split}/{path.name}" for path in sorted((out / split).iterdir())] + ["classes.txt"]
        (out / f"{split}.b2sums").write_text("".join(f"{digest(out / name)}  {name}\n" for name in sorted(names)))


def complaint(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def documented_checksum(data: bytes) -> int:
    """As docs/pack.md has it."""
    words = np.frombuffer(data.ljust(-(-len(data) // 64) * 64, b"\0"), "<u4").reshape(-1, 16)
    h, modulus = len(data), 1 << 64
    for lane in words.T.tolist():
        a = b = 0
        for word in lane:
            a += word
            b += a
        h = (h ^ (b + (a << 32)) % modulus) * 0x9E3779B97F4A7C15 % modulus
        h ^= h >> 32
    return h - modulus if h >> 63 else h


# --- what is in a pack ------------------------------------------------------------------------------------------------


def test_a_file_is_what_docs_pack_md_says(data, whole):
    index = build_index(data, "train")
    rows = []
    for path in sorted((whole / "train").iterdir()):
        content = path.read_bytes()
        magic, version, luma, chroma, zero, count, table, first, length, zeros = struct.unpack_from(
            "<8sIBBHQQQQ8s", content
        )
        assert (magic, version, luma, chroma, zero, table, zeros) == (b"ijblocks", 1, 3, 3, 0, HEADER, bytes(8))
        assert length == len(content)
        end = HEADER + RECORD * count
        assert first == -(-end // 64) * 64
        check = hashlib.blake2b(content[:56] + content[HEADER:end], digest_size=8).digest()
        assert content[56:HEADER] == check
        filled = bytearray(length)
        for at in range(HEADER, end, RECORD):
            offset, value, size, number, label, width, height, zero = struct.unpack_from("<QqIIIIII", content, at)
            blocks = content[offset : offset + size]
            assert (offset, zero) == (first, 0)
            assert size == 8 * (6 * -(-width // 8) * -(-height // 8))
            assert value == checksum(np.frombuffer(blocks, np.uint8)) == documented_checksum(blocks)
            filled[offset : offset + size] = blocks
            rows.append((number, label, (width, height), blocks))
            first += -(-size // 64) * 64
        assert first == length
        assert content[end:] == filled[end:]  # nothing but zeros between
        assert sum(-(-len(blocks) // 64) * 64 for *_, blocks in rows[-count:]) <= 9000 or count == 1
    assert [row[:2] for row in rows] == list(enumerate(index.labels.tolist()))
    for number, _, size, blocks in rows:
        image = resized(index, number)
        assert image.size == size
        assert blocks == encode(np.asarray(image), BITS["6"]).tobytes()
    assert len(list((whole / "train").iterdir())) > 3


def test_validation_images_are_made_smaller_too_and_the_loss_is_stated(data, tmp_path, capfd):
    options = ["--codec", "blocks", "--short", "40", "--bits", "7", "--workers", "1"]
    assert cli.main(["pack", str(data), str(tmp_path / "out"), *options]) == 0
    text = capfd.readouterr().out
    assert "JPEGs of quality 90 instead" in text
    assert f"of the originals: ijckd-fast evaluate RUN --data-dir {data}" in text
    train, val = json.loads(text.splitlines()[-1])["rows"]
    assert (train["codec"], train["images"], train["copy_images"], train["encode_images"]) == ("blocks", 14, 0, 7)
    assert (val["images"], val["copy_images"], val["resize_images"]) == (4, 0, 4)
    state = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert state["splits"] == {"train": train, "val": val}
    assert (state["settings"]["codec"], state["settings"]["bits"], state["settings"]["short"]) == ("blocks", 7, 40)
    file = open_file(str(tmp_path / "out" / "val" / "shard-000000.blocks"))
    assert file.bits == BITS["7"]
    index = build_index(data, "val")
    apart, encoding, by_jpeg, jpeg_encoding = [], [], [], []
    for i in range(4):
        original = Image.open(index.absolute(i))
        small = resized(index, i)
        assert (file.table["width"][i], file.table["height"][i]) == small.size
        width, height = original.size
        side = (int(40 * width / min(original.size)), int(40 * height / min(original.size)))
        left, top = (round((n - 35) / 2) for n in side)

        def view(image, side=side, left=left, top=top):
            crop = (left, top, left + 35, top + 35)
            return np.asarray(image.resize(side, Image.Resampling.BILINEAR).crop(crop), np.float64)

        channels = []
        for plane, step in zip(planes(file.blocks(i), *small.size[::-1], file.bits), (1, 2, 2), strict=True):
            box = (0, 0, small.width / step, small.height / step)
            channels.append(Image.fromarray(plane.astype(np.float32)).resize(side, Image.Resampling.BILINEAR, box))
        y, cb, cr = (np.asarray(channel)[top : top + 35, left : left + 35] for channel in channels)
        red_to_blue = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
        packed = np.stack(red_to_blue, 2).round().clip(0, 255)
        apart.append(np.abs(view(original) - packed).mean())
        encoding.append(np.square(view(small) - packed).mean())
        (tmp_path / "q90.jpg").write_bytes(encode_jpeg(small, 90))
        jpeg = view(Image.open(tmp_path / "q90.jpg"))
        by_jpeg.append(np.abs(view(original) - jpeg).mean())
        jpeg_encoding.append(np.abs(view(small) - jpeg).mean())
    assert val["view"] == [40, 35]
    assert val["mean_abs_difference"] == pytest.approx(np.mean(apart), rel=1e-3)
    assert val["encoding_psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.mean(encoding)), abs=0.02)
    assert val["jpeg_90_mean_abs_difference"] == pytest.approx(np.mean(by_jpeg), rel=1e-3)
    assert val["jpeg_90_encoding_mean_abs_difference"] == pytest.approx(np.mean(jpeg_encoding), rel=1e-3)


def test_files_are_cut_by_the_sizes_alone():
    sizes = np.full((10, 2), 8, np.int32)  # 48 bytes each, 64 with what aligns them
    for room, expected in ((64, range(10)), (1, range(10)), (191, range(0, 10, 2)), (192, range(0, 10, 3)), (1e9, [0])):
        assert list(BlockPack(shard_gb=room / 2**30).starts(sizes)) == list(expected)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"short": 31}, "at least 32 pixels, or 0 to keep sizes, found 31"),
        ({"bits": 8}, r"--bits .* one of 6, 7, 7\.5, found 8"),
        ({"bits": float("nan")}, "found nan"),
        ({"shard_gb": 0}, "must be above 0, found 0"),
        ({"shard_gb": float("nan")}, "must be above 0, found nan"),
    ],
    ids=str,
)
def test_impossible_settings(setting, why):
    with pytest.raises(UserError, match=why):
        BlockPack(**setting)


def test_options_of_the_other_codec_are_refused(data, tmp_path, capfd):
    for codec, option, other in (
        ("blocks", "quality", "bits"),
        ("blocks", "shard-images", "shard-gb"),
        ("jpeg", "bits", "quality"),
        ("jpeg", "shard-gb", "shard-images"),
    ):
        assert cli.main(["pack", str(data), str(tmp_path / "out"), "--codec", codec, f"--{option}", "6"]) == 2
        text = capfd.readouterr().err
        assert f"--{option} goes with --codec " in text
        assert f"has --{other} instead" in text
    assert not (tmp_path / "out").exists()


def test_a_pack_of_other_images_is_refused(out, tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, {"cat": 5, "dog": 5})
    text = complaint(lambda: pack(tmp_path / "data", out, SMALL, workers=1))
    assert "the train images of then (other files, sizes or classes) where those of now are expected" in text


def test_a_pack_of_the_other_codec_is_refused_and_may_be_deleted(data, out):
    text = complaint(lambda: pack(data, out, JpegPack(short=40), workers=1))
    assert "holds a pack with codec blocks where jpeg is expected. To continue it" in text
    text = complaint(lambda: pack(data, out, BlockPack(short=40, bits=7), workers=1))
    assert "bits 6.0 where 7.0 is expected" in text
    assert "quality" not in text
    pack(data, out, JpegPack(short=40), workers=1, overwrite=True)
    assert {path.suffix for path in out.glob("*/shard-*")} == {".tar"}
    state = json.loads((out / "pack.json").read_text())
    assert state["settings"].pop("codec") == "jpeg"
    del state["check"]
    (out / "pack.json").write_text(json.dumps(state))
    assert "codec jpeg where blocks" in complaint(
        lambda: pack(data, out, SMALL, workers=1)
    )  # from before there were two
    (row, _) = pack(data, out, JpegPack(short=40), workers=1)
    assert row["kept"] == 1


def test_an_encoder_that_spoils_an_image_is_found_out(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_blocks, "encode", lambda rgb, bits: encode(255 - rgb, bits))
    text = complaint(lambda: pack(data, tmp_path / "out", SMALL, workers=1))
    assert "000.jpg must decode to nearly what was encoded" in text
    assert not list((tmp_path / "out" / "train").iterdir())


@pytest.mark.parametrize("at", [-3000, 8, 100])
def test_a_disk_that_spoils_a_file_is_found_out(data, tmp_path, monkeypatch, at):
    def spoiling(path, *more):
        table = write_file(path, *more)
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        return table

    monkeypatch.setattr(pack_blocks, "write_file", spoiling)
    with pytest.raises(UserError, match=r"shard-000000\.blocks does not read back as it was packed \(.*same command"):
        pack(data, tmp_path / "out", SMALL, workers=1)


def test_the_encoder_is_the_one_that_is_written_down():
    """Where this digest changes, pack_blocks.ENCODER goes up: a pack that is continued would have two encoders."""
    y, x = np.mgrid[0:64, 0:72]
    rgb = np.stack([(3 * x + 5 * y) % 256, (x * y) % 256, 255 - (x * x) % 256], 2).astype(np.uint8)
    found = hashlib.blake2b(b"".join(encode(rgb, bits).tobytes() for bits in BITS.values()), digest_size=8)
    assert (pack_blocks.ENCODER, found.hexdigest()) == (2, "3a555b53ba4aa097")


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_is_what_the_tables_say(data, whole, checked):
    source, found = build_index(data, "train"), scan(whole, "train", refresh=True)
    index = found.index
    assert (checked[len(source) :], found.opened) == ([], 0)  # no image of the pack
    assert [path.rpartition("/")[2] for path in index.paths] == [f"{i:09d}" for i in range(14)]
    assert (index.classes, index.labels.tolist()) == (source.classes, source.labels.tolist())
    assert index.sizes.tolist() == [list(resized(source, i).size) for i in range(14)]
    assert (index.blocks, source.blocks) == (BITS["6"], None)
    for i in range(14):
        place = index.place(i)
        y, cb, _ = place.planes()
        assert np.abs(y - np.asarray(resized(source, i).convert("L"), np.float64)).mean() < 4
        assert (place.width, place.height) == resized(source, i).size
        assert cb.shape == (-(-place.height // 2), -(-place.width // 2))
        assert place.open().read() == place.read() == place.read()
    assert summarize(found, 1.0)["formats"] == {"blocks of 6 bits a pixel": 14}
    assert index.by_pillow().sum() == 0
    again = build_index(whole, "train")  # from what was kept
    assert (again.hash, again.blocks) == (index.hash, index.blocks)
    assert np.array_equal(again.members, index.members)
    half = index.subset(per_class=2, label_noise=0.5)
    assert (len(half), half.blocks) == (4, index.blocks)
    assert half.place(3) == index.place(list(index.paths).index(half.paths[3]))


def test_many_made_up_entries(tmp_path):
    (tmp_path / "train").mkdir()
    sizes = np.stack([np.arange(1, 3001) % 40 + 1, np.arange(3000) % 9 + 1], 1)
    for n in range(3):
        ids = np.arange(1000 * n, 1000 * n + 1000)
        blocks = ((row, np.zeros(size, np.uint8)) for row, size in enumerate(layout(sizes[ids], BITS["7.5"]).lengths))
        path = tmp_path / "train" / f"shard-{n:06d}.blocks"
        write_file(path, BITS["7.5"], ids, ids % 7, sizes[ids], blocks)
    (tmp_path / "classes.txt").write_text("".join(f"class {k}\n" for k in range(7)))
    (tmp_path / "val").mkdir()
    resummed(tmp_path)
    index = build_index(tmp_path, "train")
    assert index.labels.tolist() == [i % 7 for i in range(3000)]
    assert np.array_equal(index.sizes, sizes)
    assert index.classes == tuple(f"class {k}" for k in range(7))
    assert index.members[:, 0].tolist() == [i // 1000 for i in range(3000)]
    assert index.paths[2999] == "train/shard-000002.blocks/000002999"
    assert {-1, 1} <= set(np.sign(index.members[:, 3]).tolist())  # 64 bits, with a sign


def test_what_reads_image_files_is_refused(data, whole, tmp_path):
    index = build_index(whole, "train")
    text = complaint(lambda: make_loader("dali", EvalPlan(index, VIEW, 4)))
    assert "train holds a block pack; leave --data-backend out, or choose blocks or pillow" in text
    assert "found shards already that pack has made" in complaint(
        lambda: pack(whole, tmp_path / "again", SMALL, workers=1)
    )
    (tmp_path / "labels.csv").write_text("a.jpg,cat\n")
    text = complaint(lambda: build_index(whole, "val", labels=tmp_path / "labels.csv"))
    assert "there are files of a block pack ('shard-000000.blocks')" in text


@pytest.mark.parametrize("crop_padding", [0, 4])
def test_pillow_shows_nearly_what_the_originals_show(tmp_path, crop_padding):
    """Of images that are not made smaller: the same crops of the same sizes."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        write_split(data, split, {"cat": 4, "dog": 4})
    pack(data, tmp_path / "out", BlockPack(short=0, bits=7.5), workers=1)
    view = Augment(image_size=24, eval_resize=28, crop_padding=crop_padding)
    for split in ("train", "val"):
        batches = []
        for root in (data, tmp_path / "out"):
            index = build_index(root, split)
            plan = EvalPlan(index, view, 8) if split == "val" else TrainPlan(index, view, 8, seed=0)
            with make_loader("pillow", plan, threads=1, stop=1) as loader:
                batches.extend(loader)
        assert batches[0].ids.tolist() == batches[1].ids.tolist()
        std = np.array(view.std)[:, None, None]
        apart = np.abs((batches[0].images - batches[1].images).numpy() * std * 255).mean((1, 2, 3))
        assert apart.max() < 6


def one_view(size: tuple[int, int], anchor: tuple[int, int], shape: tuple[int, int], resize=None, flip=0, side=16):
    """A plan of one image."""
    ones = {"ids": np.zeros(1, np.int64), "kept": np.ones(1, bool), "labels": np.zeros(1, np.int64)}
    rows = {name: np.array([value], np.int32) for name, value in (("size", size), ("anchor", anchor), ("shape", shape))}
    resize = None if resize is None else np.array([resize], np.int32)
    return BatchPlan(paths=["x"], **ones, **rows, flip=np.array([flip], np.int32), resize=resize, image_size=side)


def test_only_the_crop_enters_a_training_view():
    rng = np.random.default_rng(0)
    y, cb, cr = (rng.integers(0, 256, shape).astype(np.uint8) for shape in ((33, 41), (17, 21), (17, 21)))
    plan = one_view((33, 41), (7, 9), (5, 11))
    expected = arrange_planes((y, cb, cr), plan, 0)
    others = y.copy(), cb.copy(), cr.copy()
    for plane, (rows, columns) in zip(others, [((7, 12), (9, 20))] + [((3, 6), (4, 10))] * 2, strict=True):
        kept = plane[slice(*rows), slice(*columns)].copy()
        plane[:] = 255 - plane
        plane[slice(*rows), slice(*columns)] = kept
    assert np.array_equal(arrange_planes(others, plan, 0), expected)
    flipped = arrange_planes((y, cb, cr), one_view((33, 41), (7, 9), (5, 11), flip=1), 0)
    assert np.array_equal(flipped[:, ::-1], expected)


def test_a_cut_of_the_resized_image_is_that_of_the_whole():
    """Where all of an image is resized first, only what is cut is made; black outside."""
    rng = np.random.default_rng(1)
    planes_ = [rng.integers(0, 256, shape).astype(np.uint8) for shape in ((33, 41), (17, 21), (17, 21))]
    whole = arrange_planes(planes_, one_view((33, 41), (0, 0), (60, 60), (60, 60), side=60), 0).astype(int)
    padded = np.pad(whole, ((9, 9), (9, 9), (0, 0)))
    for top, left in ((-9, -9), (-3, 20), (20, 50), (44, 44), (60, 0), (-16, 3)):
        part = arrange_planes(planes_, one_view((33, 41), (top, left), (16, 16), (60, 60)), 0).astype(int)
        expected = np.zeros((16, 16, 3), int)
        inside = padded[max(top + 9, 0) : top + 25, left + 9 : left + 25]
        expected[max(-9 - top, 0) :][: len(inside), : inside.shape[1]] = inside
        assert np.abs(part - expected).max() <= 1


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damage_is_named_with_its_offset(whole, tmp_path):
    path = tmp_path / "x.blocks"
    sound = (whole / "train" / "shard-000001.blocks").read_bytes()
    path.write_bytes(sound)
    count = len(open_file(str(path)).table)
    end = HEADER + RECORD * count
    first = int(open_file(str(path)).table["offset"][0])

    def said(content: bytes) -> str:
        path.write_bytes(content)
        text = complaint(lambda: open_file(str(path)))
        assert str(path) in text
        assert "run the same ijckd-fast pack command again" in text or "version" in text
        return text

    def flipped(at: int) -> bytes:
        content = bytearray(sound)
        content[at] ^= 1
        return bytes(content)

    assert "at byte 0 (it ends there, inside its header" in said(b"")
    assert "at byte 63 (it ends there" in said(sound[:63])
    assert f"its table fills bytes 64 to {end}, and the file has {end - 1}" in said(sound[: end - 1])
    assert f"it has {first + 5} bytes where {len(sound)} were packed, inside or before image" in said(
        sound[: first + 5]
    )
    assert f"it has {len(sound) + 1} bytes where" in said(sound + b"\0")
    assert "at byte 0 (it begins with b'hjblocks' where b'ijblocks' is expected" in said(flipped(0))
    text = said(flipped(8))
    assert "must be of version 1 of the block format, found version 0 (at byte 8)" in text
    assert "--overwrite" in text
    for at in (12, 13, 14, 33, 47, 49, 55, 56, 63, 64, end - 1):
        assert f"at byte 56 (the check value of header and table, bytes 0 to {end}" in said(flipped(at)), at
    assert "fills bytes 65 to" in said(flipped(24))
    for how, content in damages(sound[:end], 5):
        said(content + sound[end:]), how


@pytest.mark.parametrize(
    ("field", "change", "why"),
    [
        ("width", 0, "row 1 of the table has an image without pixels"),
        ("offset", 64, "row 1 of the table has an image that does not begin where"),
        ("length", 8, "row 1 of the table has a length that is not its size's"),
        ("id", 0, "row 1 of the table has an id out of order"),
        ("height", 9, "row 2 of the table has an image that does not begin where"),
    ],
)
def test_a_table_that_was_altered_with_its_check_value(tmp_path, field, change, why):
    path, sizes = tmp_path / "x.blocks", np.array([[8, 8]] * 3)
    blocks = [(row, np.zeros(48, np.uint8)) for row in range(3)]
    write_file(path, BITS["6"], np.arange(3), np.zeros(3, int), sizes, blocks)
    content, table = path.read_bytes(), open_file(str(path)).table.copy()
    table[field][1] = change
    body = content[:56], table.tobytes()
    check = hashlib.blake2b(b"".join(body), digest_size=8).digest()
    path.write_bytes(body[0] + check + body[1] + content[HEADER + 3 * RECORD :])
    assert why in complaint(lambda: open_file(str(path)))


def test_bits_that_are_not_known(tmp_path):
    write_file(tmp_path / "x", Bits(3, 4), np.arange(1), np.arange(1), np.array([[8, 8]]), [])
    text = complaint(lambda: open_file(str(tmp_path / "x")))
    assert "at byte 12 (3 bits of luma and 4 of chroma where 3 and 3" in text


def test_a_damaged_file_is_refused_when_it_is_indexed_and_made_again(data, whole, out):
    path = out / "train" / "shard-000001.blocks"
    sound = path.read_bytes()
    for how, content in damages(sound, 6, 8):
        shutil.rmtree(out / ".ijckd-index", ignore_errors=True)
        path.write_bytes(content)
        text = complaint(lambda: build_index(out, "train"))
        assert f"{path} is damaged" in text, how
        assert "run the same ijckd-fast pack command again" in text
    record = open_file(str(whole / "train" / path.name)).table[-1]
    content = bytearray(sound)
    content[record["offset"] + record["length"] // 2] ^= 16
    path.write_bytes(content)
    text = complaint(lambda: build_index(out, "train"))
    assert f"{path} is damaged at byte {record['offset']} (image {record['id']}: " in text
    with pytest.warns(UserWarning, match=r"shard-000001\.blocks was not what its checksum is of .*made again"):
        train, _ = pack(data, out, SMALL, workers=1)
    assert path.read_bytes() == sound
    assert train["kept"] == train["shards"] - 1


def test_an_image_that_a_disk_damages_after_it_was_indexed_is_left_out_by_name(out, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", -(1 << 62))
    monkeypatch.setattr(listing, "_as_before", lambda root, stamps: bool(stamps))

    def seen() -> tuple[list[int], bytes]:
        with make_loader("pillow", EvalPlan(build_index(out, "train"), VIEW, 14), threads=1) as loader:
            (batch,) = loader
        return batch.ids.tolist(), batch.images.numpy().tobytes()

    expected, path = seen(), out / "train" / "shard-000001.blocks"
    sound, table = path.read_bytes(), open_file(str(path)).table
    for record in table:
        begin, end = int(record["offset"]), int(record["offset"] + record["length"])
        for at in (begin, end - 1):
            content = bytearray(sound)
            content[at] ^= 128
            path.write_bytes(content)
            with pytest.warns(
                UserWarning, match=rf"{record['id']:09d} cannot be read any more .*at bytes {begin} to {end}"
            ):
                assert seen()[0] == [i for i in range(14) if i != record["id"]]
    path.write_bytes(sound[: int(table["offset"][-1]) + 3])
    with pytest.warns(UserWarning, match=rf"ends at byte {table['offset'][-1] + 3}, before the image at bytes"):
        assert seen()[0] == [i for i in range(14) if i != table["id"][-1]]
    path.write_bytes(sound)
    assert seen() == expected
    path = out / "train" / "shard-000000.blocks"  # whose header every start reads, for the bits
    content = bytearray(path.read_bytes())
    content[12] ^= 7
    path.write_bytes(content)
    assert f"{path} is damaged at byte 56" in complaint(seen)


def test_packs_that_are_put_together_are_named(out):
    names = sorted(path.name for path in (out / "train").iterdir())
    shutil.copy(out / "train" / names[0], out / "train" / "shard-000099.blocks")
    assert "shard-000099.blocks has no checksum in" in complaint(lambda: build_index(out, "train"))
    (out / "train" / "shard-000099.blocks").unlink()
    (out / "train" / names[2]).rename(out / "away")
    assert f"names train/{names[2]}, which is not there" in complaint(lambda: build_index(out, "train"))
    (out / "away").rename(out / "train" / names[2])
    sizes, blocks = np.array([[8, 8]]), [(0, np.zeros(56, np.uint8))]
    write_file(out / "train" / names[1], BITS["7"], np.array([3]), np.array([0]), sizes, blocks)
    resummed(out)
    text = complaint(lambda: build_index(out, "train"))
    assert f"{names[1]} must have the bits of the other files of its pack, luma 3 and chroma 3, found 4 and 3" in text
    write_file(out / "train" / names[1], BITS["6"], np.array([3]), np.array([7]), sizes, [(0, np.zeros(48, np.uint8))])
    resummed(out)
    assert "have the label '7', which is none of the 2 classes" in complaint(lambda: build_index(out, "train"))


def test_checksums_and_class_names_that_are_gone_are_named(out):
    (out / "classes.txt").unlink()
    assert "names classes.txt, which is not there" in complaint(lambda: build_index(out, "train"))
    (out / "train.b2sums").unlink()
    text = complaint(lambda: build_index(out, "train"))
    assert f"{out / 'train.b2sums'}, the checksums of what is in {out / 'train'}, is not there: run the same" in text


@pytest.mark.filterwarnings("ignore:.* cannot be read any more")
def test_an_image_that_is_left_out_keeps_its_place(data, whole, tmp_path):
    root, out = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "out"
    index = build_index(root, "train")
    gone = Path(index.absolute(4))
    state, content = gone.stat(), gone.read_bytes()
    gone.write_bytes(bytes(len(content)))
    shutil.os.utime(gone, ns=(state.st_atime_ns, state.st_mtime_ns))
    train, _ = pack(root, out, SMALL, workers=1)
    assert (train["images"], [Path(path).name for path, _ in train["left_out"]]) == (13, [gone.name])
    packed = build_index(out, "train")
    assert [path[-9:] for path in packed.paths] == [f"{i:09d}" for i in range(14) if i != 4]
    assert packed.sizes.tolist() == build_index(whole, "train").sizes[[i for i in range(14) if i != 4]].tolist()
    gone.write_bytes(content)
    shutil.os.utime(gone, ns=(state.st_atime_ns, state.st_mtime_ns))
    again, _ = pack(root, out, SMALL, workers=1)
    assert (again["images"], again["kept"]) == (14, again["shards"] - 1)
    assert {path.name: path.read_bytes() for path in (out / "train").iterdir()} == {
        path.name: path.read_bytes() for path in (whole / "train").iterdir()
    }


def test_an_image_with_a_side_that_blocks_have_no_room_for(tmp_path):
    write_split(tmp_path / "data", "train", {"cat": 1, "dog": 1})
    Image.new("RGB", (65536, 1)).save(tmp_path / "data" / "train" / "cat" / "wide.png")
    with pytest.warns(UserWarning, match=r"wide\.png .*65536x1 pixels in the pack, whose images have 65535 at most"):
        pack(tmp_path / "data", tmp_path / "out", SMALL, splits=["train"], workers=1)
    assert len(build_index(tmp_path / "out", "train")) == 2
