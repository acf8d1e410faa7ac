"""BatchNorm correction against float64 numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fdda_fast.models.small import SmallResNet
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.correction import correct_batch_norms
from fdda_fast.quantization.modules import quantizer_mode
from fdda_fast.quantization.prepare import prepare
from fdda_fast.teacher import FrozenTeacher

IMAGES = 0.5 + torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def moments(model, outputs=False):
    """Mean and biased variance of what reaches (or leaves) every BatchNorm2d, float64."""
    found = {}

    def reader(name):
        def read(module, inputs, output):
            x = (output if outputs else inputs[0]).double().numpy()
            found[name] = (x.mean((0, 2, 3)), x.var((0, 2, 3)))

        return read

    handles = [m.register_forward_hook(reader(n)) for n, m in norms(model).items()]
    with torch.no_grad():
        model(IMAGES)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def teacher():
    """Its running statistics are those of the images, as if it had been trained on them."""
    torch.manual_seed(0)
    model = SmallResNet(1, 3, 10).train()
    for module in norms(model).values():
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias, -0.5, 0.5)
        module.momentum = 1.0
    for _ in range(12):  # layer by layer, each pass settles one more
        with torch.no_grad():
            model.eval()
            for name, (mean, var) in moments(model).items():
                module = norms(model)[name]
                module.running_mean.copy_(torch.from_numpy(mean))
                module.running_var.copy_(torch.from_numpy(var))
    return model.eval().requires_grad_(False)


def quantized(teacher):
    student = prepare(teacher, Bits(3, 4))
    with torch.no_grad(), quantizer_mode(student, "observe"):
        student(IMAGES)
    return student


def test_outputs_have_the_teachers_moments(teacher):
    student = quantized(teacher)
    expected = moments(teacher, outputs=True)
    before = moments(student, outputs=True)
    shift = max(np.abs(before[n][0] - expected[n][0]).max() for n in expected)
    assert shift > 0.05  # 3 bits do harm
    correct_batch_norms(student, FrozenTeacher(teacher, IMAGES.shape[1:]), IMAGES)
    after = moments(student, outputs=True)
    assert list(after) == list(expected)
    for name, (mean, var) in expected.items():
        np.testing.assert_allclose(after[name][0], mean, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(after[name][1], var, rtol=1e-3, atol=1e-5, err_msg=name)


def test_statistics_follow_the_moments(teacher):
    """Also where the running statistics are not those of the images."""
    teacher.bn1.running_mean += 0.3
    teacher.bn1.running_var *= 1.5
    student = quantized(teacher)
    old = {n: (m.running_mean.double(), m.running_var.double()) for n, m in norms(student).items()}
    expected = moments(teacher)
    correct_batch_norms(student, FrozenTeacher(teacher, IMAGES.shape[1:]), IMAGES)
    got = moments(student)  # inputs as they are once the layers before are corrected
    for name, module in norms(student).items():
        old_mean, old_var = (value.numpy() for value in old[name])
        ratio = (got[name][1] + 1e-5) / (expected[name][1] + 1e-5)
        mean = got[name][0] + np.sqrt(ratio) * (old_mean - expected[name][0])
        np.testing.assert_allclose(module.running_var, old_var * ratio, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(module.running_mean, mean, atol=1e-3, err_msg=name)


def test_an_exact_student_is_left_as_it_is(teacher):
    student = copy.deepcopy(teacher)
    correct_batch_norms(student, FrozenTeacher(teacher, IMAGES.shape[1:]), IMAGES)
    for module, original in zip(norms(student).values(), norms(teacher).values(), strict=True):
        torch.testing.assert_close(module.running_mean, original.running_mean)
        torch.testing.assert_close(module.running_var, original.running_var)


def test_only_the_students_statistics_change(teacher):
    student = quantized(teacher)
    teacher_before = {n: t.clone() for n, t in teacher.state_dict().items()}
    before = {n: t.clone() for n, t in student.state_dict().items()}
    correct_batch_norms(student, FrozenTeacher(teacher, IMAGES.shape[1:]), IMAGES)
    assert all(torch.equal(t, teacher_before[n]) for n, t in teacher.state_dict().items())
    changed = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {
        f"{n}.{kind}" for n in norms(student) for kind in ("running_mean", "running_var")
    }
    for model in (student, teacher):
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_outputs_have_the_teachers_moments_on_other_images_too(teacher):
    """Where the images' moments are not the running statistics."""
    teacher.bn1.running_mean += 0.5
    student = quantized(teacher)
    correct_batch_norms(student, FrozenTeacher(teacher, IMAGES.shape[1:]), IMAGES)
    expected, after = moments(teacher, outputs=True), moments(student, outputs=True)
    for name, (mean, _) in expected.items():
        np.testing.assert_allclose(after[name][0], mean, atol=1e-3, err_msg=name)
