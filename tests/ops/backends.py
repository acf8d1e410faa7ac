"""The instruction sets a test runs on, and input builders shared by the operator tests."""

import math
from contextlib import nullcontext

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _library

_INFO = ops.backend_info()
# Without compiled operators the public functions run the reference: one rung, called None.
ISAS = [isa for isa in _INFO["isas_compiled"] if isa in _INFO["isas_supported"]] or [None]

QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def on_isa(isa):
    return nullcontext() if isa is None else _library.use_isa(isa)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw_residual(draw, g, shape, top):
    """What a packed operator may add: nothing, codes or floats."""
    kind = draw(st.sampled_from([None, torch.uint8, torch.float32]))
    return None if kind is None else (torch.rand(shape, generator=g) * top).to(kind)


def bits_of(x):
    """Bit patterns, so that 0.0 and -0.0 differ and NaN equals NaN."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(kind)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(bits_of(actual)[~nan], bits_of(expected)[~nan])


def norm_tensors(channels, g):
    """weight (one 0, some negative), bias, running_mean, running_var."""
    weight, bias, mean = torch.randn(3, channels, generator=g)
    weight[0] = 0.0
    return weight, bias, mean, torch.rand(channels, generator=g) + 0.05


def limits(relu):
    """The clipping that `relu` of an operator stands for."""
    return (
        -math.inf if relu is False else 0.0,
        math.inf if isinstance(relu, bool) else relu,
    )


def with_threads(threads, function, *args):
    """function(*args) on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def assert_threads_agree(function, *args):
    """The tensors that function(*args) makes are the same on one thread and on two."""
    one, two = (with_threads(threads, function, *args) for threads in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
