"""The generator: architecture, samples that depend on their index only, files."""

import copy
import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fdda_fast import ops
from fdda_fast.checkpoint import load_tensors, save_tensors
from fdda_fast.generator import ConditionalBatchNorm2d, Generator, latents, sample


@pytest.fixture(scope="module")
def generator():
    """Trained-like: statistics and class embeddings that differ from the initial ones."""
    torch.manual_seed(0)
    generator = Generator(5, (3, 10, 7)).train()
    for module in generator.modules():
        if isinstance(module, ConditionalBatchNorm2d):
            torch.nn.init.uniform_(module.weight.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias.weight, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(5):
            generator(torch.randn(16, 100), torch.randint(5, (16,)))
    return generator.eval()


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 10, 7), (1, 5, 13), (3, 1, 2), (3, 30, 33)]
)
def test_shapes(shape):
    generator = Generator(3, shape)
    images = generator(torch.randn(4, 100), torch.tensor([0, 2, 1, 2]))
    assert images.shape == (4, *shape)
    assert images.dtype == torch.float32
    assert generator.seed_size == (-(-shape[1] // 4), -(-shape[2] // 4))


def norm(x, norm_module, eps):
    """Batch norm of a training forward, without affine parameters."""
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + eps).sqrt()


def described(generator, z, labels):
    """method: linear, then norm, (up, conv, norm, leaky) x 2, conv, tanh, norm; in float64."""
    g = copy.deepcopy(generator).double()

    def conditional(x, module, eps):
        weight, bias = module.weight.weight[labels], module.bias.weight[labels]
        return weight[:, :, None, None] * norm(x, module, eps) + bias[:, :, None, None]

    def up(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = (z.double() @ g.fc.weight.T + g.fc.bias).reshape(len(z), 128, 3, 2)
    x = conditional(x, g.norm0, 1e-5)
    x = F.conv2d(up(x), g.conv1.weight, g.conv1.bias, padding=1)
    x = conditional(x, g.norm1, 0.8)
    x = torch.where(x > 0, x, 0.2 * x)
    x = F.conv2d(up(x), g.conv2.weight, g.conv2.bias, padding=1)
    x = conditional(x, g.norm2, 0.8)
    x = torch.where(x > 0, x, 0.2 * x)
    x = torch.tanh(F.conv2d(x, g.conv3.weight, g.conv3.bias, padding=1))
    return norm(x, g.norm3, 1e-5)[:, :, :10, :7]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)])
def test_forward_in_train_mode_against_the_description(generator, dtype, tolerance):
    """float32 and bfloat16 are rounding away: images have variance 1."""
    g = copy.deepcopy(generator).train()
    z = torch.randn(6, 100)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    images = g(z, labels, dtype)
    assert images.dtype == dtype
    expected = described(g, z, labels)
    torch.testing.assert_close(images.double(), expected, rtol=tolerance, atol=tolerance)


def test_running_statistics_are_those_of_batch_norm(generator):
    g = copy.deepcopy(generator).train()
    module, plain = g.norm1, copy.deepcopy(g.norm1.norm)
    x = torch.randn(7, 128, 5, 3)
    for part in x.split([4, 3]):
        module(part, torch.zeros(len(part)).long())
        plain(part)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(module.norm.named_buffers())[name], buffer)


def test_bfloat16_gradients_reach_float32_parameters(generator):
    """Each parameter's gradient points where the float32 one does."""
    z, labels = torch.randn(8, 100), torch.arange(8) % 5
    weights = torch.randn(8, 3, 10, 7)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        g = copy.deepcopy(generator).train()
        (g(z, labels, dtype=dtype) * weights).sum().backward()
        gradients.append({n: p.grad for n, p in g.named_parameters()})
    for name in ("fc.weight", "conv1.weight", "conv2.weight", "norm1.weight.weight"):
        exact, found = (g[name].flatten() for g in gradients)
        assert found.dtype == torch.float32
        assert F.cosine_similarity(exact, found, 0) > 0.99, name


def test_a_single_value_has_no_statistics():
    with pytest.raises(ValueError, match="x: expected more than 1 value"):
        Generator(3, (3, 4, 4))(torch.randn(1, 100), torch.tensor([0]))


def test_initial_embeddings_and_parameters():
    generator = Generator(4, (1, 8, 8))
    assert torch.equal(generator.norm1.weight.weight, torch.ones(4, 128))
    assert torch.equal(generator.norm2.bias.weight, torch.zeros(4, 64))
    shapes = {n: tuple(p.shape) for n, p in generator.named_parameters()}
    assert shapes["fc.weight"] == (512, 100)
    assert shapes["conv1.weight"] == (128, 128, 3, 3)
    assert shapes["conv2.weight"] == (64, 128, 3, 3)
    assert shapes["conv3.weight"] == (1, 64, 3, 3)
    assert not any(n.startswith("norm3") for n in shapes)


@pytest.mark.parametrize(("classes", "shape"), [(0, (1, 8, 8)), (3, (0, 8, 8)), (3, (1, 8, 0))])
def test_impossible_shapes(classes, shape):
    with pytest.raises(ValueError, match="must be positive"):
        Generator(classes, shape)


def test_latents_are_standard_normal():
    z = latents(400, torch.Generator().manual_seed(0))
    assert z.shape == (400, 100)
    assert abs(z.mean().item()) < 0.02
    assert z.std().item() == pytest.approx(1, abs=0.02)


LABELS = torch.arange(50) * 3 % 5


@pytest.fixture(scope="module")
def images(generator):
    return sample(generator, LABELS, seed=9)[0]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 49])
def test_image_i_does_not_depend_on_how_many_follow(generator, images, count):
    assert torch.equal(sample(generator, LABELS[:count], seed=9)[0], images[:count])


@pytest.mark.parametrize("first", [16, 32, 48])
def test_image_i_does_not_depend_on_where_the_call_starts(generator, images, first):
    got = sample(generator, LABELS[first:], seed=9, first=first)[0]
    assert torch.equal(got, images[first:])


def test_image_i_does_not_depend_on_other_labels(generator, images):
    labels = LABELS.clone()
    labels[1::2] = (labels[1::2] + 1) % 5
    got = sample(generator, labels, seed=9)[0]
    assert torch.equal(got[::2], images[::2])
    changed = (got != images).flatten(1).any(1)
    assert changed[1::2].all()


def test_mode_is_of_no_effect_and_restored(generator, images):
    before = {n: t.clone() for n, t in generator.state_dict().items()}
    generator.train()
    try:
        got, labels = sample(generator, LABELS, seed=9)
        assert generator.training
    finally:
        generator.eval()
    assert torch.equal(got, images)
    assert torch.equal(labels, LABELS)
    assert not got.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in generator.state_dict().items())
    sample(generator, LABELS[:1])
    assert not generator.training


def test_images_differ_by_seed_index_and_class(generator, images):
    assert not torch.equal(sample(generator, LABELS, seed=10)[0], images)
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the global stream plays no part
        assert torch.equal(sample(generator, LABELS, seed=9)[0], images)


def test_no_label_no_image(generator):
    assert sample(generator, LABELS[:0])[0].shape == (0, 3, 10, 7)


@pytest.mark.parametrize(
    ("labels", "first", "message"),
    [
        (torch.tensor([0, 5]), 0, r"0\.\.4, got 0\.\.5"),
        (torch.tensor([-1]), 0, r"0\.\.4, got -1\.\.-1"),
        (torch.tensor([1.0]), 0, "int64"),
        (torch.tensor([[1]]), 0, "int64"),
        (torch.tensor([1]), 8, "multiple of 16"),
        (torch.tensor([1]), -16, "multiple of 16"),
    ],
)
def test_arguments_of_sample_are_checked(generator, labels, first, message):
    with pytest.raises(ValueError, match=message):
        sample(generator, labels, first=first)


def test_batches_of_large_maps_equal_their_parts():
    torch.manual_seed(3)
    generator = Generator(3, (1, 68, 65)).eval()
    z, labels = torch.randn(20, 100), torch.arange(20) % 3
    images = generator(z, labels)
    assert images.shape == (20, 1, 68, 65)
    assert not images.requires_grad
    parts = [generator(z[rows], labels[rows]) for rows in torch.arange(20).split(7)]
    torch.testing.assert_close(images, torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_save_and_load(generator, images, tmp_path):
    generator.save(tmp_path / "g.safetensors")
    loaded = Generator.load(tmp_path / "g.safetensors")
    assert not loaded.training
    assert (loaded.num_classes, loaded.image_shape, loaded.teacher) == (5, (3, 10, 7), "")
    assert torch.equal(sample(loaded, LABELS, seed=9)[0], images)


def test_equal_generators_give_equal_files(generator, tmp_path):
    for name in ("a", "b"):
        generator.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def _wrong_format(tensors, metadata):
    metadata["format"] = "fdda-fast centers 1"


def _no_shape(tensors, metadata):
    del metadata["shape"]


def _no_teacher(tensors, metadata):
    del metadata["teacher"]


def _not_json(tensors, metadata):
    metadata["shape"] = "{"


def _flat_shape(tensors, metadata):
    metadata["shape"] = json.dumps({"num_classes": 5, "image_shape": [10, 7]})


def _other_shape(tensors, metadata):
    metadata["shape"] = json.dumps({"num_classes": 6, "image_shape": [3, 10, 7]})


def _missing_weight(tensors, metadata):
    del tensors["conv2.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wrong_format, "not a generator file"),
        (_no_shape, "damaged"),
        (_no_teacher, "damaged"),
        (_not_json, "damaged"),
        (_flat_shape, "damaged"),
        (_other_shape, "damaged"),
        (_missing_weight, "damaged"),
    ],
)
def test_damaged_files(generator, tmp_path, change, message):
    path = tmp_path / "g.safetensors"
    generator.save(path)
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        Generator.load(path)


def test_truncated_and_missing_files(generator, tmp_path):
    path = tmp_path / "g.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Generator.load(path)
    generator.save(path)
    data = path.read_bytes()
    for length in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            Generator.load(path)


def test_conditional_norm_is_per_class():
    module = ConditionalBatchNorm2d(3, 2, eps=0.1)
    module.weight.weight.data = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    module.bias.weight.data = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    x = torch.randn(4, 2, 3, 3)
    labels = [2, 0, 1, 2]
    y = module.train()(x, torch.tensor(labels)).detach().numpy()
    a = x.double().numpy()
    a = (a - a.mean((0, 2, 3), keepdims=True)) / np.sqrt(a.var((0, 2, 3), keepdims=True) + 0.1)
    for row, label in enumerate(labels):
        for channel in range(2):
            weight = module.weight.weight[label, channel].item()
            bias = module.bias.weight[label, channel].item()
            expected = weight * a[row, channel] + bias
            np.testing.assert_allclose(y[row, channel], expected, rtol=1e-5, atol=1e-5)


def test_normalised_maps_are_made_again(monkeypatch):
    """What the up-sampling convolutions read is not kept for the backward pass."""
    operator, outputs = ops.conditional_bn_lrelu, []

    def watched(*args):
        y, *moments = operator(*args)
        outputs.append((weakref.ref(y), y.detach().clone()))
        return y, *moments

    again, made = ops.fixed_bn_lrelu, []

    def watched_again(*args):
        made.append(again(*args))
        return made[-1]

    monkeypatch.setattr(ops, "conditional_bn_lrelu", watched)
    monkeypatch.setattr(ops, "fixed_bn_lrelu", watched_again)
    images = Generator(5, (3, 12, 8)).train()(torch.randn(6, 100), torch.arange(6) % 5)
    assert [y() is None for y, _ in outputs] == [True, True, False]  # norm3's is in `images`
    images.sum().backward()
    for (_, first), second in zip(outputs[:2], reversed(made), strict=True):
        assert torch.equal(first, second)
