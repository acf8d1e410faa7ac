"""Scores of networks whose answers are known, and intervals from the literature."""

import math

import numpy as np
import pytest
import torch

from fdda_fast.data.preprocessing import Preprocessing
from fdda_fast.data.sources import ArraySource
from fdda_fast.evaluation import Share, evaluate, predictions

CLASSES = 7


@pytest.fixture
def source():
    """Ten images of one pixel, their numbers; no image of class 6."""
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    names = [str(c) for c in range(CLASSES)]
    preprocessing = Preprocessing(1, 1, (0.0,), (1.0,))
    return ArraySource("numbers", pixels, labels, names, preprocessing, "none", flip=False)


def answering(logits):
    """A network that gives image i the row i."""
    return lambda images: logits[(images[:, 0, 0, 0] * 255).round().long()]


def test_scores(source):
    right = torch.nn.functional.one_hot(source.labels, CLASSES).float()
    ranks = torch.arange(CLASSES, 0, -1).float().repeat(10, 1)  # 0, 1, 2 ...: always class 0
    scores = evaluate({"right": answering(right), "fixed": answering(ranks)}, source, batch_size=3)
    assert scores["right"].top1 == Share(10, 10)
    assert [s.total for s in scores["right"].per_class] == [2, 2, 2, 2, 1, 1, 0]
    assert scores["fixed"].top1 == Share(2, 10)
    assert scores["fixed"].top5 == Share(9, 10)  # all but class 5
    assert [s.count for s in scores["fixed"].per_class] == [2, 0, 0, 0, 0, 0, 0]
    assert scores["fixed"].agreement == {"right": Share(2, 10), "fixed": Share(10, 10)}


def test_limit_and_few_classes(source):
    network = answering(torch.eye(10)[:, :2])
    scores = evaluate({"two": network}, source, limit=5)["two"]
    assert scores.top1.total == 5
    assert scores.top5.total == 5
    with pytest.raises(ValueError, match="limit must be >= 1"):
        evaluate({"two": network}, source, limit=0)


def test_other_outputs_than_logits_are_refused(source):
    network = answering(torch.zeros(10, CLASSES, 1, 1))
    with pytest.raises(ValueError, match=r"mine: expected logits \[N, K\], got \[10, 7, 1, 1\]"):
        evaluate({"mine": network}, source)
    with pytest.raises(ValueError, match=r"network: expected logits \[N, K\], got \[10, 7, 1"):
        predictions(network, source)


def test_equal_logits_count_as_in_predictions(source):
    network = answering(torch.zeros(10, CLASSES))
    top1 = evaluate({"flat": network}, source)["flat"].top1
    assert top1.count == int((predictions(network, source) == source.labels).sum()) == 2


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(count, total, low, high):
    assert Share(count, total).interval() == pytest.approx((low, high), abs=5e-5)
    mirrored = Share(total - count, total).interval()
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_shares_of_nothing_and_wrong_confidence():
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).interval() == (0, 1)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        Share(1, 2).interval(1.0)
