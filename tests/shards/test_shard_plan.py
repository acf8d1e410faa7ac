"""Labels of blocks, settings, files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast.shards.plan import LabelPlan, ShardConfig, ShardFolder, read_json, write_json


def labels_of(plan, counts, blocks):
    """Labels among all classes, int [64 * blocks], and the generator of each block."""
    offsets = np.cumsum([0, *counts])
    found, generators = [], []
    for number in range(blocks):
        generator, labels = plan.block(number)
        assert labels.shape == (64,)
        assert 0 <= labels.min() <= labels.max() < counts[generator]
        found.append(labels.numpy() + offsets[generator])
        generators.append(generator)
    return np.concatenate(found), generators


@pytest.mark.parametrize("classes", [1, 3, 10, 64, 1000])
def test_one_generator_takes_classes_in_turn(classes):
    labels, _ = labels_of(LabelPlan([classes]), [classes], 40)
    assert np.array_equal(labels, np.arange(64 * 40) % classes)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_classes_are_balanced(counts):
    classes = sum(counts)
    plan = LabelPlan(counts)
    labels, _ = labels_of(plan, counts, 2 * classes)
    for half in np.split(labels, 2):
        assert (np.bincount(half, minlength=classes) == 64).all()


def test_classes_are_balanced_in_between():
    counts = [100] * 10
    labels, _ = labels_of(LabelPlan(counts), counts, 200)
    per_class = np.bincount(labels, minlength=1000)
    assert per_class.min() >= 10
    assert per_class.max() <= 16  # 12.8 each


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_weights(counts, seed):
    rng = np.random.default_rng(seed)
    classes = sum(counts)
    weights = rng.random(classes) * (rng.random(classes) < 0.7)
    weights[rng.integers(classes)] = 1.0
    plan = LabelPlan(counts, tuple(weights))
    labels, _ = labels_of(plan, counts, 300)
    shares = np.bincount(labels, minlength=classes) / len(labels)
    assert np.abs(shares - weights / weights.sum()).max() < 0.02
    assert not shares[weights == 0].any()


def test_weights_need_one_per_class():
    with pytest.raises(ValueError, match=r"one number per class \(5\), got 2"):
        LabelPlan([2, 3], (1.0, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images must be >= 1"),
        ({"shard_size": 100}, "shard_size must be a positive multiple of 64, got 100"),
        ({"shard_size": 0}, "shard_size must be"),
        ({"image_format": "jpg"}, "image_format must be one of"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"class_weights": (1.0, -1.0)}, "class_weights must be finite"),
        ({"class_weights": (0.0, 0.0)}, "class_weights must be finite"),
        ({"class_weights": (float("nan"),)}, "class_weights must be finite"),
        ({"min_confidence": 1.5}, "min_confidence must be in"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ShardConfig(**changes)


@pytest.mark.parametrize(("images", "sizes"), [(1, [1]), (64, [64]), (65, [64, 1])])
def test_indices(images, sizes):
    config = ShardConfig(num_images=images, shard_size=64)
    shards = [config.indices(k) for k in range(config.num_shards)]
    assert [len(s) for s in shards] == sizes
    assert [i for s in shards for i in s] == list(range(images))


@pytest.mark.parametrize("text", ["", "[1]", '{"bytes": 3', "null", "{}", '{"bytes": 4}'])
def test_a_damaged_record_does_not_count(tmp_path, text):
    folder = ShardFolder(tmp_path)
    folder.shard(2).write_bytes(b"abc")
    folder.record(2).write_text(text)
    assert folder.finished(2) is None
    write_json(folder.record(2), {"bytes": 3})
    assert folder.finished(2) == {"bytes": 3}
    folder.shard(2).unlink()
    assert folder.finished(2) is None


def test_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "a")
    for text in ("{", "[]"):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ValueError, match="not "):
            read_json(tmp_path / "a")
