"""Every layer measured alone, and widths chosen from that."""

import pytest
import torch
from torch import nn

from fdda_fast.data import draw, open_source
from fdda_fast.models import load_teacher
from fdda_fast.quantization import sensitivity as stage
from fdda_fast.quantization.allocation import allocate
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.prepare import prepare
from fdda_fast.tracing import trace

WIDTHS = (2, 4, 8)


@pytest.fixture(scope="module")
def measured():
    images = draw(open_source("digits", "train"), 2, 0).images
    model = load_teacher("digits-resnet8")
    return model, images, stage.sensitivity(model, images, WIDTHS)


def test_more_bits_lose_less(measured):
    loss = measured[2].loss
    assert list(loss["conv1"]) == [(w, 8) for w in WIDTHS]
    for losses in loss.values():
        assert losses[8, 8] < 0.02
        assert losses[8, 8] < losses[2, max(a for _, a in losses)]
    inner = loss["stage3.0.conv2"]
    assert inner[8, 8] < inner[8, 4] < inner[8, 2]


def test_groups(measured):
    groups, names = measured[2].groups, list(measured[2].loss)
    assert [names.index(g[0]) for g in groups] == sorted(names.index(g[0]) for g in groups)
    assert ("stage2.0.conv1", "stage2.0.shortcut.0") in groups
    assert sorted(name for group in groups for name in group) == sorted(measured[2].loss)


def test_widths_under_a_budget(measured):
    model, images, found = measured
    sizes = {n: model.get_submodule(n).weight.numel() for n in found.loss}
    cost = {n: {p: p[0] * sizes[n] + p[1] for p in pairs} for n, pairs in found.loss.items()}
    budget = 4 * sum(sizes.values())
    bits = allocate(found.loss, cost, budget, found.groups)
    assert sum(w * sizes[n] for n, (w, _) in bits.overrides.items()) <= budget
    assert prepare(model, bits)(images).shape == (20, 10)


@torch.no_grad()
def test_nothing_active_is_the_teacher(measured):
    model, images, _ = measured
    student = prepare(model, Bits(2, 2))
    y = stage._Partly(student, trace(model), set()).run(images)
    torch.testing.assert_close(y, model(images))


def test_own_widths_for_inputs_and_figures_that_are_kept(measured, tmp_path, monkeypatch):
    model, images, found = measured
    seen = []
    options = {"input_widths": (8,), "checkpoint": tmp_path / "figures.json"}
    first = stage.sensitivity(
        model, images, (2, 4), **options, progress=lambda *a: seen.append(a[:2])
    )
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)]
    for name, losses in first.loss.items():
        assert list(losses) == [(2, 8), (4, 8)]
        assert losses == {pair: found.loss[name][pair] for pair in losses}
    monkeypatch.setattr(stage, "_distance", None)  # nothing is measured again
    assert stage.sensitivity(model, images, (2, 4), **options) == first
    with pytest.raises(ValueError, match="measured on another model, images, metric or keep_float"):
        stage.sensitivity(model, images[1:], (2, 4), **options)


def test_layers_that_stay_in_float_have_no_widths(measured):
    model, images, found = measured
    kept = stage.sensitivity(model, images, (4,), keep_float=("conv1", "fc"))
    assert list(kept.loss) == [name for name in found.loss if name not in ("conv1", "fc")]
    name = "stage3.0.conv2"
    # Ranges are taken behind the other layers, which lose less.
    assert kept.loss[name][4, 4] == pytest.approx(found.loss[name][4, 4], rel=0.5)
    with pytest.raises(ValueError, match="keep_float names nothing"):
        stage.sensitivity(model, images, (4,), keep_float=("conv9",))


@pytest.mark.parametrize("metric", stage.METRICS)
def test_one_logit(metric):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)
    )
    modes = [module.training for module in model.eval()[0].train().modules()]
    found = stage.sensitivity(model, torch.randn(10, 1, 8, 8), (2, 8), metric)
    assert all(losses[2, a] > losses[8, a] > 0 for losses in found.loss.values() for _, a in losses)
    assert [module.training for module in model[0].modules()] == modes


def test_refuses(measured):
    for arguments, message in [
        (((4,), "cosine"), "metric must be one of"),
        (((), "kl"), "widths must name one"),
        (((9,), "mse"), r"widths must be an integer in 2\.\.8"),
    ]:
        with pytest.raises(ValueError, match=message):
            stage.sensitivity(measured[0], measured[1], *arguments)
    with pytest.raises(ValueError, match="input_widths must name one"):
        stage.sensitivity(*measured[:2], input_widths=())
