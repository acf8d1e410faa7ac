"""Per-class centers against float64 numpy."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fdda_fast.checkpoint import load_tensors, save_tensors
from fdda_fast.fingerprints import fingerprint
from fdda_fast.statistics import (
    BNSCenters,
    check_labelled_images,
    collect_centers,
    teacher_of,
    whitened,
)
from fdda_fast.teacher import Moments

CLASSES = 5


class Branching(nn.Module):
    """BatchNorms registered in another order than they run."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(3, 6, 3, 2, 1)
        self.first = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, 1, 1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.relu(self.first(self.conv1(x)))
        return self.fc(self.last(self.conv2(x)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = Branching()
    for norm in (model.first, model.last):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, -1, 2)
    return model


def batch(labels, size=9):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(len(labels), 3, size, size, generator=generator)
    return 3 + 2 * images, torch.tensor(labels)


def inputs_of(model, modules, images):
    """What reaches `modules` in eval mode, float64 [N, C, H, W] each, and the logits."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in modules]
    training = model.training
    with torch.no_grad():
        logits = model.eval()(images)
    model.train(training)
    for handle in handles:
        handle.remove()
    return [x.double().numpy() for x in seen], logits.double().numpy()


def numpy_moments(x):
    mean = x.sum((0, 2, 3)) / (x.size // x.shape[1])
    var = ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / (x.size // x.shape[1])
    return mean, var


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_centers_against_numpy(model, batch_size):
    labels = [4, 0, 0, 2, 4, 0, 2, 0]
    images, labels = batch(labels)
    centers = collect_centers(model, images, labels, CLASSES, batch_size=batch_size)
    inputs, logits = inputs_of(model, (model.first, model.last), images)
    assert (centers.num_classes, centers.num_layers) == (CLASSES, 2)
    assert centers.image_shape == (3, 9, 9)
    assert centers.count.tolist() == [4, 0, 2, 0, 2]
    for label in range(CLASSES):
        rows = (labels == label).numpy()
        for layer, x in enumerate(inputs):
            mean, var = numpy_moments(x[rows]) if rows.any() else (0, 0)
            np.testing.assert_allclose(centers.mean[layer][label], mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(centers.var[layer][label], var, rtol=1e-5, atol=1e-6)
        expected = logits[rows].mean(0) if rows.any() else np.zeros(CLASSES)
        np.testing.assert_allclose(centers.logits[label], expected, rtol=1e-5, atol=1e-5)
        assert bool(centers.reliable[label]) == (rows.any() and expected.argmax() == label)


def test_reliable_is_the_averaged_arg_max():
    class Fixed(nn.Module):
        """Logits are the first row of pixels: the test decides them."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            self.norm(x)
            return x[:, 0, 0, :3]

    images = torch.zeros(5, 1, 2, 3)
    images[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0])  # class 0: wrong on this one ...
    images[1, 0, 0] = torch.tensor([5.0, 1.0, 0.0])  # ... but right on average
    images[2, 0, 0] = torch.tensor([0.0, 1.0, 0.0])  # class 1: right here ...
    images[3, 0, 0] = torch.tensor([0.0, 0.0, 2.0])  # ... but wrong on average
    images[4, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1, 2])
    reliable = collect_centers(Fixed(), images, labels, 3).reliable
    assert reliable.tolist() == [True, False, True]
    # Class 0 without images: zero logits have their arg-max there, but there is no center.
    reliable = collect_centers(Fixed(), images[2:], labels[2:], 3).reliable
    assert reliable.tolist() == [False, False, True]


def test_whitened_against_numpy():
    rng = np.random.default_rng(0)
    moments = [rng.normal(size=(2, 3, c)).astype(np.float32) for c in (4, 6)]
    running = [rng.uniform(0.1, 2, size=(2, 1, c)).astype(np.float32) for c in (4, 6)]
    running[0][1, 0, 0] = 0  # a dead channel
    as_moments = [[Moments(*torch.from_numpy(m)) for m in part] for part in (moments, running)]
    result = whitened(*as_moments)
    for (mean, var), (m, v), got in zip(moments, running, result, strict=True):
        mean, var, m, v = (a.astype(np.float64) for a in (mean, var, m, v))
        np.testing.assert_allclose(got.mean, (mean - m) / np.sqrt(v + 1e-5), rtol=1e-5)
        np.testing.assert_allclose(got.var, var / (v + 1e-5), rtol=1e-5)
    same = whitened(as_moments[1], as_moments[1])
    assert same[1].mean.abs().max() == 0
    torch.testing.assert_close(same[1].var, torch.ones(1, 6), rtol=1e-3, atol=0)


def test_of_selects_rows(model):
    centers = collect_centers(model, *batch([0, 1, 2, 3, 4]), CLASSES)
    chosen = centers.of(torch.tensor([3, 1]))
    assert torch.equal(chosen[1].mean, centers.mean[1][[3, 1]])
    assert torch.equal(chosen[0].var, centers.var[0][[3, 1]])


def test_collecting_leaves_the_model_alone(model):
    model.train()
    model.conv1.eval()
    model.fc.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    collect_centers(model, *batch([0, 1]), CLASSES)
    assert model.training
    assert model.last.training
    assert not model.conv1.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"float \[N, C, H, W\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), "empty"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), r"int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 5]), r"0\.\.4, got 0\.\.5"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([-1, 0]), r"0\.\.4, got -1\.\.0"),
    ],
)
def test_labelled_images_are_checked(model, images, labels, message):
    with pytest.raises(ValueError, match=message):
        check_labelled_images("images", images, labels, CLASSES)
    with pytest.raises(ValueError, match=message):
        collect_centers(model, images, labels, CLASSES)


def test_save_and_load(model, tmp_path):
    centers = collect_centers(model, *batch([0, 2, 2, 4]), CLASSES)
    path = tmp_path / "deep" / "centers.safetensors"
    centers.save(path)
    loaded = BNSCenters.load(path)
    for name in ("mean", "var"):
        pairs = zip(getattr(centers, name), getattr(loaded, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("count", "logits", "reliable"):
        assert torch.equal(getattr(centers, name), getattr(loaded, name))
    assert loaded.image_shape == (3, 9, 9)
    assert loaded.teacher == centers.teacher == fingerprint({}, model)


def _without_layer(tensors, metadata):
    del tensors["var.1"]


def _other_format(tensors, metadata):
    metadata["format"] = "something else"


def _no_shape(tensors, metadata):
    del metadata["shape"]


def _no_teacher(tensors, metadata):
    del metadata["teacher"]


def _bad_shape(tensors, metadata):
    metadata["shape"] = json.dumps({"layers": 2, "image_shape": [3, 9]})


def _short_layer(tensors, metadata):
    tensors["mean.0"], tensors["var.0"] = tensors["mean.0"][:2], tensors["var.0"][:2]


def _short_logits(tensors, metadata):
    tensors["logits"] = tensors["logits"][:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_layer, "incomplete"),
        (_other_format, "not a file of BNS centers"),
        (_no_shape, "incomplete"),
        (_bad_shape, "incomplete"),
        (_no_teacher, "incomplete"),
        (_short_layer, "disagree with 5 classes"),
        (_short_logits, "disagree with 5 classes"),
    ],
)
def test_inconsistent_files_are_refused(model, tmp_path, change, message):
    path = tmp_path / "centers.safetensors"
    collect_centers(model, *batch([0, 1]), CLASSES).save(path)
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        BNSCenters.load(path)


class Squeezed(Branching):
    """squeeze() takes the batch of a single image away, too."""

    def forward(self, x):
        return super().forward(x)[:, :, None, None].squeeze()


@pytest.mark.parametrize(
    ("network", "shape"),
    [(Squeezed(), r"\(5,\)"), (nn.Conv2d(3, 4, 3), r"\(1, 4, 14, 14\)")],
)
def test_a_model_that_returns_no_logits_is_refused(network, shape):
    images, labels = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"must return logits .* got {shape} for one image"):
        teacher_of(network.eval(), images, labels)
