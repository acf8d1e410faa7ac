"""Names of settings, tensors and networks."""

import copy

import pytest
import torch
from torch import nn

from fdda_fast import SynthesisConfig
from fdda_fast.fingerprints import check_teacher, fingerprint

SETTINGS = SynthesisConfig()


def test_settings_and_tensors():
    a, b = torch.arange(4.0), torch.arange(4.0).reshape(2, 2).T
    assert fingerprint(SETTINGS, a) == fingerprint(SETTINGS.replace(), a.clone())
    names = [
        fingerprint(settings, *tensors)
        for settings, tensors in [
            (SETTINGS, [a]), (SETTINGS, [b]), (SETTINGS, [a + 1]), (SETTINGS, []),
            (SETTINGS, [a[None]]), (SETTINGS, [a.to(torch.int32)]), (SETTINGS, [a, a]),
            (SETTINGS, [a.bfloat16()]), (SETTINGS.replace(lr=2e-3), [a]),
        ]
    ]  # fmt: skip
    assert len(set(names)) == len(names)


def test_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    own = fingerprint({}, model)
    alike = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    assert fingerprint({}, alike) == own
    alike[1].running_var[2] += 1e-6
    assert fingerprint({}, alike) != own
    assert fingerprint({}, nn.ModuleList(model)) == own
    assert fingerprint({}, nn.Sequential(model)) != own


def test_check_teacher():
    one, other = (fingerprint({}, torch.tensor(i)) for i in range(2))
    check_teacher("file", one, one)
    check_teacher("file", "", one)
    with pytest.raises(
        ValueError, match=f"file: made with another teacher .*{one[:12]}"
    ) as refused:
        check_teacher("file", one, other)
    assert one[:12] in str(refused.value)
    assert other[:12] in str(refused.value)
