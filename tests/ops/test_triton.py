"""The Triton kernels: numbers under the interpreter, and compilation without a GPU."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fdda_fast import ops
from fdda_fast.kernels import OPERATORS, offline

# Of mma and wgmma, of tcgen05, of mfma.
INT8_PRODUCTS = re.compile(r"mma\S*\.s8\.s8|tcgen05\.mma\S*::i8|v_mfma_i32")
INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("entry", offline.TABLE, ids=lambda entry: entry.name)
def test_compiled_kernels(entry, target):
    """No spills; accesses to aligned tensors are of 128 bits, as many as the table says."""
    for constants, dtype in entry.tested:
        binary = offline.build(entry, constants, dtype, offline.TARGETS[target])
        found = offline.resources(binary)
        assert found.spills == 0, (constants, dtype)
        aligned = constants.get("ALIGN") == 16
        if entry.passes and aligned:
            passes = found.wide_passes(constants, dtype)
            if constants.get("LAST"):  # parameters of consecutive channels come in addition
                assert passes >= entry.passes(constants), (constants, dtype)
            else:
                assert passes == entry.passes(constants), (constants, dtype)
        elif "BLOCK_K" in constants and aligned:  # a matrix product
            assert found.wide_loads
            if "types" in constants:
                assert INT8_PRODUCTS.search(binary.asm.get("ptx") or binary.asm["amdgcn"])
            else:  # AMD's stores its registers as they lie
                assert found.wide_stores or "amdgcn" in binary.asm
        if "ptx" in binary.asm and entry.exact:
            assert "fma" not in binary.asm["ptx"]
        if "ptx" in binary.asm and dtype == "bf16" and found.wide_stores:
            # The interpreter truncates, so that rounding to bfloat16 shows here only.
            assert "y" not in entry.kernel.arg_names or "cvt.rn.bf16" in binary.asm["ptx"]


@pytest.mark.parametrize("name", ["affine", "range", "row", "bn_fake_quantize"])
def test_division_is_ieee(name):
    """Bit equality with the CPU rests on it."""
    entry = next(e for e in offline.TABLE if e.name == name)
    for constants, dtype in entry.tested:
        binary = offline.build(entry, constants, dtype, offline.TARGETS["sm_90"])
        assert "div.rn.f32" in binary.asm["ptx"]


def test_registered_functions_have_the_arguments_of_their_schema():
    for name, function in OPERATORS.items():
        schema = getattr(torch.ops.fdda, name).default._schema
        arguments = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(function).parameters)[: len(arguments)] == arguments


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_kernels_come_first(compiled):
    """On a machine that has a GPU, as far as this package is told."""
    if compiled and not ops.backend_info()["cuda_built"]:
        pytest.skip("the CUDA library is not built")
    code = """if True:
        import sys, torch, torchvision
        torch.cuda.is_available = lambda: True
        if not int(sys.argv[1]):
            torch.ops.load_library = lambda path: None
        import fdda_fast.ops
        for name in ("packed_conv2d", "class_moments"):
            dump = torch._C._dispatch_dump(f"fdda::{name}")
            print(next(line for line in dump.splitlines() if line.startswith("CUDA:")))
        """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(int(compiled))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    packed, moments = done.stdout.splitlines()
    assert ("csrc/cuda/registration.cpp" if compiled else "_library.py") in packed
    assert "_library.py" in moments


def test_every_kernel_is_in_the_table():
    from triton.runtime.jit import JITFunction

    kernels = {entry.kernel.__name__ for entry in offline.TABLE}
    modules = {entry.kernel.__module__ for entry in offline.TABLE}
    for module in modules:
        for name, value in vars(sys.modules[module]).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                assert name in kernels
