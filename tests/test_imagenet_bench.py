"""bench/imagenet.py on a tree of a few images and networks of their full size, a step of each."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import imagenet

CLASSES = ("n01", "n02", "n03")
SETTINGS = """
steps = 1
range_steps = 1
real_batch = 2
synthetic_batch = 2
[refine]
images = 3
group = 2
steps = 1
[reconstruct]
images = 4
batch = 2
steps = 1
[synthesis]
steps = 1
batch_size = 2
classes_per_step = 1
images_per_class = 2
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Noise of a colour per class: one image to calibrate with, two to count, of any size."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        for split, count in (("train", 1), ("val", 2)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 120, (240, 250 + index, 3), generator=rng)
                pixels[..., label] += 120
                file = root / split / name / f"{index}.JPEG"
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(file)
    return root


@torch.no_grad()
def trained(name, images):
    """An untrained network whose last layer tells the images apart."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=len(images))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(images)
    model.eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen = []
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    handle.remove()
    centered = seen[0] - seen[0].mean(0)
    weight = torch.linalg.pinv(centered) @ (4 * torch.eye(len(images)))
    last.weight.copy_(weight.T)
    last.bias.copy_(-seen[0].mean(0) @ weight)
    return model


@torch.no_grad()
def predictions(model, images):
    return model(images).argmax(1)


@pytest.mark.parametrize("name", imagenet.MODELS)
def test_a_row_per_method_once(tree, tmp_path, name, capsys):
    train = imagenet.open_source(str(tree), "train")
    (tmp_path / "weights").mkdir()
    model = trained(name, train.images(range(3)))
    torch.save(model.state_dict(), tmp_path / "weights" / f"{name}-01ab.pth")
    val = imagenet.open_source(str(tree), "test")
    right = (predictions(model, val.images(range(6))) == torch.arange(6) // 2).float().mean()
    (tmp_path / "few.toml").write_text(SETTINGS)
    command = [
        "--data", tree, "--weights", tmp_path / "weights", "--models", name, "--bits", "W4A4F8L8",
        "--out", tmp_path / "out", "--config", tmp_path / "few.toml",
    ]  # fmt: skip
    imagenet.main([str(word) for word in command])
    assert f"FP32 {100 * right:.2f}" in capsys.readouterr().out
    file = tmp_path / "out" / f"{name}.csv"
    with file.open(newline="") as rows:
        methods = [row["method"] for row in csv.DictReader(rows)]
    assert methods == ["fp32", "minmax", "calibrated", "fdda"]
    whole = file.read_bytes()
    imagenet.main([str(word) for word in command])  # nothing is left to compute
    assert file.read_bytes() == whole
    assert "fdda" in capsys.readouterr().out


def test_weights_must_be_there(tree, tmp_path):
    with pytest.raises(SystemExit, match=r"expected one file resnet18\*\.pth, got 0"):
        imagenet.main(["--data", str(tree), "--weights", str(tmp_path), "--out", str(tmp_path)])
