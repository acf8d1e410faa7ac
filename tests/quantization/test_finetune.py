"""quantize(): every way to run it, ranges, the fine-tuning step, resuming."""

import copy
import dataclasses
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from digits import accuracy, equal, state
from torch import nn

from fdda_fast.config import QuantizeConfig, RefineConfig, SynthesisConfig
from fdda_fast.data import (
    blended,
    draw,
    open_source,
    random_resized_crop,
    random_shift,
)
from fdda_fast.generator import Generator
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.finetune import Finetuner
from fdda_fast.quantization.modules import activation_quantizers, quantizer_mode
from fdda_fast.quantization.prepare import prepare
from fdda_fast.quantization.quantize import quantize
from fdda_fast.seeding import stream
from fdda_fast.statistics import collect_centers
from fdda_fast.synthesis import GeneratorTrainer

SYNTHESIS = SynthesisConfig(batch_size=6, classes_per_step=2, images_per_class=2, any_class_steps=2)
ALONG = QuantizeConfig(
    method="fdda",
    steps=4, warmup_steps=3, range_steps=3, real_batch=5, synthetic_batch=6, lr=1e-3,
    check_every=0, synthesis=SYNTHESIS, refine=RefineConfig(images=0),
)  # fmt: skip
REAL = ALONG.replace(synthetic_batch=0)
PAPER = QuantizeConfig.reference().replace(
    steps=4, warmup_steps=3, range_steps=3, real_batch=5, synthetic_batch=6, lr=1e-6,
    synthesis=SynthesisConfig.reference().replace(any_class_steps=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def calibration():
    drawn = draw(open_source("digits", "train"), 2, seed=0)
    return drawn.images, drawn.labels


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    generator = Generator(10, (1, 8, 8)).train()
    with torch.no_grad():
        for _ in range(10):
            generator(torch.randn(16, 100), torch.randint(10, (16,)))
    return generator.eval()


def test_without_steps(teacher, calibration):
    """Ranges from the calibration images, and corrected batch norms; weights as they were."""
    told = []
    config = QuantizeConfig(steps=0)
    student = quantize(teacher, calibration, Bits(4, 4), config, progress=lambda *a: told.append(a))
    assert not told
    assert not student.training
    parameters = dict(student.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in teacher.named_parameters())
    quantizers = activation_quantizers(student)
    assert all(q.observed == 1 and q.mode == "quantize" for q in quantizers)
    image = quantizers[0]
    assert image.x_min.item() <= 0.25 * calibration[0].min().item()
    assert 0.25 <= image.x_max.item() / calibration[0].max().item() <= 1
    assert not torch.equal(student.get_submodule("bn1").running_mean, teacher.bn1.running_mean)
    assert accuracy(student) > 0.9


def test_without_steps_nor_correction(teacher, calibration):
    config = QuantizeConfig(steps=0, ranges="minmax", correct_batch_norms=False)
    student = quantize(teacher, calibration, Bits(4, 4), config)
    image = activation_quantizers(student)[0]
    assert image.x_min.item() == min(calibration[0].min().item(), 0)
    assert image.x_max.item() == calibration[0].max().item()
    assert torch.equal(student.get_submodule("bn1").running_mean, teacher.bn1.running_mean)
    shrunk = quantize(teacher, calibration, Bits(4, 4), config.replace(ranges="mse"))
    pairs = zip(activation_quantizers(shrunk), activation_quantizers(student), strict=True)
    ratios = [a.x_max.item() / b.x_max.item() for a, b in pairs]
    assert all(0.25 <= r <= 1 for r in ratios)
    assert min(ratios) < 1


@pytest.mark.parametrize("name", ["real", "given", "given_only", "along", "paper"])
def test_all_ways(teacher, calibration, generator, name):
    """Progress, weights that moved, the same twice, another seed another result, teacher intact."""
    config, given = {
        "real": (REAL, None),
        "given": (ALONG, generator),
        "given_only": (ALONG.replace(real_batch=0), generator),
        "along": (ALONG, None),
        "paper": (PAPER, None),
    }[name]
    model = copy.deepcopy(teacher).train()
    model.bn1.eval()
    model.fc.bias.requires_grad_(False)
    before, made = state(model), state(generator)
    learned = [n for n, _ in model.named_parameters()]
    told = []
    first = quantize(
        model, calibration, Bits(3, 4), config, given, progress=lambda *a: told.append(a)
    )
    total = 4 if name in ("real", "given", "given_only") else 7
    assert [t[:2] for t in told] == [(i + 1, total) for i in range(total)]
    assert [("student_loss" in t[2]) for t in told] == [i >= total - 4 for i in range(total)]
    assert ("bns" in told[-1][2]) == (total == 7)
    assert not first.training
    after = state(first)
    assert not any(torch.equal(after[n], before[n]) for n in learned if n != "fc.bias")
    assert {int(q.observed) for q in activation_quantizers(first)} == {3}

    assert model.training
    assert not model.bn1.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert equal(state(model), before)
    assert equal(state(generator), made)

    torch.rand(3)  # the global stream plays no part
    again = quantize(model, calibration, Bits(3, 4), config, given)
    assert equal(state(first), state(again))
    if name == "along":
        synthesis = config.synthesis.replace(seed=1)
        other = quantize(model, calibration, Bits(3, 4), config.replace(synthesis=synthesis), given)
        assert not torch.equal(
            other.get_submodule("conv1").weight, first.get_submodule("conv1").weight
        )
    other = quantize(model, calibration, Bits(3, 4), config.replace(seed=1), given)
    assert not torch.equal(other.get_submodule("conv1").weight, first.get_submodule("conv1").weight)


def test_known_centers_give_the_same(teacher, calibration):
    centers = collect_centers(teacher, *calibration, 10)
    got = quantize(teacher, calibration, Bits(), ALONG, centers=centers)
    assert equal(state(got), state(quantize(teacher, calibration, Bits(), ALONG)))
    moved = dataclasses.replace(centers, mean=[m + 1 for m in centers.mean])
    other = quantize(teacher, calibration, Bits(), ALONG, centers=moved)
    assert not equal(state(got), state(other))


def test_fine_tuning_helps(teacher, calibration):
    config = QuantizeConfig(method="fdda", steps=60, synthetic_batch=0, flip=False)
    untuned = quantize(teacher, calibration, Bits(2, 3), config.replace(steps=0))
    told = []
    tuned = quantize(
        teacher, calibration, Bits(2, 3), config, progress=lambda i, n, m: told.append(m)
    )
    losses = [m["student_loss"] for m in told]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert accuracy(tuned) > accuracy(untuned)


@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.5])
def test_steps_against_plain_sgd(teacher, calibration, max_grad_norm):
    """Loss, gradient norm, Nesterov momentum, weight decay and cosine, written out."""
    config = PAPER.replace(
        steps=5, cosine_steps=None, placement="full_integer", synthetic_batch=0, lr=1e-3,
        momentum=0.8, weight_decay=1e-2, temperature=2.0,
        distillation_weight=0.5, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    tuner = Finetuner(prepare(teacher, Bits(4, 4)), teacher, calibration, config)
    tuner.calibrate([calibration[0]])
    plain = copy.deepcopy(tuner.student)
    learned = [n for n, _ in teacher.named_parameters()]
    parameters = [plain.get_parameter(n) for n in learned]
    start = {n: plain.get_parameter(n).detach().clone() for n in learned}
    momentum = [torch.zeros_like(p) for p in parameters]
    for index in range(5):
        images, labels = tuner.batch(index, None)
        assert images.shape == (5, 1, 8, 8)
        with torch.no_grad():
            target = F.softmax(teacher(images) / 2, 1)
        logits = plain(images)
        divergence = (target * (target.log() - F.log_softmax(logits / 2, 1))).sum() / 5
        loss = 0.5 * 4 * divergence + F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, parameters)
        size = torch.cat([g.flatten() for g in gradients]).norm().item()
        factor = min(1.0, max_grad_norm / size)
        lr = 1e-3 * 0.5 * (1 + math.cos(math.pi * index / 5))
        with torch.no_grad():
            for p, v, g in zip(parameters, momentum, gradients, strict=True):
                g = factor * g + 1e-2 * p
                v.mul_(0.8).add_(g)
                p.sub_(lr * (g + 0.8 * v))
        metrics = tuner.step(index, None)
        assert metrics["student_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert 0 <= metrics["agreement"] <= 1
        for name, p in zip(learned, parameters, strict=True):
            got = tuner.student.get_parameter(name)
            moved, expected = got - start[name], p - start[name]
            assert expected.norm() > 0
            assert (moved - expected).norm() < 0.01 * expected.norm(), f"{index} {name}"
        assert size > 0.1  # or the smaller max_grad_norm is not tested


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.995])
def test_the_result_is_the_average(teacher, calibration, decay):
    """Of the parameters after every step, the learned ranges' among them."""
    config = REAL.replace(average_decay=decay, range_lr=0.1)
    tuner = Finetuner(prepare(teacher, Bits(2, 4)), teacher, calibration, config)
    tuner.calibrate([calibration[0]])
    expected = None
    for index in range(4):
        tuner.step(index, None)
        now = [p.detach().double() for p in tuner.student.parameters()]
        keep = min(decay, (1 + index) / (10 + index))
        if expected is None:
            expected = [p.double() for p in prepare(teacher, Bits(2, 4)).parameters()]
        expected = [keep * e + (1 - keep) * p for e, p in zip(expected, now, strict=True)]
    ranges = [q.x_max.item() for q in activation_quantizers(tuner.student)]
    student = tuner.finish()
    learned = {
        id(q.log_range): (q, x_max)
        for q, x_max in zip(activation_quantizers(student), ranges, strict=True)
    }
    for parameter, value in zip(student.parameters(), expected, strict=True):
        if id(parameter) in learned:
            quantizer, x_max = learned[id(parameter)]
            assert quantizer.x_max.item() == pytest.approx(x_max * value.exp().item(), rel=1e-5)
        else:
            torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-6)


def test_steps_in_bfloat16(teacher, calibration):
    """Near those in float32; parameters, momentum and the teacher stay float32 and as they were."""
    config, students = REAL.replace(steps=8, real_batch=64, blend=0.0, lr=1e-6), []
    before = state(teacher)
    for dtype in (torch.float32, torch.bfloat16):
        settings = config.replace(dtype=str(dtype).removeprefix("torch."))
        tuner = Finetuner(prepare(teacher, Bits(4, 4)), teacher, calibration, settings)
        tuner.calibrate([calibration[0]])
        start = state(tuner.student)
        losses = [tuner.step(index, None)["student_loss"] for index in range(8)]
        students.append((start, state(tuner.finish()), losses))
        assert all(t.dtype != torch.bfloat16 for t in tuner.state_tensors().values())
    assert equal(state(teacher), before)
    (start, exact, exact_losses), (_, near, losses) = students
    assert sum(losses) == pytest.approx(sum(exact_losses), rel=0.2)
    assert losses != exact_losses
    moved = [torch.cat([(s[n] - start[n]).flatten() for n in before]) for s in (exact, near)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


def test_cosine_steps(teacher, calibration):
    config = REAL.replace(steps=5, cosine_steps=10)
    tuner = Finetuner(prepare(teacher, Bits()), teacher, calibration, config)
    tuner.calibrate([calibration[0]])
    for index in range(3):
        tuner.step(index, None)
        lr = 1e-3 * 0.5 * (1 + math.cos(math.pi * index / 10))
        assert tuner.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_batches(teacher, calibration):
    config = REAL.replace(flip=False, max_shift=0.0)
    tuner = Finetuner(prepare(teacher, Bits()), teacher, calibration, config)
    synthetic = torch.full((3, 1, 8, 8), 7.5), torch.tensor([9, 8, 7])
    images, labels = tuner.batch(0, synthetic)
    assert images.shape == (8, 1, 8, 8)
    assert torch.equal(labels[5:], synthetic[1])
    torch.testing.assert_close(images[5:], synthetic[0])
    assert set(labels[:5].tolist()) <= set(calibration[1].tolist())
    assert torch.equal(tuner.batch(0, synthetic)[0], images)
    assert not torch.equal(tuner.batch(1, synthetic)[0][:5], images[:5])
    drawn = {int(v) for i in range(60) for v in tuner.batch(i, None)[1]}
    assert drawn == set(range(10))
    alone = Finetuner(
        prepare(teacher, Bits()),
        teacher,
        calibration,
        ALONG.replace(real_batch=0),
    )
    assert torch.equal(alone.batch(0, synthetic)[1], synthetic[1])


@pytest.mark.parametrize("augmentation", ["shift", "crop"])
def test_augmentation_of_real_and_synthetic_images(teacher, calibration, augmentation):
    config = ALONG.replace(
        augmentation=augmentation, max_shift=0.3, real_crop=(0.3, 0.4), synthetic_crop=(0.8, 0.9)
    )
    tuner = Finetuner(prepare(teacher, Bits()), teacher, calibration, config)
    synthetic = torch.randn(6, 1, 8, 8), torch.arange(6)
    got = tuner.batch(2, synthetic)[0]
    rng = stream(0, 30, 2)
    rows = torch.randint(len(calibration[0]), (5,), generator=rng)
    sources = (calibration[0][rows], rng), (synthetic[0], stream(0, 31, 2))
    if augmentation == "shift":  # by 0.3 of 8 pixels, rounded
        expected = [random_shift(images, 2, True, rng) for images, rng in sources]
    else:
        expected = [
            random_resized_crop(images, area, True, rng)
            for (images, rng), area in zip(sources, [(0.3, 0.4), (0.8, 0.9)], strict=True)
        ]
    assert torch.equal(got, torch.cat(expected))


def test_steps_see_blended_images(teacher, calibration):
    tuner = Finetuner(
        prepare(teacher, Bits()),
        teacher,
        calibration,
        REAL.replace(blend=0.7),
    )
    tuner.calibrate([calibration[0]])
    seen = []
    tuner.fused.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tuner.step(1, None)
    images = tuner.batch(1, None)[0]
    assert torch.equal(seen[0], blended(images, 0.7, stream(0, 33, 1)))
    assert not torch.equal(seen[0], images)


@pytest.mark.parametrize(
    "change",
    [{"augmentation": "cutout"}, {"max_shift": 1.5}, {"blend": -0.1}, {"label_weight": 1.0}],
)
def test_refused_augmentation(change):
    with pytest.raises(ValueError, match=f"QuantizeConfig.{next(iter(change))} must be"):
        QuantizeConfig(**change)


def test_reference_ranges_follow_the_generators_images(teacher, calibration):
    """A moving average from zero over the first range_steps steps' images, then frozen."""
    student = quantize(teacher, calibration, Bits(4, 4), PAPER.replace(steps=1, lr=1e-30))
    centers = collect_centers(teacher, *calibration, 10)
    trainer = GeneratorTrainer(teacher, centers, PAPER.synthesis)
    plain = prepare(teacher, Bits(4, 4), placement="paper", from_zero=True)
    conv = plain.get_submodule("conv1")
    high = 0.0
    for index in range(3):
        images = trainer.step(index)[0]
        with torch.no_grad():
            y = F.relu(teacher.bn1(F.conv2d(images, conv.quantized_weight(), padding=1)))
        high = 0.9 * high + 0.1 * y.max().item()
    first = activation_quantizers(student)[0]
    assert first.x_max.item() == pytest.approx(high, rel=1e-5)
    assert first.x_min.item() == 0
    assert all(q.from_zero and q.observed == 3 for q in activation_quantizers(student))


def test_ranges_are_taken_when_the_warm_up_ends(teacher, calibration):
    """From batches like those of the steps: 3 of 5 real and 6 synthetic images."""
    student = quantize(teacher, calibration, Bits(), ALONG.replace(ranges="minmax"))
    image = activation_quantizers(student)[0]
    assert image.observed == 3
    assert not image.from_zero
    assert image.x_max > 0
    assert image.x_min < 0


def test_ranges_of_real_or_synthetic_images(teacher, calibration, generator):
    """Brighter calibration images than a generator makes show which of them were looked at."""
    bright = (calibration[0] + 20, calibration[1])
    config = ALONG.replace(steps=0, ranges="minmax", correct_batch_norms=False, max_shift=0)

    def top(which, generator):
        student = quantize(teacher, bright, Bits(), config.replace(range_images=which), generator)
        return activation_quantizers(student)[0].x_max.item()

    assert top("real", None) == top("all", None) == bright[0].max().item()
    assert top("real", generator) > 15
    assert top("all", generator) > 15
    assert top("synthetic", generator) < 15
    with pytest.raises(ValueError, match="range_images='synthetic' needs a generator or steps"):
        top("synthetic", None)


def test_percentile_ranges_and_weights(teacher, calibration):
    config = QuantizeConfig(steps=0, ranges="minmax", correct_batch_norms=False)
    plain = quantize(teacher, calibration, Bits(4, 4), config)
    config = config.replace(ranges="percentile", weight_ranges="percentile", percentile=95.0)
    student = quantize(teacher, calibration, Bits(4, 4), config)
    pairs = zip(activation_quantizers(student), activation_quantizers(plain), strict=True)
    # The image has as many white pixels as that.
    assert [bool(a.x_max < b.x_max) for a, b in pairs] == [False, *[True] * 8]
    row, clipped = (s.get_submodule("conv1").weight[0].detach() for s in (plain, student))
    assert clipped.max().item() == pytest.approx(torch.quantile(row, 0.95).item(), rel=1e-5)


def interrupt_at(stop, signum=signal.SIGINT):
    def progress(done, total, metrics):
        if done == stop:
            os.kill(os.getpid(), signum)

    return progress


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("along", 1),
        ("along", 3),
        ("along", 5),
        ("paper", 2),
        ("paper", 4),
        ("real", 2),
        ("given", 3),
    ],
)
def test_resuming_is_bit_identical(teacher, calibration, generator, tmp_path, name, stop):
    """In the warm-up, between it and the first step, and later; momentum and ranges included."""
    config = {"along": ALONG, "paper": PAPER, "real": REAL, "given": ALONG}[name]
    arguments = (teacher, calibration, Bits(3, 4), config, generator if name == "given" else None)
    path = tmp_path / "checkpoint.safetensors"
    straight = quantize(*arguments)
    with pytest.raises(KeyboardInterrupt):
        quantize(*arguments, checkpoint=path, progress=interrupt_at(stop))
    assert path.is_file()
    done = []
    resumed = quantize(
        *arguments, checkpoint=path, resume=True, progress=lambda i, n, m: done.append(i)
    )
    assert done[0] == stop + 1
    assert equal(state(straight), state(resumed))
    done.clear()
    again = quantize(
        *arguments, checkpoint=path, resume=True, progress=lambda i, n, m: done.append(i)
    )
    assert not done
    assert equal(state(straight), state(again))


def test_checkpoints_of_others_are_refused(teacher, calibration, generator, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantize(
            teacher, calibration, Bits(), ALONG, generator,
            checkpoint=path, progress=interrupt_at(2),
        )  # fmt: skip
    other_model = copy.deepcopy(teacher)
    other_model.fc.bias.data += 1
    other_norm = copy.deepcopy(teacher)
    other_norm.bn1.running_var *= 2
    other_generator = copy.deepcopy(generator)
    other_generator.norm3.running_mean += 1
    images, labels = calibration
    for arguments in (
        (other_model, calibration, Bits(), ALONG, generator),
        (other_norm, calibration, Bits(), ALONG, generator),
        (teacher, (images + 0.1, labels), Bits(), ALONG, generator),
        (teacher, (images, labels.flip(0)), Bits(), ALONG, generator),
        (teacher, calibration, Bits(4, 5), ALONG, generator),
        (teacher, calibration, Bits(), ALONG.replace(lr=1e-5), generator),
        (teacher, calibration, Bits(), ALONG, other_generator),
        (teacher, calibration, Bits(), ALONG, None),
    ):
        with pytest.raises(ValueError, match="other settings, model or data"):
            quantize(*arguments, checkpoint=path, resume=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        quantize(teacher, calibration, Bits(), ALONG, generator, checkpoint=path, resume=True)


def test_missing_classes(teacher, calibration):
    images, labels = calibration
    rows = (labels == 2) | (labels == 7)
    part = images[rows], labels[rows]
    student = quantize(teacher, part, Bits(4, 4), ALONG)
    assert student(images).shape == (20, 10)
    assert not equal(state(student), state(quantize(teacher, calibration, Bits(4, 4), ALONG)))


def test_only_unreliable_classes(teacher, calibration):
    images, labels = calibration
    wrong = images, (labels + 1) % 10
    with pytest.raises(ValueError, match="misclassifies the calibration images of every class"):
        quantize(teacher, wrong, Bits(), ALONG)
    assert teacher.conv1.weight.requires_grad
    quantize(teacher, wrong, Bits(), REAL)  # no centers are needed


def test_plain_sequential():
    """No BatchNorm is needed where no generator has to be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip
    images = torch.randn(8, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    student = quantize(model, (images, labels), Bits(8, 8), ALONG.replace(steps=2))
    with torch.no_grad():
        assert student(images).shape == (8, 4)
    untuned = quantize(model, (images, labels), Bits(8, 8), QuantizeConfig(steps=0))
    with torch.no_grad():
        assert (untuned(images) - model(images)).abs().max() < 0.1
    bare = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7 * 9, 4))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        quantize(bare, (images, labels), Bits(), ALONG)


def test_keep_float_and_placement_reach_the_student(teacher, calibration):
    config = QuantizeConfig(steps=0, keep_float=("fc",))
    student = quantize(teacher, calibration, Bits(), config)
    assert type(student.get_submodule("fc")) is nn.Linear
    paper = quantize(teacher, calibration, Bits(), QuantizeConfig(steps=0, placement="paper"))
    assert not any(q.include_zero for q in activation_quantizers(paper))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, n: (i[0], n), r"float \[N, C, H, W\]"),
        (lambda i, n: (i, n[:-1]), r"int64 \[20\]"),
        (lambda i, n: (i, n + 1), r"0\.\.9, got 1\.\.10"),
        (lambda i, n: (i[:0], n[:0]), "is empty"),
    ],
)
def test_calibration_is_checked(teacher, calibration, change, message):
    with pytest.raises(ValueError, match=message):
        quantize(teacher, change(*calibration), Bits(), ALONG)


@pytest.mark.parametrize("shape", [(9, (1, 8, 8)), (10, (1, 8, 12)), (10, (3, 8, 8))])
def test_a_generator_of_other_images_is_refused(teacher, calibration, shape):
    with pytest.raises(ValueError, match="generator makes"):
        quantize(teacher, calibration, Bits(), ALONG, Generator(*shape))


def test_divergence_is_reported(teacher, calibration):
    config = REAL.replace(lr=1e30, max_grad_norm=math.inf)
    with pytest.raises(ValueError, match="diverged at step"):
        quantize(teacher, calibration, Bits(), config)


def test_ranges_are_restored_to_quantize_mode(teacher, calibration):
    student = prepare(teacher, Bits())
    with quantizer_mode(student, "observe"), torch.no_grad():
        student(calibration[0])
    assert {q.mode for q in activation_quantizers(student)} == {"quantize"}


def test_paper_placement_without_any_relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    calibration = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    config = QuantizeConfig(steps=0, placement="paper")
    assert not activation_quantizers(quantize(model, calibration, Bits(), config))


def test_a_dead_activation_does_not_spread():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    model[1].bias.data.fill_(-100)
    calibration = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    student = quantize(model, calibration, Bits(), REAL)
    assert student(calibration[0]).isfinite().all()


def test_divergence_in_the_last_step_is_reported(teacher, calibration):
    config = REAL.replace(steps=1, lr=1e38, max_grad_norm=math.inf)
    with pytest.raises(ValueError, match="diverged"):
        quantize(teacher, calibration, Bits(), config)


def test_more_synthetic_images_than_the_generator_makes(teacher, calibration):
    config = ALONG.replace(synthetic_batch=SYNTHESIS.batch_size + 1)
    with pytest.raises(ValueError, match=r"synthetic_batch must be <= synthesis.batch_size \(6\)"):
        quantize(teacher, calibration, Bits(), config)
