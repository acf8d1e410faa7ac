"""What a CUDA graph may capture, shown without a GPU: a run neither waits for the device nor copies
to or from it, and every integer operator is a kernel of the CUDA library.

Memory is torch's: within a capture it comes from the graph's own pool, so that a replay allocates
nothing. `test_gpu.py` captures on a GPU.
"""

import re
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, images, packed_network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdda_fast.deploy import runtime
from fdda_fast.ops import reference
from fdda_fast.quantization.bits import Bits

CUDA_SOURCES = sorted((Path(__file__).parents[2] / "csrc/cuda").rglob("*.*"))
REGISTRATION = next(path for path in CUDA_SOURCES if path.name == "registration.cpp")
COMPILED = set(re.findall(r"m\.impl\(\"(\w+)\"", REGISTRATION.read_text()))


class Launches(TorchDispatchMode):
    """Notes the operators, and refuses those that read or write what is not on the GPU."""

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                raise AssertionError(f"{func} has a tensor on {value.device}")
        self.operators.add(func._schema.name)
        return out


def as_on_cuda(packed, monkeypatch):
    """Binds the model to tensors of a GPU without data: reading one raises an exception."""
    monkeypatch.setattr(runtime, "has_cuda_kernels", lambda device: device.type == "cuda")
    packed.tensors = {name: t.to("cuda") for name, t in packed.tensors.items()}
    packed._bind()
    return packed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_run_stays_on_the_device(name, bits, monkeypatch):
    packed = packed_network(name, Bits(bits, bits))[1]
    x = images(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed, x = as_on_cuda(packed, monkeypatch), x.to("cuda")
        with Launches() as launches:
            logits = packed(x)
    assert logits.device.type == "cuda"
    ours = {name.partition("::")[2] for name in launches.operators if name.startswith("fdda::")}
    assert ours
    assert ours <= COMPILED


def test_operators_without_a_kernel_stay_there_too():
    """Those of a machine that has Triton's kernels only."""
    with FakeTensorMode(), Launches() as launches:
        image = torch.empty(2, 3, 4, 5, device="cuda")
        codes = reference.quantize(image, 3.0, 1.0, 8)
        reference.requantize_codes(codes, 3.0, 1, 2.0, 0.0, 4)
        reference.max_pool2d_codes(codes, [2, 2], [2, 2], [0, 0], [1, 1], False)
        reference.dequantize_codes(codes, 3.0, 1)
        reference.dequantize_sums(reference.sum_pool_codes(codes), 20, 3.0, 1)
    assert launches.operators


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * (1.0 if x.sum() > 0 else 2.0),
        lambda x: x * torch.tensor([2.0], device=x.device),
        lambda x: x.cpu().to(x.device),
    ],
)
def test_faults_are_seen(fault):
    with FakeTensorMode(), Launches(), pytest.raises((AssertionError, RuntimeError)):
        fault(torch.empty(3, device="cuda"))


def test_sources_call_nothing_that_waits_or_allocates():
    """Of CUDA's runtime: the launch, and what may be asked in a capture."""
    called = set()
    for source in CUDA_SOURCES:
        code = re.sub(r"//.*", "", source.read_text())
        called |= set(re.findall(r"\b(cuda[A-Z]\w*)\s*\(", code))
    assert called == {"cudaLaunchKernelEx", "cudaDeviceGetAttribute"}
