"""Teachers: shipped, torchvision's, a user's own; and what is refused."""

import importlib
import os
import pickle
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from fdda_fast.data import open_source
from fdda_fast.data.sources import FASHION_MNIST_DIR
from fdda_fast.models import SHIPPED, load_teacher, loading


def accuracy(model, source, count):
    correct = 0
    with torch.no_grad():
        for rows in torch.arange(count).split(250):
            correct += int((model(source.images(rows)).argmax(1) == source.labels[rows]).sum())
    return correct / count


def test_digits_teacher():
    model, source = load_teacher("digits-resnet8"), open_source("digits", "test")
    assert not model.training
    assert accuracy(model, source, len(source)) >= 0.98


@pytest.mark.skipif(
    not FASHION_MNIST_DIR.is_dir(), reason=f"Fashion-MNIST is not installed in {FASHION_MNIST_DIR}"
)
@pytest.mark.parametrize("name", [n for n in SHIPPED if n.startswith("fashion-mnist-")])
def test_fashion_mnist_teachers(name):
    assert accuracy(load_teacher(name), open_source("fashion-mnist", "test"), 2000) >= 0.93


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_finite(name):
    path = loading.WEIGHTS_DIR / SHIPPED[name][1]
    assert path.stat().st_size <= 1.5e6
    assert all(t.isfinite().all() for t in load_teacher(name).state_dict().values())


@pytest.fixture(scope="module")
def mobile():
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def parallel(state):
    """As DataParallel names it."""
    return {f"module.{n}": t for n, t in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    parallel,
])  # fmt: skip
def test_torchvision_with_pytorch_weights(mobile, tmp_path, wrap):
    torch.save(wrap(mobile.state_dict()), tmp_path / "weights.pth")
    model = load_teacher("shufflenet_v2_x0_5", tmp_path / "weights.pth", num_classes=7)
    assert type(model) is type(mobile)
    assert not model.training
    assert equal(model, mobile)


@pytest.mark.parametrize("wrap", [dict, parallel])
def test_torchvision_with_safetensors(mobile, tmp_path, wrap):
    save_file(wrap(mobile.state_dict()), tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    assert equal(load_teacher("shufflenet_v2_x0_5", path, num_classes=7), mobile)


def test_shipped_architecture_with_other_weights(tmp_path):
    torch.manual_seed(0)
    other = SHIPPED["digits-resnet8"][0](num_classes=3)
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    model = load_teacher("digits-resnet8", tmp_path / "weights.pth", num_classes=3)
    assert equal(model, other)


FACTORY = """
import torch

answer = 42


def build(num_classes=4):
    conv = torch.nn.Conv2d(1, num_classes, 1)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(num_classes))


def fixed():
    return build(2)


def broken():
    raise RuntimeError("inside the factory")


def wrapper():
    return torch.nn.ModuleDict({"module": build(2)})


def half_wrapper():
    return torch.nn.ModuleDict({"module": build(2), "other": build(2)})


def text():
    return "no module"
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_own_networks.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_own_networks"
    sys.modules.pop("users_own_networks", None)


def weights_of(tmp_path, channels):
    torch.manual_seed(channels)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, channels, 1), torch.nn.BatchNorm2d(channels))
    torch.save(model.state_dict(), tmp_path / f"{channels}.pth")
    return model, tmp_path / f"{channels}.pth"


def test_users_factory(user_module, tmp_path):
    for spec, channels, arguments in (
        ("build", 4, {}),
        ("build", 6, {"num_classes": 6}),
        ("fixed", 2, {}),
    ):
        model, path = weights_of(tmp_path, channels)
        loaded = load_teacher(f"{user_module}:{spec}", path, **arguments)
        assert equal(loaded, model)
        assert not loaded.training


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("spec", "wrap"), [("wrapper", dict), ("half_wrapper", dict), ("half_wrapper", parallel)]
)
def test_modules_that_are_called_module(user_module, tmp_path, spec, wrap, ending):
    model = getattr(importlib.import_module(user_module), spec)()
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(wrap(model.state_dict()), path)
    assert equal(load_teacher(f"{user_module}:{spec}", path), model)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("fixed", {"num_classes": 3}, "does not take"),
        ("answer", {}, "is not callable"),
        ("nothing", {}, "cannot import the model factory"),
        ("text", {}, "returned str, not a Module"),
        ("build", {"num_classes": 5}, "do not fit the model"),
    ],
)
def test_factories_that_do_not_do(user_module, tmp_path, spec, arguments, message):
    path = weights_of(tmp_path, 4)[1]
    with pytest.raises(ValueError, match=message):
        load_teacher(f"{user_module}:{spec}", path, **arguments)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no.such.module:build", "cannot import the model factory"),
        (":build", "cannot import the model factory"),
        ("resnet17", "unknown model 'resnet17'"),
        ("maskrcnn_resnet50_fpn", "unknown model"),  # no classification network
    ],
)
def test_unknown_models(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(spec, weights_of(tmp_path, 4)[1])


def test_weights_are_required():
    with pytest.raises(ValueError, match="'resnet18' needs a weights file"):
        load_teacher("resnet18")


def test_missing_weights(tmp_path):
    for spec in ("digits-resnet8", "resnet18"):
        with pytest.raises(FileNotFoundError, match="no such weights file"):
            load_teacher(spec, tmp_path / "absent.pth")


def test_weights_of_another_shape(tmp_path):
    with pytest.raises(ValueError, match="do not fit the model"):
        load_teacher("digits-resnet8", num_classes=11)
    state = load_teacher("digits-resnet8").state_dict()
    del state["fc.bias"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"(?s)do not fit the model.*fc\.bias"):
        load_teacher("digits-resnet8", tmp_path / "weights.pth")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"fc.bias": Payload(str(mark))}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(str(mark)), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(ValueError, match="not a PyTorch weights file"):
            load_teacher("digits-resnet8", tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"fc.bias": 3}, torch.zeros(3)])
def test_other_contents(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        load_teacher("digits-resnet8", tmp_path / "weights.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_damaged_weights(tmp_path, ending):
    path = tmp_path / f"weights.{ending}"
    state = load_teacher("digits-resnet8").state_dict()
    if ending == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"<html></html>", b"version https"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a (PyTorch weights|valid safetensors) file"):
            load_teacher("digits-resnet8", path)


@pytest.mark.parametrize("data", [b"text", b"hello world"])
def test_texts_are_no_weights(tmp_path, data):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a PyTorch weights file"):
        load_teacher("digits-resnet8", path)


def test_tensors_without_names(tmp_path):
    torch.save({0: torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        load_teacher("digits-resnet8", tmp_path / "weights.pth")


def test_a_factory_that_fails(user_module, tmp_path):
    with pytest.raises(ValueError, match="inside the factory"):
        load_teacher(f"{user_module}:broken", weights_of(tmp_path, 4)[1])
