"""The Triton kernels: numbers under the interpreter, and compilation without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def build(kernel, signature, constants, capability, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_offline(capability, dtype):
    from fdda_fast.kernels import class_moments as moments
    from fdda_fast.kernels import fake_quantize as quantize

    pointers = {"x": f"*{dtype}", "y": f"*{dtype}", "scale": "*fp32", "zero_point": "*fp32"}
    sizes = {"size": "i32", "channel_stride": "i32", "channels": "i32", "half": "fp32"}
    for per_channel in (False, True):
        binary = build(
            quantize.fake_quantize_kernel,
            pointers | sizes,
            {"PER_CHANNEL": per_channel, "BLOCK": quantize.BLOCK},
            capability,
            enable_fp_fusion=False,
        )
        # Bit equality with the CPU rests on these two.
        assert "div.rn.f32" in binary.asm["ptx"]
        assert "fma" not in binary.asm["ptx"]
        if dtype == "bf16":
            assert "cvt.rn.bf16" in binary.asm["ptx"]
    signature = {"x": f"*{dtype}", "mean_out": "*fp32", "m2_out": "*fp32", "channels": "i32"}
    signature |= dict.fromkeys(("pixels", "stride_n", "stride_c", "stride_p"), "i32")
    for block_p, block_c in ((64, 64), (moments.BLOCK, 1)):
        constants = {"BLOCK_P": block_p, "BLOCK_C": block_c}
        assert build(moments.sample_moments_kernel, signature, constants, capability).asm["cubin"]
    signature = {"x": f"*{dtype}", "grad_x": f"*{dtype}", "shift": "*fp32", "slope": "*fp32"}
    signature |= {"mean": "*fp32", "size": "i32"}
    signature |= dict.fromkeys(("stride_n", "batch", "stride_c", "channels"), "i32")
    constants = {"BLOCK": moments.BLOCK}
    assert build(moments.backward_kernel, signature, constants, capability).asm["cubin"]
