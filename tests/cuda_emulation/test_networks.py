"""Whole packed networks on the emulated CUDA kernels equal the CPU's, integer for integer."""

import sys

import pytest
import torch
from code_arguments import (
    run_dequantize_codes,
    run_dequantize_sums,
    run_max_pool,
    run_quantize,
    run_requantize_codes,
    run_requantize_codes_packed,
    run_sum_pool,
)
from emulation import ROOT, build_operators, needs_compiler
from packed_arguments import run_conv, run_linear, run_reorder
from torch.utils._python_dispatch import TorchDispatchMode

from fdda_fast import ops
from fdda_fast.deploy import runtime
from fdda_fast.deploy.integer import PackedCodes, Sums
from fdda_fast.quantization.bits import Bits

sys.path.insert(0, str(ROOT / "tests/deploy"))
from networks import images, packed_network

pytestmark = needs_compiler


def with_defaults(args, required, *last):
    """Without those that equal the defaults, residual, residual_scale, output_range, they come."""
    return (*args, *(None, 0.0, None, *last)[len(args) - required :])


class EmulatedCuda(TorchDispatchMode):
    """Runs the operators of `fdda` as csrc/cuda/registration.cpp does, by the emulated kernels."""

    def __init__(self, emulation, capability):
        super().__init__()
        self.emulation, self.capability = emulation, capability
        self.operators = set()
        self.packed = 0  # convolutions of packed codes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fdda":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        self.operators.add(name)
        self.emulation.reset(len(self.operators))
        return getattr(self, name)(*args, **(kwargs or {}))

    def reordered_conv2d(self, *args):
        *args, x_bits, x_packed, out_packed = with_defaults(args, 13, 8, False, False)
        self.packed += x_packed
        return run_conv(
            self.emulation,
            "reordered_conv2d",
            args,
            x_bits=x_bits,
            capability=self.capability,
            x_packed=x_packed,
            out_packed=out_packed,
        )

    def packed_conv2d(self, *args):
        return run_conv(self.emulation, "packed_conv2d", with_defaults(args, 13))

    def packed_linear(self, *args):
        assert args[0].dtype == torch.int32
        return run_linear(self.emulation, with_defaults(args, 8))

    def reorder_weight(self, *args):
        return run_reorder(self.emulation, *args)

    def quantize(self, *args):
        return run_quantize(self.emulation, *args)

    def requantize_codes(self, *args):
        return run_requantize_codes(self.emulation, *args)

    def requantize_codes_packed(self, *args):
        return run_requantize_codes_packed(self.emulation, *args)

    def dequantize_codes(self, *args):
        return run_dequantize_codes(self.emulation, *args)

    def dequantize_sums(self, *args):
        return run_dequantize_sums(self.emulation, *args)

    def max_pool2d_codes(self, *args):
        return run_max_pool(self.emulation, *args)

    def sum_pool_codes(self, *args):
        return run_sum_pool(self.emulation, *args)


@pytest.fixture(scope="module")
def emulation():
    return build_operators()


def equal(a, b):
    if isinstance(a, PackedCodes):
        return torch.equal(ops.unpack_codes(a.data), b)
    if isinstance(a, Sums):
        return a.count == b.count and torch.equal(a.total, b.total)
    if isinstance(a, tuple):
        return all(map(equal, a, b))
    return torch.equal(a, b)


def outputs(packed, x):
    values = {}
    logits = packed.execute(x, lambda node, tensors, inputs, y: values.update({node.name: y}))
    return logits, values


# Together they have every operator.
OPERATORS = {
    "stem": {"max_pool2d_codes", "quantize", "sum_pool_codes"},
    "inverted": {"reordered_conv2d", "requantize_codes", "packed_linear"},
    "grouped": {"packed_conv2d"},
    "wide": {"requantize_codes_packed"},
    "vgg": {"reordered_conv2d"},
    "dense": {"quantize"},
    "pooled_sum": {"dequantize_sums"},
    "branches": {"dequantize_codes"},
}


@pytest.mark.parametrize(
    ("name", "bits", "capability"),
    [
        *(("stem", bits, 80) for bits in (2, 4, 8)),
        *(("wide", 4, capability) for capability in (80, 90)),
        ("stem", 4, 90),
        *((name, 4, 86) for name in OPERATORS if name not in ("stem", "wide")),
    ],
)
def test_network(emulation, monkeypatch, name, bits, capability):
    packed = packed_network(name, Bits(bits, bits))[1]
    x = images(2)
    expected_logits, expected = outputs(packed, x)
    monkeypatch.setattr(runtime, "has_cuda_kernels", lambda device: True)
    with EmulatedCuda(emulation, capability) as mode:
        packed.to("cpu")  # binds the tensors anew, as a change of the device does
        logits, values = outputs(packed, x)
    assert mode.operators >= OPERATORS[name]
    assert (mode.packed > 0) == (name == "wide")
    for node, value in values.items():
        assert equal(value, expected[node]), node
    assert torch.equal(logits, expected_logits)
    monkeypatch.undo()
    packed.to("cpu")
    assert torch.equal(packed(x), expected_logits)
