"""Integer weights stand for exactly the values that the fake-quantised layer uses."""

import pytest
import torch
from networks import compare_forced, images, quantized
from torch import nn

from fdda_fast.deploy import pack
from fdda_fast.deploy.fold import smallest_integers, weight_codes
from fdda_fast.quantization.modules import quantized_layer


def conv_with(rows, bits):
    """A 1x1 convolution, one output channel per row of weights."""
    layer = quantized_layer(nn.Conv2d(rows.shape[1], len(rows), 1, bias=False), bits)
    layer.weight.data.copy_(rows[:, :, None, None])
    return layer


def special_rows(width):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(width, generator=generator)
    ulp = torch.finfo(torch.float32).eps
    rows = {
        "ordinary": noise,
        "zero": torch.zeros(width),
        "positive constant": torch.full((width,), 0.3),
        "negative constant": torch.full((width,), -1e3),
        "tiny constant": torch.full((width,), 1e-20),
        "positive": noise.abs() + 0.5,
        "negative": -noise.abs() - 2,
        "positive with zero": noise.clamp(min=0),
        "one hot": torch.eye(width)[0],
        "nearly constant": 1 + ulp * torch.arange(width),
        "far from zero": 1e3 + noise,
        "narrow": 1 + 1e-5 * noise,
        "narrow, wide of zero": -7 + 3e-4 * noise,
        "small": 1e-12 * noise,
        "large": 1e12 * noise,
    }
    return rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_special_channels(bits):
    rows = special_rows(48)
    layer = conv_with(torch.stack(list(rows.values())), bits)
    q, offset, step = weight_codes("layer", layer)
    assert q.min() >= -(2 ** (bits - 1))
    assert q.max() <= 2 ** (bits - 1) - 1
    assert offset.abs().max() <= 2**25
    values = (q + offset[:, None]) * step[:, None]
    expected = layer.quantized_weight().flatten(1).double()
    for name, value, want in zip(rows, values, expected, strict=True):
        error = ((value - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()
        assert error < 1.2e-7, f"{name}: {error}"
    # They would keep the whole layer from the kernels for 8-bit weights.
    constant = [name == "zero" or name.endswith(" constant") for name in rows]
    constant[list(rows).index("nearly constant")] = False
    assert not offset[torch.tensor(constant)].any()


def test_order_within_a_convolution():
    layer = quantized_layer(nn.Conv2d(6, 4, (2, 3), groups=2), 4)
    q, offset, step = weight_codes("layer", layer)
    values = ((q + offset[:, None]) * step[:, None]).view(4, 2, 3, 3)
    torch.testing.assert_close(values.permute(0, 3, 1, 2).float(), layer.quantized_weight())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_special_channels_in_a_network(bits):
    rows = torch.stack(list(special_rows(16).values())[:13])
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 13, 1), nn.BatchNorm2d(13), nn.ReLU()
    )
    model[2].weight.data.copy_(rows[:, :, None, None])
    model[3].running_var.copy_(rows.square().sum(1).clamp(min=1e-30))
    model = nn.Sequential(model, nn.Conv2d(13, 4, 1))
    qmodel = quantized(model.eval())
    qmodel.get_submodule("0.2").weight_bits = bits
    compare_forced(qmodel, pack(qmodel, images(1)), images(8))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-128, torch.int8), (128, torch.int16), (-32769, torch.int32), (2**24, torch.int32)],
)
def test_offsets_are_stored_small(value, dtype):
    values = torch.tensor([0, value])
    stored = smallest_integers(values)
    assert stored.dtype == dtype
    assert torch.equal(stored.long(), values)
