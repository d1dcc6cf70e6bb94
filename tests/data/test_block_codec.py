"""An image in blocks: its bytes, planes, checksum and views, against the definition written again in numpy, to the bit,
and against Pillow's resize of the decoded planes, to one grey level.
"""

import io
import re

import block_oracle as oracle
import numpy as np
import pytest
import torch
from PIL import Image

from ijckd_fast.data.blocks import (
    BITS,
    LANES,
    STAGES,
    VIEW_COLUMNS,
    Bits,
    blocks_length,
    check_rows,
    checksum,
    encode,
    planes,
    view_stages,
    views,
)

SIDES = [(1, 1), (2, 3), (5, 1), (3, 8), (8, 8), (9, 17), (16, 40), (33, 65), (64, 150), (1, 5000)]
ALL_BITS = [*BITS.values(), Bits(3, 4)]
SHIFT = [float(x) for x in np.float32([0.485, 0.456, 0.406]) * np.float32(255)]
SCALE = [float(x) for x in 1 / (np.float32([0.229, 0.224, 0.225]) * np.float32(255))]


def picture(h: int, w: int, seed: int = 0, noise: float = 30) -> np.ndarray:
    """Slopes, a hard edge and noise: [h, w, 3] uint8."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(h, w)
    base = np.stack([200 * x, 255 * y, 255 * (x + y > 0.7)], -1) + g.normal(0, noise, (h, w, 3))
    return base.clip(0, 255).astype(np.uint8)


def row_of(data: np.ndarray, h: int, w: int, crop: tuple[int, int, int, int], **changed: int) -> dict[str, int]:
    top, left, crop_h, crop_w = crop
    row = dict.fromkeys(VIEW_COLUMNS, 0) | {"length": len(data), "checksum": checksum(data), "height": h, "width": w}
    return row | {"top": top, "left": left, "crop_h": crop_h, "crop_w": crop_w} | changed


def made(files, rows, bits, side, dtype=torch.uint8) -> tuple[np.ndarray, np.ndarray]:
    """Views [B, S, S, 3] and status [B]."""
    table = table_of(rows)
    out = torch.full((len(rows), side, side, 3), 77, dtype=dtype)
    status = views([torch.from_numpy(f) for f in files], table, bits, SHIFT, SCALE, out)
    return (out.numpy() if dtype != torch.bfloat16 else out), status.numpy()


def table_of(rows: list[dict[str, int]]) -> torch.Tensor:
    return torch.tensor([[row[name] for name in VIEW_COLUMNS] for row in rows], dtype=torch.int64)


def crops(g: np.random.Generator, h: int, w: int, side: int) -> list[dict[str, int]]:
    """One crop of every kind: inside, all of it, one pixel, a row, a column; whole images resized and then cut."""
    ch, cw = int(g.integers(1, h + 1)), int(g.integers(1, w + 1))
    y, x = int(g.integers(0, h - ch + 1)), int(g.integers(0, w - cw + 1))
    places = [(y, x, ch, cw), (0, 0, h, w), (h - 1, w - 1, 1, 1), (y, 0, 1, w), (0, x, h, 1)]
    found = [dict(zip(("top", "left", "crop_h", "crop_w"), p, strict=True)) for p in places]
    for short in (side, side + 5):
        nh, nw = (short, max(1, short * w // h)) if h <= w else (max(1, short * h // w), short)
        for top, left in (((nh - side) // 2, (nw - side) // 2), (-3, nw - side + 2), (-side, 0)):
            cut = {"top": top, "left": left, "crop_h": side, "crop_w": side, "resized_h": nh, "resized_w": nw}
            found.append(cut)
    return [c | {"flip": int(g.integers(2))} for c in found]


@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_lengths_and_planes(bits):
    for h, w in SIDES:
        data = encode(picture(h, w), bits)
        assert data.dtype == np.uint8
        assert len(data) == blocks_length(h, w, bits)
        for got, expected in zip(planes(data, h, w, bits), oracle.planes(data, h, w, *bits), strict=True):
            np.testing.assert_array_equal(got, expected)
    h, w = np.array(SIDES).T
    assert blocks_length(h, w, bits).tolist() == [blocks_length(a, b, bits) for a, b in SIDES]


@pytest.mark.parametrize("bits", [3, 4])
def test_every_sample_of_every_pair_of_end_points(bits):
    """Bytes that no encoder makes: end points in any order, all indices."""
    a, b = np.divmod(np.arange(1 << 16), 256)
    ends = np.stack([a, b], -1).astype(np.uint8)  # [65536, 2]
    words = np.random.default_rng(0).integers(0, 256, (1 << 16, 2 * bits), np.uint8)
    plane = np.concatenate([ends, words], 1).ravel() if bits == 3 else np.concatenate([ends.ravel(), words.ravel()])
    h = w = 1024
    rest = blocks_length(h, w, Bits(bits, 3)) - len(plane)
    data = np.concatenate([plane, np.zeros(rest, np.uint8)])
    np.testing.assert_array_equal(planes(data, h, w, Bits(bits, 3))[0], oracle.planes(data, h, w, bits, 3)[0])


@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_encoding_is_near_what_it_encodes(bits):
    for h, w in SIDES:
        rgb = picture(h, w)
        data = encode(rgb, bits)
        high, wide = -(-h // 8), -(-w // 8)
        shapes, decoded = [(2 * high, 2 * wide), (high, wide), (high, wide)], []
        for c, shape in enumerate(shapes):
            got, length = oracle.decoded(data, *shape, bits.chroma if c else bits.luma)
            decoded.append(got)
            data = data[length:]
        for c, expected in enumerate([oracle.luma_beside(rgb, *decoded[1:]), *oracle.planes_of(rgb)[1:]]):
            got, shape = decoded[c], shapes[c]
            blocks = expected.reshape(shape[0], 4, shape[1], 4).swapaxes(1, 2)
            error = np.abs(got - expected).reshape(shape[0], 4, shape[1], 4).swapaxes(1, 2).reshape(*shape, 16)
            step = np.ptp(blocks.reshape(*shape, 16), axis=-1) / ((1 << (bits.chroma if c else bits.luma)) - 1)
            # no worse than the block's least and largest sample as end points, evenly divided
            assert ((error**2).sum(-1) <= 16 * (step / 2 + 1) ** 2).all()
            assert (error[step == 0] == 0).all()


def test_flat_and_grey_images_are_kept():
    for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255), (17, 99, 203)):
        rgb = np.full((13, 21, 3), colour, np.uint8)
        for got, expected in zip(planes(encode(rgb, BITS["6"]), 13, 21, BITS["6"]), oracle.planes_of(rgb), strict=True):
            assert (got == expected[0, 0]).all()
    grey = picture(24, 24)[..., :1].repeat(3, -1)
    _, cb, cr = planes(encode(grey, BITS["6"]), 24, 24, BITS["6"])
    assert (cb == 128).all()
    assert (cr == 128).all()


def test_loss_on_photographs():
    """Of views of two photographs at 6 bits a pixel, beside JPEG's at quality 90."""
    sklearn = pytest.importorskip("sklearn.datasets")
    g, bits, side = np.random.default_rng(1), BITS["6"], 224
    ours, jpeg, squares = [], [], []
    for photo in sklearn.load_sample_images().images:
        short = 256 / min(photo.shape[:2])
        size = tuple(round(n * short) for n in photo.shape[1::-1])
        image = Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)
        rgb, file = np.asarray(image), io.BytesIO()
        image.save(file, "JPEG", quality=90)
        (h, w), data = rgb.shape[:2], encode(rgb, bits)
        for _ in range(10):
            area, ratio = g.uniform(0.08, 1) * h * w, np.exp(g.uniform(np.log(3 / 4), np.log(4 / 3)))
            ch, cw = min(h, round((area / ratio) ** 0.5)), min(w, round((area * ratio) ** 0.5))
            y, x = int(g.integers(0, h - ch + 1)), int(g.integers(0, w - cw + 1))

            def cut(image, box=(x, y, x + cw, y + ch)):
                small = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
                return np.asarray(small, np.float32)

            view = made([data], [row_of(data, h, w, (y, x, ch, cw))], bits, side)[0][0].astype(np.float32)
            ours.append(np.abs(view - cut(image)).mean())
            squares.append(((view - cut(image)) ** 2).mean())
            jpeg.append(np.abs(cut(Image.open(file).convert("RGB")) - cut(image)).mean())
    assert np.mean(ours) < 1.8
    assert np.mean(10 * np.log10(255**2 / np.array(squares))) > 39
    assert np.mean(ours) < np.mean(jpeg)


@pytest.mark.parametrize("length", [0, 1, 7, 64, 65, 128, 1000, 66048])
def test_checksum(length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    assert checksum(data) == oracle.checksum(data.tobytes())
    assert checksum(np.full(length, 255, np.uint8)) == oracle.checksum(b"\xff" * length)


def test_checksum_sees_every_small_change():
    g = np.random.default_rng(0)
    data = g.integers(0, 256, 1 << 13, np.uint8)
    data[:4096] = 0
    seen = {checksum(data)}
    for bit in g.permutation(8 * len(data))[:2000]:
        data[bit // 8] ^= 1 << bit % 8
        seen.add(checksum(data))
        data[bit // 8] ^= 1 << bit % 8
    seen |= {checksum(data[:n]) for n in range(len(data))}
    assert len(seen) == 1 + 2000 + len(data)
    words = data.view(np.uint32)
    words[:2] = 0, 1 << 31  # the least that sums modulo 2^32 would tell apart
    before = checksum(data)
    for other in (1, 16, 512, 1024):  # of the same lane, or of another
        words[[1, 1 + other]] = words[[1 + other, 1]]
        assert checksum(data) != before
        words[[1, 1 + other]] = words[[1 + other, 1]]


@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_views_are_the_definition_s_to_the_bit_and_pillow_s_to_a_level(bits):
    """Every kind of crop of images of any shape, to views of several sides: enlarged, reduced, of few and many taps."""
    g = np.random.default_rng(sum(bits))
    for n, (h, w) in enumerate(SIDES):
        data = encode(picture(h, w, n, noise=80), bits)
        decoded = oracle.planes(data, h, w, *bits)
        for side in (1, 7, 16, 33):
            rows = [row_of(data, h, w, (0, 0, 1, 1)) | crop for crop in crops(g, h, w, side)]
            got, status = made([data], rows, bits, side)
            assert not status.any()
            for row, image in zip(rows, got, strict=True):
                np.testing.assert_array_equal(image, oracle.view(data, row, *bits, side), str(row))
                if row["resized_w"] < 20000:
                    difference = np.abs(image.astype(int) - oracle.pillow_view(decoded, row, side))
                    assert difference.max() <= 1, row


def test_views_of_the_usual_size():
    """256 x 344 to 224, and noise, whose error is the largest."""
    g, bits = np.random.default_rng(5), BITS["6"]
    rgb = g.integers(0, 256, (256, 344, 3), np.uint8)
    rgb[::2, ::2] = 255 * (rgb[::2, ::2] > 127)
    data = encode(rgb, bits)
    decoded = oracle.planes(data, 256, 344, *bits)
    for n, crop in enumerate(crops(g, 256, 344, 224)):
        row = row_of(data, 256, 344, (0, 0, 1, 1)) | crop
        image = made([data], [row], bits, 224)[0][0]
        assert np.abs(image.astype(int) - oracle.pillow_view(decoded, row, 224)).max() <= 1
        if n < 2:
            np.testing.assert_array_equal(image, oracle.view(data, row, *bits, 224))


def test_other_dtypes_are_the_levels_normalised():
    g, bits, (h, w) = np.random.default_rng(0), BITS["7"], (40, 61)
    data = encode(picture(h, w), bits)
    rows = [row_of(data, h, w, (0, 0, 1, 1)) | crop for crop in crops(g, h, w, 35)]
    levels, _ = made([data], rows, bits, 35)
    expected = (levels.astype(np.float32) - np.float32(SHIFT)) * np.float32(SCALE)
    np.testing.assert_array_equal(made([data], rows, bits, 35, torch.float32)[0], expected)
    assert torch.equal(made([data], rows, bits, 35, torch.bfloat16)[0], torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
@pytest.mark.parametrize("lanes", LANES)
def test_vectors_of_every_width_make_the_same_views(lanes, bits):
    """Those that the processor has. What the widest make is held to the definition above."""
    g = np.random.default_rng(lanes)
    for (h, w), side in (((64, 150), 33), ((33, 65), 64), ((200, 300), 8), ((300, 31), 224)):
        data = encode(picture(h, w, noise=80), bits)
        rows = [row_of(data, h, w, (0, 0, 1, 1)) | crop for crop in crops(g, h, w, side)]
        table = torch.tensor([[row[name] for name in VIEW_COLUMNS] for row in rows])
        for dtype in (torch.uint8, torch.float32, torch.bfloat16):
            expected, got = torch.full((2, len(rows), side, side, 3), 77).to(dtype)
            views([torch.from_numpy(data)], table, bits, SHIFT, SCALE, expected)
            stages = view_stages([torch.from_numpy(data)], table, bits, SHIFT, SCALE, got, lanes)
            assert torch.equal(got, expected)
            assert tuple(stages) == STAGES
            assert min(stages.values()) > 0
            again = torch.full_like(got, 77)
            stages = view_stages([torch.from_numpy(data)], table, bits, SHIFT, SCALE, again, lanes, clock=False)
            assert torch.equal(again, expected)
            assert not any(stages.values())


@pytest.mark.parametrize("lanes", LANES)
def test_levels_half_way_between_two_bfloat16_become_the_even_one(lanes):
    bits, (h, w) = BITS["6"], (40, 61)
    data = encode(picture(h, w), bits)
    rows = torch.tensor([[row_of(data, h, w, (3, 5, 30, 40))[name] for name in VIEW_COLUMNS]])
    levels, out = torch.zeros(1, 35, 35, 3, dtype=torch.uint8), torch.zeros(1, 35, 35, 3, dtype=torch.bfloat16)
    views([torch.from_numpy(data)], rows, bits, SHIFT, SCALE, levels)
    for shift in (SHIFT[0], 0.5):  # of 9 bits, where the level is above 128
        view_stages([torch.from_numpy(data)], rows, bits, [shift] * 3, [1.0] * 3, out, lanes)
        assert torch.equal(out, (levels.float() - np.float32(shift)).bfloat16())


def test_a_damaged_image_is_told_and_the_others_are_made():
    bits, (h, w) = BITS["6"], (20, 30)
    good, other = encode(picture(h, w), bits), encode(picture(h, w, 1), bits)
    file = np.concatenate([np.zeros(3, np.uint8), good, other])  # not aligned either
    rows = [row_of(good, h, w, (2, 3, 9, 11), offset=3), row_of(other, h, w, (2, 3, 9, 11), offset=3 + len(good))]
    expected, status = made([np.zeros(0, np.uint8), file], [r | {"file": 1} for r in rows], bits, 12)
    assert status.tolist() == [0, 0]
    file[3 + len(good) + 99] ^= 4
    got, status = made([np.zeros(0, np.uint8), file], [r | {"file": 1} for r in rows], bits, 12)
    assert status.tolist() == [0, 1]
    np.testing.assert_array_equal(got[0], expected[0])
    assert not got[1].any()
    files = [torch.zeros(0, dtype=torch.uint8), torch.from_numpy(file)]
    assert check_rows(files, table_of([r | {"file": 1} for r in rows]), bits, 12).tolist() == [0, 1]


BIG = 1 << 62
WRONG = [
    ({"file": 1}, "names file 1 of 1"),
    ({"file": -1}, "names file -1 of 1"),
    ({"offset": 1}, "must lie within file 0"),
    ({"offset": -1}, "must lie within file 0"),
    ({"offset": BIG}, "must lie within file 0"),
    ({"length": 8}, "the row says 8"),
    ({"height": 28}, "takes"),
    ({"height": 0}, "must lie in [1, 65535]"),
    ({"width": 65536}, "must lie in [1, 65535]"),
    ({"width": BIG}, "must lie in [1, 65535]"),
    ({"top": -1}, "must lie within its image"),
    ({"top": 12}, "must lie within its image"),
    ({"left": BIG}, "must lie within its image"),
    ({"crop_w": 0}, "must lie within its image"),
    ({"crop_h": BIG}, "must lie within its image"),
    ({"flip": 2}, "flip must be 0 or 1"),
    ({"resized_h": 12}, "the sides of the resized image"),
    ({"resized_h": 12, "resized_w": BIG}, "the sides of the resized image"),
    ({"resized_h": 12, "resized_w": -1}, "the sides of the resized image"),
    ({"resized_h": 12, "resized_w": 12}, "must have the view's size"),
    ({"resized_h": 12, "resized_w": 12, "crop_h": 12, "crop_w": 12, "left": BIG}, "must begin within"),
]


@pytest.mark.parametrize(("changed", "text"), WRONG, ids=str)
def test_rows_that_do_not_fit_are_refused_before_anything_is_read(changed, text):
    bits, (h, w) = BITS["6"], (20, 30)
    data = encode(picture(h, w), bits)
    row = row_of(data, h, w, (2, 3, 9, 11))
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        made([data], [row, row | changed], bits, 12)
    assert str(raised.value).startswith("block_views: ")
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        check_rows([torch.from_numpy(data)], table_of([row, row | changed]), bits, 12)
    assert str(raised.value).startswith("block_check: ")


def test_tensors_that_do_not_fit_are_refused():
    rows, out = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 8, 8, 3)
    file, bits = [torch.zeros(9, dtype=torch.uint8)], BITS["6"]
    for arguments, text in (
        (([torch.zeros(9)], rows, bits, SHIFT, SCALE, out), "a file must be uint8, got float32"),
        (([torch.zeros(3, 3, dtype=torch.uint8)], rows, bits, SHIFT, SCALE, out), r"a file must be \[bytes\]"),
        ((file, rows.int(), bits, SHIFT, SCALE, out), r"rows must be int64 \[B, 13\], got int32"),
        ((file, rows[:, :12], bits, SHIFT, SCALE, out), r"rows must be int64 \[B, 13\], got int64 \[2, 12\]"),
        ((file, rows, Bits(5, 3), SHIFT, SCALE, out), "must be 3 or 4, got 5 and 3"),
        ((file, rows, bits, SHIFT[:2], SCALE, out), "must be 3 numbers each, got 2 and 3"),
        ((file, rows, bits, SHIFT, SCALE, out.double()), "out must be uint8, float32 or bfloat16, got float64"),
        ((file, rows, bits, SHIFT, SCALE, out[:1]), r"out must be \[B, S, S, 3\]"),
        ((file, rows, bits, SHIFT, SCALE, out.permute(0, 2, 1, 3)), "out must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match="block_views: .*" + text):
            views(*arguments)
    with pytest.raises(RuntimeError, match=r"block_check: side must lie in \[1, 16384\], got 0"):
        check_rows(file, rows, bits, 0)
    with pytest.raises(RuntimeError, match=r"block_check: rows must be int64 \[B, 13\], got int32"):
        check_rows(file, rows.int(), bits, 8)
    with pytest.raises(RuntimeError, match="block_encode: rgb must be uint8, got float64"):
        encode(np.zeros((4, 4, 3)), bits)
    with pytest.raises(RuntimeError, match=r"block_encode: rgb must be \[h, w, 3\], got \[4, 4\]"):
        encode(np.zeros((4, 4), np.uint8), bits)
    with pytest.raises(RuntimeError, match=r"block_encode: the image's sides must lie in \[1, 65535\], got 0 x 4"):
        encode(np.zeros((0, 4, 3), np.uint8), bits)
    with pytest.raises(RuntimeError, match="block_planes: an image of 4 x 4 pixels takes 48 bytes, got 47"):
        planes(np.zeros(47, np.uint8), 4, 4, bits)


ENCODED = {"6": -7261582203610411193, "7": 8923461966453765749, "7.5": -5878798291404186218}


@pytest.mark.parametrize(("key", "expected"), ENCODED.items())
def test_the_same_bytes_on_every_machine(key, expected):
    """Whatever instruction set its processor has. What a view's bits are is held to the definition above."""
    y, x = np.mgrid[:70, :99]
    rgb = np.stack([(x * x + 31 * y) % 256, (7 * x * y) % 251, (x + y * y) % 239], -1).astype(np.uint8)
    assert checksum(encode(rgb, BITS[key])) == expected
