"""The executors' pixels: torchvision's, and the same from both."""

import numpy as np
import pytest
import torch
import torchvision
from image_tree import photo
from loading import AUGMENT, EXECUTORS, batches, pixels
from PIL import Image
from torchvision.transforms import functional

from ijckd_fast.data import (
    Augment,
    EvalPlan,
    Index,
    TrainPlan,
    build_index,
)

PADDED = Augment(image_size=24, eval_resize=28, crop_padding=5)


def test_pillow_evaluation_is_torchvisions(tmp_path):
    """Odd sizes, enlarged and shrunk, shorter side already right: equal to the last bit before normalising."""
    shapes = [(28, 28), (28, 77), (60, 28), (13, 20), (91, 37), (101, 333), (29, 30), (200, 201), (57, 56)]
    for n, (height, width) in enumerate(shapes):
        folder = tmp_path / "val" / f"c{n}"
        folder.mkdir(parents=True)
        photo(height, width, n).save(folder / "x.png")
    index = build_index(tmp_path, "val")
    transforms = torchvision.transforms
    chain = transforms.Compose([transforms.Resize(28), transforms.CenterCrop(24), transforms.PILToTensor()])
    (batch,) = batches("pillow", EvalPlan(index, AUGMENT, 100))
    want = np.stack([chain(Image.open(index.absolute(i))).permute(1, 2, 0).numpy() for i in range(len(shapes))])
    assert np.abs(pixels(batch.images) - want).max() < 1e-3
    normalise = transforms.Normalize(AUGMENT.mean, AUGMENT.std)
    want_float = normalise(torch.from_numpy(want).permute(0, 3, 1, 2) / 255)
    assert (batch.images - want_float).abs().max() < 1e-5
    (dali,) = batches("dali", EvalPlan(index, AUGMENT, 100))
    assert np.abs(pixels(dali.images) - want).max() < 1.1


def test_pillow_training_is_torchvisions(indexed):
    plan = TrainPlan(indexed, AUGMENT, 30, seed=3)
    (batch,) = batches("pillow", plan, stop=1)
    numbers = plan.batch(0)
    flips = 0
    for i, path in enumerate(numbers.paths):
        (y, x), (h, w) = numbers.anchor[i].tolist(), numbers.shape[i].tolist()
        with Image.open(path) as image:
            want = functional.resized_crop(image.convert("RGB"), y, x, h, w, [24, 24])
        if numbers.flip[i]:
            want = functional.hflip(want)
            flips += 1
        assert np.abs(pixels(batch.images)[i] - np.asarray(want)).max() < 1e-3
    assert 5 < flips < 25


SHAPES = [(32, 32), (32, 32), (32, 47), (40, 32), (64, 48), (20, 31), (200, 203)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Index:
    """A PNG of each of SHAPES (h, w)."""
    folder = tmp_path_factory.mktemp("small") / "train" / "all"
    folder.mkdir(parents=True)
    for n, (height, width) in enumerate(SHAPES):
        photo(height, width, n).save(folder / f"{n}.png")
    return build_index(folder.parent.parent, "train")


class _RandomCrop(torchvision.transforms.RandomCrop):
    """torchvision's own, at given places instead of its draws."""

    place: tuple[int, int]

    def get_params(self, img, output_size):
        return (*self.place, *output_size)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_padded_crops_are_torchvisions(small, backend):
    """RandomCrop(32, padding=4) after Resize(32): images of image_size and others, several epochs, flips included."""
    plan = TrainPlan(small, Augment(image_size=32, eval_resize=32, crop_padding=4), len(SHAPES), seed=5)
    places, flips = set(), 0
    for step, batch in enumerate(batches(backend, plan, stop=40)):
        numbers = plan.batch(step)
        got = pixels(batch.images)
        for i, path in enumerate(numbers.paths):
            crop = _RandomCrop(32, padding=4)
            y, x = (numbers.anchor[i] + 4).tolist()  # torchvision counts from the border's corner
            crop.place = y, x
            with Image.open(path) as image:
                want = np.asarray(crop(torchvision.transforms.Resize(32)(image)))
            if numbers.flip[i]:
                want = want[:, ::-1]
                flips += 1
            exact = backend == "pillow" or min(numbers.size[i]) == 32
            assert np.abs(got[i] - want).max() < 1e-3 if exact else np.abs(got[i] - want).mean() < 0.5
            black = np.zeros((32, 32), bool)  # by hand: the rows and columns of the border
            height, width = numbers.resize[i].tolist()
            black[: max(0, 4 - y)], black[max(0, height + 4 - y) :] = True, True
            black[:, : max(0, 4 - x)], black[:, max(0, width + 4 - x) :] = True, True
            black = black[:, ::-1] if numbers.flip[i] else black
            assert np.abs(got[i][black]).max(initial=0) < 1e-3
            places |= {(y, x)} if tuple(numbers.size[i]) == (32, 32) else set()
    assert len(places) > 40  # of 81, by 80 draws
    assert {0, 8} <= {y for y, _ in places} & {x for _, x in places}  # the outermost ones too
    assert 100 < flips < 180


def test_dali_s_padded_crops_are_pillow_s(small, indexed):
    """The same where nothing is resized, by rounding apart where it is."""
    augment = Augment(image_size=32, eval_resize=32, crop_padding=4)
    for index, batch_size in ((small, len(SHAPES)), (indexed, 20)):
        plan = TrainPlan(index, augment, batch_size, seed=1)
        for dali, pillow in zip(*(batches(backend, plan, stop=12) for backend in EXECUTORS), strict=True):
            same = torch.from_numpy(index.sizes[dali.ids].min(1) == 32)
            # but for the last bit of the normalisation
            torch.testing.assert_close(dali.images[same], pillow.images[same], rtol=0, atol=2e-6)
            assert np.abs(pixels(dali.images) - pixels(pillow.images)).mean((1, 2, 3)).max() < 0.6
            assert torch.equal(dali.ids, pillow.ids)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_evaluation_of_images_of_its_size_leaves_their_pixels(small, backend):
    augment = Augment(image_size=32, eval_resize=32, crop_padding=4)
    (batch,) = batches(backend, EvalPlan(small, augment, len(SHAPES)))
    for i in (0, 1):
        with Image.open(small.absolute(i)) as image:
            assert np.abs(pixels(batch.images)[i] - np.asarray(image)).max() < 1e-3


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Index:
    """One class per kind of file that is unusual and fine."""
    root = tmp_path_factory.mktemp("odd")
    rotated = Image.Exif()
    rotated[274] = 6
    picture = photo(120, 160, 3)
    gray16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    files = {
        "jpeg": lambda path: picture.save(path, quality=90),
        "progressive": lambda path: picture.save(path, quality=90, progressive=True),
        "fullchroma": lambda path: picture.save(path, quality=90, subsampling=0),
        "grayscale": lambda path: picture.convert("L").save(path),
        "cmyk": lambda path: picture.convert("CMYK").save(path),
        "png": lambda path: picture.save(path, format="PNG"),
        "alpha": lambda path: picture.convert("RGBA").save(path, format="PNG"),
        "palette": lambda path: picture.quantize(64).save(path, format="PNG"),
        "gray16": lambda path: gray16.save(path, format="PNG"),
        "webp": lambda path: picture.save(path, format="WEBP"),
        "exif": lambda path: picture.save(path, quality=90, exif=rotated),
    }
    for name, write in files.items():
        folder = root / "train" / name
        folder.mkdir(parents=True)
        write(folder / "x.JPEG")
    return build_index(root, "train")


def test_dali_and_pillow_make_the_same_pixels(odd):
    assert not odd.quarantined
    (dali,), (pillow,) = (batches(backend, EvalPlan(odd, AUGMENT, 100)) for backend in EXECUTORS)
    difference = np.abs(pixels(dali.images) - pixels(pillow.images))
    for name, image in zip(odd.classes, difference, strict=True):
        assert image.max() < 1.1, name  # one grey level of rounding
        assert image.mean() < 0.5, name
    spread = pixels(pillow.images).std(axis=(1, 2, 3))
    assert spread.min() > 20  # pictures, not plain areas that agree by chance

    plan = TrainPlan(odd, AUGMENT, len(odd), seed=0)
    for dali, pillow in zip(*(batches(backend, plan, stop=20) for backend in EXECUTORS), strict=True):
        difference = np.abs(pixels(dali.images) - pixels(pillow.images)).mean(axis=(1, 2, 3))
        for name, mean in zip((odd.classes[i] for i in dali.ids), difference, strict=True):
            assert mean < 0.6, name
        assert torch.equal(dali.labels, pillow.labels)


def test_exif_rotation_is_ignored(odd):
    """As torchvision does: the rotated file has the pixels of the plain one."""
    for backend in EXECUTORS:
        (batch,) = batches(backend, EvalPlan(odd, AUGMENT, 100))
        plain, rotated = (batch.images[odd.classes.index(name)] for name in ("jpeg", "exif"))
        assert torch.equal(plain, rotated)
