"""What tests of students of the digits' teacher share."""

import torch

from fdda_fast.data import open_source


def state(student):
    return {n: t.clone() for n, t in student.state_dict().items()}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


def accuracy(model):
    test = open_source("digits", "test")
    with torch.no_grad():
        return (model(test.images(range(len(test)))).argmax(1) == test.labels).float().mean().item()
