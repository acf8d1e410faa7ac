"""From image files to network inputs and back."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fdda_fast.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_image

IMAGENET = Preprocessing(6, 8, IMAGENET_MEAN, IMAGENET_STD)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def test_crop_and_normalisation_against_numpy():
    """The shorter side has the wanted length already: no resampling."""
    result = IMAGENET(Image.fromarray(PIXELS))
    expected = PIXELS[1:7, 3:9].astype(np.float64) / 255
    expected = (expected - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_resizing_keeps_the_aspect_ratio(size):
    ramp = np.linspace(0, 255, size[1]).astype(np.uint8)[None].repeat(size[0], 0)
    result = Preprocessing(6, 8, (0.0,), (1.0,))(Image.fromarray(ramp))
    assert result.shape == (1, 6, 6)
    assert (result.diff(dim=2) > 0).all()
    assert (result - result[:, :1]).abs().max() < 1e-6
    # Centred: the middle of the ramp stays in the middle.
    assert result.mean().item() == pytest.approx(0.5, abs=0.03)
    # 8 pixels of the shorter side: the crop shows 6/8 of it, so a ramp along it loses a quarter.
    if size[1] < size[0]:
        assert result[0, 0, -1] - result[0, 0, 0] == pytest.approx(5 / 7, abs=0.1)


def test_channels_are_converted():
    grey = Image.fromarray(PIXELS[:, :, 0])
    rgb = IMAGENET(grey)
    back = IMAGENET.denormalize(rgb[None])[0]
    assert torch.equal(back[0], back[1])
    assert torch.equal(back[0], back[2])
    one = Preprocessing(6, 8, (0.5,), (0.5,))(Image.fromarray(PIXELS))
    assert one.shape == (1, 6, 6)
    luma = PIXELS[1:7, 3:9].astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose((one[0] * 0.5 + 0.5) * 255, luma, atol=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
def test_grey_images_of_16_bits(mode, dtype, channels):
    preprocessing = Preprocessing(8, 8, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels])
    shallow = PIXELS[:, :8, 0]
    deep = np.clip(shallow * 257.0 + [-128, 0, 0, 127] * 2, 0, 65_535).astype(dtype)
    result = preprocessing(Image.frombytes(mode, (8, 8), deep.tobytes()))
    assert torch.equal(result, preprocessing(Image.fromarray(shallow)))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((8, 8), np.float32), r"got floating-point ones \(mode F\)"),
        (np.full((8, 8), 65_536, np.int32), "pixels of 8 or 16 bits, got values 65536..65536"),
        (np.full((8, 8), -1, np.int32), "pixels of 8 or 16 bits, got values -1..-1"),
    ],
)
def test_pixels_without_an_8_bit_counterpart(tmp_path, pixels, message):
    image = Image.fromarray(pixels)
    with pytest.raises(ValueError, match=message):
        IMAGENET(image)
    image.save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=rf"deep\.tiff: not a readable image.*{message}"):
        read_image(tmp_path / "deep.tiff", IMAGENET)


def test_narrow_images_are_cropped_before_they_are_enlarged():
    """Resized as a whole, this one would take gigabytes."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 30_000, 3), dtype=np.uint8)
    preprocessing = Preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD)
    for image in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())):
        middle = [slice(s // 2 - min(s, 64) // 2, s // 2 + min(s, 64) // 2) for s in image.size]
        expected = preprocessing(Image.fromarray(np.asarray(image)[middle[1], middle[0]]))
        torch.testing.assert_close(preprocessing(image), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_pixel_values_come_back(channels):
    preprocessing = Preprocessing(16, 16, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels])
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    images = preprocessing.normalize(pixels)
    assert images.dtype == torch.float32
    assert torch.equal(preprocessing.denormalize(images), pixels)


def test_denormalize_rounds_and_clamps():
    preprocessing = Preprocessing(1, 1, (0.0,), (1.0,))
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 2.0]).view(5, 1, 1, 1)
    assert preprocessing.denormalize(values).flatten().tolist() == [0, 0, 1, 254, 255]


def test_record_round_trip():
    assert Preprocessing.from_dict(IMAGENET.to_dict()) == IMAGENET
    as_json = {**IMAGENET.to_dict(), "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    assert Preprocessing.from_dict(as_json) == IMAGENET
    assert IMAGENET.channels == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size >= 1"),
        ({"resize": 5}, "resize must be >= image_size"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "1 or 3 values"),
        ({"mean": (0.5,)}, "got 1 and 3"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"std": (0.5, math.nan, 0.5)}, "std must be positive"),
    ],
)
def test_errors(changes, message):
    values = {**IMAGENET.to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize("values", [{}, {"image_size": 8, "resize": 8, "mean": None, "std": [1]}])
def test_incomplete_records(values):
    with pytest.raises(ValueError, match="not a preprocessing record"):
        Preprocessing.from_dict(values)
