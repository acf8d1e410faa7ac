"""Selection on held-out images, and the early end of fine-tuning."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from digits import equal, state
from torch import nn

from fdda_fast.config import QuantizeConfig
from fdda_fast.data import draw, open_source
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.quantize import quantize
from fdda_fast.quantization.selection import Selection
from fdda_fast.quantization.stages import drawn_from

TOO_FAST = QuantizeConfig(
    method="fdda", steps=60, synthetic_batch=0, flip=False, lr=3e-3, check_every=10, patience=2
)


@pytest.fixture(scope="module")
def calibration():
    drawn = draw(open_source("digits", "train"), 2, seed=0)
    return drawn.images, drawn.labels


def scaled(factor):
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = factor * torch.eye(3)[:, :2]
    return layer


def test_the_least_divergence_stays():
    student = scaled(2.0)
    start = copy.deepcopy(student.state_dict())
    found = Selection(student, patience=2, temperature=1.0)
    images = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    assert not found.ready
    found.hold_out(images.split(7), scaled(1.0))
    assert found.ready
    exhausted = []
    for factor in (2.0, 1.1, float("nan"), 0.5):
        found.look([scaled(factor).weight])
        exhausted.append(found.exhausted)
        assert torch.equal(student.weight, start["weight"])
    assert exhausted == [False, False, False, True]
    assert torch.equal(found.best[0], scaled(1.1).weight)
    logits = [scaled(factor)(images).detach().double().log_softmax(1) for factor in (1.1, 1.0)]
    expected = F.kl_div(*logits, reduction="sum", log_target=True).item()
    assert found.least == pytest.approx(expected, rel=1e-4)

    other = Selection(scaled(2.0), patience=2, temperature=1.0)
    other.load_state_tensors(found.state_tensors())
    assert (other.least, other.since) == (found.least, 2)
    assert torch.equal(other.best[0], found.best[0])


def test_steps_leave_an_eighth_out():
    images, labels = torch.arange(40.0).view(40, 1, 1, 1), torch.arange(40)
    config = QuantizeConfig(synthetic_batch=16)
    source, held_out = drawn_from(lambda: (images, labels), config)
    learned, looked_at = ({int(v) for i in range(50) for v in s(i)[1]} for s in (source, held_out))
    assert len(looked_at) == 5
    assert looked_at.isdisjoint(learned)
    assert learned | looked_at == set(range(40))
    assert max(looked_at) - min(looked_at) > 5  # images may come class by class
    assert all(torch.equal(s(3)[0].flatten(), s(3)[1].float()) for s in (source, held_out))
    for few, settings in ((images, config.replace(check_every=0)), (images[:7], config)):
        for part in drawn_from(lambda few=few: (few, labels), settings):
            assert {int(v) for i in range(50) for v in part(i)[1]} == set(range(len(few)))


def error(student, teacher):
    images = draw(open_source("digits", "train"), 10, seed=1).images
    with torch.no_grad():
        return (student(images) - teacher(images)).square().mean().item()


def test_a_rate_that_is_too_high_does_no_harm(teacher, calibration):
    def run(config):
        told = []
        student = quantize(
            teacher, calibration, Bits(4, 4), config, progress=lambda *a: told.append(a[0])
        )
        return error(student, teacher), len(told)

    unselected, steps = run(TOO_FAST.replace(check_every=0))
    assert steps == 60
    selected, steps = run(TOO_FAST)
    assert steps < 60
    assert selected < 0.7 * unselected


def test_resumed_between_looks(teacher, calibration, tmp_path):
    config = TOO_FAST.replace(steps=25, lr=5e-5)
    whole = quantize(teacher, calibration, Bits(4, 4), config)

    def interrupt(done, total, metrics):
        if done == 14:
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quantize(teacher, calibration, Bits(4, 4), config, checkpoint=path, progress=interrupt)
    for _ in range(2):  # the second time no step is left
        resumed = quantize(teacher, calibration, Bits(4, 4), config, checkpoint=path, resume=True)
        assert equal(state(whole), state(resumed))
