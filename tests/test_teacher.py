"""The frozen teacher against the model it is made of, and float64 numpy."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms import randomize_norms
from torch import nn

from fdda_fast.teacher import FrozenTeacher

SHAPE = (3, 33, 32)


class Twisted(nn.Module):
    """Every way in which a BatchNorm2d may be followed, registered in another order than they run.

    Additions of two norms, of a norm to itself moved, of a vector to a norm, of a norm that others
    read; clips of every kind; a norm whose output nobody reads.
    """

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=i != 5) for i in range(10))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(9))
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norms[8](self.stem(x)), inplace=True)
        y = self.norms[0](self.convs[0](x))
        y += self.norms[1](self.convs[1](x))
        x = F.relu6(y)
        x = F.hardtanh(x + self.norms[2](self.convs[2](x)), 0.0, 1.5)
        x = F.hardtanh(self.norms[3](self.convs[3](x)))
        x = (self.norms[4](self.convs[4](x)) + self.shift).relu()
        y = self.norms[5](self.convs[5](x))
        x = torch.relu(y + x) - y
        self.norms[6](x)
        y = x - 0.5
        z = y.add_(self.norms[9](self.convs[8](x)))  # y changes, too
        x = x + y * z
        y = self.norms[7](self.convs[7](x))
        return self.fc((y + y).mean((2, 3)))


def networks():
    yield "twisted", Twisted
    for name in ("resnet18", "mobilenet_v2", "densenet121", "regnet_x_400mf", "vgg11_bn"):
        yield name, lambda name=name: getattr(torchvision.models, name)(num_classes=5)


@pytest.fixture(scope="module", params=networks(), ids=lambda pair: pair[0])
def model(request):
    torch.manual_seed(3)
    model = request.param[1]()
    randomize_norms(model)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(7))


GROUPS = torch.tensor([0, 1, 1, 0])


def inputs_of(model, images):
    """What reaches every BatchNorm2d in the order in which they run, and the logits."""
    seen = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(lambda m, x: seen.append((m, x[0]))) for m in norms]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return seen, logits


def test_logits_and_moments(model, images):
    teacher = FrozenTeacher(model, SHAPE)
    with torch.no_grad():
        logits, moments = teacher.with_moments(images, GROUPS, 3)
        seen, expected = inputs_of(copy.deepcopy(model), images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(moments) == len(teacher.running) == len(seen)
    for (module, x), got, running in zip(seen, moments, teacher.running, strict=True):
        x = x.double().numpy()
        for group in range(2):
            rows = x[(group == GROUPS).numpy()]
            mean, var = rows.mean((0, 2, 3)), rows.var((0, 2, 3))
            scale = np.abs(rows).max()
            np.testing.assert_allclose(got.mean[group], mean, atol=1e-5 * scale)
            np.testing.assert_allclose(got.var[group], var, rtol=1e-3, atol=1e-5 * scale)
        assert got.mean[2].abs().max() == got.var[2].abs().max() == 0
        assert torch.equal(running.mean[0], module.running_mean)
        assert torch.equal(running.var[0], module.running_var)


def test_gradient_of_the_images(model, images):
    """Through logits and all moments, as autograd has it for the model with mean() and var()."""
    teacher, weights = FrozenTeacher(model, SHAPE), torch.randn(3)
    ours, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    logits, moments = teacher.with_moments(ours, GROUPS, 2)
    loss = weights[0] * logits.square().sum()
    for mean, var in moments:
        loss = loss + weights[1] * mean.square().mean() + weights[2] * var.square().mean()
    seen, logits = inputs_of(copy.deepcopy(model), plain)
    expected = weights[0] * logits.square().sum()
    for _, x in seen:
        parts = [x[group == GROUPS] for group in range(2)]
        mean = torch.stack([p.mean((0, 2, 3)) for p in parts])
        var = torch.stack([p.var((0, 2, 3), correction=0) for p in parts])
        expected = expected + weights[1] * mean.square().mean() + weights[2] * var.square().mean()
    (found,), (wanted,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_the_model_is_left_alone(model, images):
    model = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = FrozenTeacher(model, SHAPE)
    leaf = images.clone().requires_grad_()
    teacher(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_bfloat16(model, images):
    """Logits as near as PyTorch's; moments near; the norms' own tensors are not rounded."""
    # oneDNN's bfloat16 convolutions read beyond images of two pixels: larger ones.
    images = F.interpolate(images, scale_factor=3)
    exact, rounded = FrozenTeacher(model, SHAPE), FrozenTeacher(model, SHAPE, torch.bfloat16)
    with torch.no_grad():
        logits, moments = exact.with_moments(images, GROUPS, 2)
        got, got_moments = rounded.with_moments(images, GROUPS, 2)
    assert got.dtype == torch.float32
    with torch.no_grad():
        plain = copy.deepcopy(model).bfloat16()(images.bfloat16())
    assert (got - logits).norm() < 2 * (plain - logits).norm()
    for ours, theirs, a, b in zip(
        got_moments, moments, rounded.running, exact.running, strict=True
    ):
        assert ours.mean.dtype == ours.var.dtype == torch.float32
        size = (theirs.mean.square() + theirs.var).norm()
        assert (ours.var - theirs.var).norm() < 0.1 * size
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.var, b.var)


def test_gradients_stay_in_their_group(model, images):
    leaf = images.clone().requires_grad_()
    _, moments = FrozenTeacher(model, SHAPE).with_moments(leaf, GROUPS, 2)
    (moments[1].mean[0].sum() + moments[0].var[0].sum()).backward()
    assert leaf.grad[GROUPS == 0].abs().sum() > 0
    assert leaf.grad[GROUPS == 1].abs().sum() == 0


def test_a_network_without_norms_has_logits():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    logits, moments = FrozenTeacher(model, (1, 5, 5)).with_moments(
        torch.ones(2, 1, 5, 5), torch.zeros(2, dtype=torch.int64), 1
    )
    torch.testing.assert_close(logits, model(torch.ones(2, 1, 5, 5)))
    assert moments == []


def test_refused():
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="'1' has no running statistics"):
        FrozenTeacher(nn.Sequential(nn.BatchNorm2d(2), norm), (2, 3, 3))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot trace Branching"):
        FrozenTeacher(Branching(), (1, 2, 2))
