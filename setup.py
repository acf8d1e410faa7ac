"""Builds the C++ and CUDA operators; the metadata is in pyproject.toml.

FDDA_FAST_NO_EXTENSION=1  installs without compiled operators (plain PyTorch runs instead)
FDDA_FAST_CUDA=0          leaves the CUDA operators out (they are built when nvcc is there)
FDDA_FAST_CUDA=1          insists on the CUDA operators
FDDA_FAST_SANITIZE=1      checks addresses and undefined behaviour at run time, see `make sanitize`
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup

TORCH_TARGET = "0x020a000000000000"  # torch 2.10
CUDA_KERNELS = ("packed.cu", "depthwise.cu", "codes.cu", "pools.cu", "gemm/gemm.cu")
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100")

# Contracting a*b+c into one instruction would change results between instruction sets.
COMMON_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
SANITIZERS = []
if os.environ.get("FDDA_FAST_SANITIZE") == "1":
    # Empty tensors make null pointers, which memset and memcpy of no bytes may be given.
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=nonnull-attribute"]
    COMMON_FLAGS += ["-O1", "-g", "-fno-sanitize-recover=undefined", *SANITIZERS]
# Neither errno nor floating-point exceptions are read: comparisons and roundings may be vectorised.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
BFLOAT16_KERNELS = [
    *("bn_relu_fake_quantize", "class_moments", "few_outputs_conv", "norm_strip"),
    *("norm_few_outputs", "products", "product_bfloat16"),
    *("winograd_bfloat16", "winograd_upsample_bfloat16"),
]
PORTABLE_KERNELS = [
    *BFLOAT16_KERNELS,
    *("conditional_bn", "fake_quantize", "upsample_conv", "winograd", "winograd_upsample"),
    *("upsample_norm", "linear_maps", "max_pool", "pixels", "weights", "depthwise", "table"),
]
# gcc 12 reports its own "undefined register" intrinsics.
GCC_NOISE = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512_KERNELS = [*PORTABLE_KERNELS, "gemm_u8s8__avx512", "winograd_u8s8__avx512"]
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mprefer-vector-width=512", *GCC_NOISE),
]
AVX512VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
ISAS = {
    "generic": ([*PORTABLE_KERNELS, "gemm_s16"], []),
    "avx2": ([*PORTABLE_KERNELS, "gemm_6x16__avx2"], ["-mavx2", "-mf16c"]),
    # Packed convolutions only, in either encoding; everything else is avx2's.
    "avxvnni": (["gemm_u8s8_6x16__avxvnni"], ["-mavx2", "-mavxvnni"]),
    "avxvnni_evex": (["gemm_u8s8_6x16__avxvnni"], ["-mavx2", "-mavx512vl", "-mavx512vnni"]),
    "avx512": (AVX512_KERNELS, AVX512_FLAGS),
    "avx512vnni": (
        [*AVX512_KERNELS, "winograd_f3_u8s8__avx512vnni", "winograd_f4_u8s8__avx512vnni"],
        AVX512VNNI_FLAGS,
    ),
    # A part of avx512vnni where the processor has it.
    "avx512bf16": ([*BFLOAT16_KERNELS, "table_bfloat16"], [*AVX512VNNI_FLAGS, "-mavx512bf16"]),
    # Packed convolutions only; everything else is avx512vnni's.
    "amx": (
        ["gemm_u8s8_32x32__amx"],
        [
            *AVX512VNNI_FLAGS,
            *("-mgfni", "-mavx512vbmi", "-mavx512vbmi2", "-mamx-tile", "-mamx-int8"),
        ],
    ),
}


def isas() -> list[str]:
    return list(ISAS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]


def wants_extension() -> bool:
    if os.environ.get("FDDA_FAST_NO_EXTENSION") == "1":
        reason = "FDDA_FAST_NO_EXTENSION=1"
    elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        reason = "no C++ compiler found"
    else:
        return True
    print(f"fdda-fast: {reason}; installing without compiled operators, PyTorch runs instead")
    return False


def cuda_toolkit(detected: str | None) -> str | None:
    """The toolkit's folder. torch derives it from nvcc's path, which fails for wrapper scripts."""
    for home in (detected, "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda.h").exists():
            return home
    return None


def wants_cuda(torch, toolkit: str | None) -> bool:
    choice = os.environ.get("FDDA_FAST_CUDA")
    if choice not in (None, "0", "1"):
        raise SystemExit(f"FDDA_FAST_CUDA: expected 0 or 1, got {choice!r}")
    usable = toolkit is not None and torch.version.cuda is not None
    if choice == "1" and not usable:
        raise SystemExit("FDDA_FAST_CUDA=1: needs nvcc and a torch built for CUDA")
    return usable and choice != "0"


def cuda_extension(CUDAExtension) -> Extension:
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return CUDAExtension(
        "fdda_fast._C_cuda",
        [f"csrc/cuda/{name}" for name in ("registration.cpp", *CUDA_KERNELS)],
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": COMMON_FLAGS,
            "nvcc": ["-O3", "-std=c++17", "-fmad=false", "--threads=2", *code],
        },
    )


def extension_arguments() -> dict:
    if not wants_extension():
        return {}
    import torch
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Compiles the CPU kernels once per instruction set, each with its own flags."""

        def build_extension(self, ext):
            if ext.name == "fdda_fast._C":
                build_temp = self.build_temp
                for isa in isas():
                    kernels, flags = ISAS[isa]
                    flags = [*COMMON_FLAGS, *KERNEL_FLAGS, *flags, f"-DFDDA_ISA={isa}"]
                    ext.extra_objects += self.compiler.compile(
                        [str(Path("csrc/cpu", f"{name}.cpp").resolve()) for name in kernels],
                        output_dir=str(Path(build_temp, isa).resolve()),
                        extra_postargs={"cxx": flags, "nvcc": [], "sycl": []},
                    )
            super().build_extension(ext)

    cpu = cpp_extension.CppExtension(
        "fdda_fast._C",
        [
            *sorted(str(p) for p in Path("csrc/registration").glob("*.cpp")),
            *("csrc/module.cpp", "csrc/parallel.cpp", "csrc/peak.cpp", "csrc/program.cpp"),
            "csrc/cpu/dispatch.cpp",
        ],
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": COMMON_FLAGS},
        extra_link_args=SANITIZERS,
        depends=[str(p) for p in sorted(Path("csrc").rglob("*")) if p.is_file()],
    )
    extensions = [cpu]
    toolkit = cuda_toolkit(cpp_extension.CUDA_HOME)
    if wants_cuda(torch, toolkit):
        cpp_extension.CUDA_HOME = toolkit
        extensions.append(cuda_extension(cpp_extension.CUDAExtension))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["fdda_fast", "fdda_fast.*"]), "fdda_fast.kernels"],
    package_dir={"fdda_fast.kernels": "kernels"},
    package_data={"fdda_fast.models": ["weights/*.safetensors"], "fdda_fast": ["py.typed"]},
    **extension_arguments(),
)
