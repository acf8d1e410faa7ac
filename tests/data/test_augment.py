"""Shifts and blends written out; resized crops against a bilinear resampling in numpy."""

import math

import numpy as np
import pytest
import torch

from fdda_fast.data.augment import blended, random_resized_crop, random_shift, warped


def images(count=6, channels=2, size=(7, 9)):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def boxes(count, area, flip, seed):
    """Relative (left, top, width, height, mirrored) of every crop, from the same draws."""
    share, ratio, x, y, mirror = torch.rand(5, count, generator=rng(seed)).double().numpy()
    share = area[0] + (area[1] - area[0]) * share
    root = np.sqrt((4 / 3) ** (2 * ratio - 1))
    width = np.minimum(np.sqrt(share) * root, 1)
    height = np.minimum(np.sqrt(share) / root, 1)
    return np.stack(
        [(1 - width) * x, (1 - height) * y, width, height, (mirror < 0.5) & flip], axis=1
    )


def resample(image, left, top, width, height, mirrored):
    """The box at full size; pixel centres lie at half integers, borders are repeated."""
    rows, cols = image.shape[1:]
    result = np.empty_like(image)
    for i in range(rows):
        for j in range(cols):
            u = (cols - 1 - j if mirrored else j) + 0.5
            x = np.clip((left + width * u / cols) * cols - 0.5, 0, cols - 1)
            y = np.clip((top + height * (i + 0.5) / rows) * rows - 0.5, 0, rows - 1)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, cols - 1), min(y0 + 1, rows - 1)
            fx, fy = x - x0, y - y0
            upper = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
            lower = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
            result[:, i, j] = upper * (1 - fy) + lower * fy
    return result


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.5, 1.0), (0.25, 0.25), (1.0, 1.0)])
def test_against_numpy(area, flip):
    x = images()
    result = random_resized_crop(x, area, flip, rng(3))
    assert result.shape == x.shape
    for image, box, got in zip(x.double().numpy(), boxes(6, area, flip, 3), result, strict=True):
        np.testing.assert_allclose(got, resample(image, *box), atol=1e-4)


def test_the_boxes_of_the_above():
    for area in ((0.08, 1.0), (0.3, 0.6)):
        left, top, width, height, mirrored = boxes(4000, area, True, 0).T
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left + width <= 1 + 1e-12).all()
        assert (top + height <= 1 + 1e-12).all()
        assert mirrored.mean() == pytest.approx(0.5, abs=0.05)
        inside = (width < 1) & (height < 1)
        share = (width * height)[inside]
        assert area[0] <= share.min() < area[0] + 0.02
        assert area[1] - 0.1 < share.max() <= area[1]
        log_ratio = np.log(width / height)[inside]
        assert np.abs(log_ratio).max() <= math.log(4 / 3) + 1e-9
        assert np.abs(log_ratio).max() > 0.9 * math.log(4 / 3)


def test_deterministic_and_image_by_image():
    x = images()
    result = random_resized_crop(x, (0.3, 1.0), True, rng(5))
    assert torch.equal(result, random_resized_crop(x, (0.3, 1.0), True, rng(5)))
    assert not torch.equal(result, random_resized_crop(x, (0.3, 1.0), True, rng(6)))
    other = x.clone()
    other[2] += 1
    changed = random_resized_crop(other, (0.3, 1.0), True, rng(5)) != result
    assert changed.flatten(1).any(1).tolist() == [False, False, True, False, False, False]


def test_values_stay_within_the_images_range():
    x = images(40)
    result = random_resized_crop(x, (0.08, 1.0), True, rng())
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    assert (result >= low - 1e-5).all()
    assert (result <= high + 1e-5).all()
    constant = torch.full((5, 1, 6, 6), 3.5)
    torch.testing.assert_close(random_resized_crop(constant, (0.1, 1.0), True, rng()), constant)


def test_full_area_of_an_image_that_is_equal_along_the_rows():
    """Whatever the ratio, one side of a box with the full area is the full side."""
    x = images(8)
    x = x.mean(3, keepdim=True).expand(8, 2, 7, 9).contiguous()
    result = random_resized_crop(x, (1.0, 1.0), False, rng())
    full = boxes(8, (1.0, 1.0), False, 0)[:, 3] >= 1
    assert 0 < full.sum() < 8
    torch.testing.assert_close(result[full], x[full], atol=1e-5, rtol=0)
    assert not torch.isclose(result[~full], x[~full], atol=1e-3).all()


def test_flip_mirrors_about_half():
    ramp = torch.arange(8.0).expand(200, 1, 8, 8)
    result = random_resized_crop(ramp, (0.5, 1.0), True, rng())
    slope = result[:, 0, :, -1] - result[:, 0, :, 0]
    falling = (slope < 0).all(1)
    assert ((slope > 0).all(1) | falling).all()
    assert 70 < falling.sum() < 130
    never = random_resized_crop(ramp, (0.5, 1.0), False, rng())
    assert (never[:, 0, :, -1] > never[:, 0, :, 0]).all()
    # With and without: the same boxes.
    torch.testing.assert_close(result[falling].flip(3), never[falling], atol=1e-4, rtol=0)


def test_gradients_and_dtypes():
    x = images().requires_grad_()
    random_resized_crop(x, (0.5, 1.0), True, rng()).sum().backward()
    assert x.grad.sum().item() == pytest.approx(x.numel(), rel=1e-4)
    assert random_resized_crop(images().double(), (0.5, 1), True, rng()).dtype == torch.float64


@pytest.mark.parametrize("flip", [False, True])
def test_shift_against_indices(flip):
    x = images(200)
    result = random_shift(x, 2, flip, rng(4))
    seen = set()
    for image, got in zip(x, result, strict=True):
        options = {
            (dy, dx, mirrored): (image.flip(2) if mirrored else image)[
                :, (torch.arange(7) + dy).clamp(0, 6)
            ][:, :, (torch.arange(9) + dx).clamp(0, 8)]
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for mirrored in {False, flip}
        }
        matching = [key for key, option in options.items() if torch.equal(option, got)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) == 25 if not flip else len(seen) > 40
    assert torch.equal(result, random_shift(x, 2, flip, rng(4)))


def test_no_shift_is_the_image():
    x = images()
    assert torch.equal(random_shift(x, 0, False, rng()), x)


def test_blended():
    """Constant images: a blend shows the weight of each of its pixels."""
    n, (h, w) = 4000, (6, 10)
    x = torch.arange(float(n)).square().view(n, 1, 1, 1).expand(n, 3, h, w)
    other = torch.randperm(n, generator=rng(2))
    result = blended(x, 0.5, rng(2))
    weight = ((result - x[other]) / (x - x[other]))[other != torch.arange(n)]
    torch.testing.assert_close(weight, weight[:, :1].expand_as(weight))
    weight = weight[:, 0]
    even = (weight - weight[:, :1, :1]).abs().flatten(1).amax(1) < 1e-3
    binary = ((weight < 1e-3) | (weight > 1 - 1e-3)).flatten(1).all(1)
    assert (even | binary).all()

    mixed = weight[even & ~binary][:, 0, 0]
    assert 0.2 < len(mixed) / n < 0.3
    assert 0.47 < mixed.mean() < 0.53
    assert mixed.min() < 0.02
    assert mixed.max() > 0.98

    boxes = (weight[binary & ~even] < 0.5).float()
    assert 0.17 < len(boxes) / n < 0.27
    assert 0.45 < boxes.mean() < 0.55
    for box in boxes:
        rows, cols = box.amax(1), box.amax(0)
        assert torch.equal(box, rows[:, None] * cols)
        assert rows.diff().abs().sum() <= 2
        assert cols.diff().abs().sum() <= 2
    for edge in (boxes[:, 0, 0], boxes[:, -1, -1], boxes[:, 0, -1], boxes[:, -1, 0]):
        assert 0.02 < edge.mean() < 0.4  # boxes lie anywhere, but inside


def test_nothing_blended():
    x = images()
    assert torch.equal(blended(x, 0.0, rng()), x)


def test_blended_keeps_dtype_and_gradient():
    x = images().double().requires_grad_()
    result = blended(x, 1.0, rng())
    assert result.dtype == torch.float64
    result.sum().backward()
    # Each image gives all of itself away: the weights of an image add up over where it went.
    assert x.grad.sum().item() == pytest.approx(x.numel())


def limits(channels, low=-1.0, high=2.0):
    return torch.full((channels, 1, 1), low), torch.full((channels, 1, 1), high)


def test_warped_images_are_others_within_the_limits():
    x = images(64, 3, (12, 10)).clamp(-1, 2)
    before = x.clone()
    y = warped(x, limits(3), False, rng())
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.min() >= -1
    assert y.max() <= 2
    assert torch.equal(y, warped(x, limits(3), False, rng()))
    same = warped(x[:1].expand(64, -1, -1, -1), limits(3), False, rng())
    assert torch.cdist(same.flatten(1), same.flatten(1)).add(torch.eye(64)).min() > 0.5


def test_warped_moves_by_what_is_said():
    """The centre of a disc: up to 0.16 + 0.1 of half the side, less by the smaller size."""
    at = torch.arange(41.0) - 20
    disc = ((at.view(-1, 1) ** 2 + at**2) < 64).float().expand(400, 1, 41, 41)
    y = warped(disc, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), False, rng())
    y = (y > 0.25).float()
    area = y.sum((1, 2, 3)) / disc[0].sum()
    assert 0.45 < area.min() < 0.85
    assert 1.2 < area.max() < 2.1
    centre = torch.stack([(y.sum(d) * at).sum((1, 2)) / y.sum((1, 2, 3)) for d in (2, 3)])
    assert 2.5 < centre.abs().max() < 0.27 * 20.5 * 1.5


def test_warped_mirrors_half_of_the_images_where_asked():
    left = torch.zeros(200, 1, 20, 20)
    left[..., :10] = 1
    lows = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    for flip, low, high in ((True, 70, 130), (False, 0, 0)):
        y = warped(left, lows, flip, rng())
        mirrored = y[..., :10].mean((1, 2, 3)) < y[..., 10:].mean((1, 2, 3))
        assert low <= mirrored.sum() <= high


def test_warped_leaves_a_flat_channel():
    x = torch.full((5, 1, 8, 8), 3.0)
    assert torch.equal(warped(x, limits(1, 3.0, 3.0), True, rng()), x)
