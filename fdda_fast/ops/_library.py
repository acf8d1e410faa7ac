"""The `fdda` operator library: definitions, compiled kernels, choice of instruction set."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ISAS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", "amx")

LIBRARY = torch.library.Library("fdda", "DEF")

_extension: ModuleType | None = None
_cuda_loaded = False


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Define `fdda::` + schema, run by `reference` wherever no faster kernel is registered.

    Args:
        schema: name and signature.
        reference: the operator in plain PyTorch, for every device.
        fake: shapes, dtypes and strides of the result, without data.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdda::{name}", fake, lib=LIBRARY)


def define_pass(schema: str) -> None:
    """Define `fdda::` + schema: a compiled pass within an operator's CPU implementation."""
    LIBRARY.define(schema)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give `fdda::name` its gradient."""
    torch.library.register_autograd(
        f"fdda::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def load_extension() -> None:
    """Register the compiled kernels, as the environment asks.

    `FDDA_FAST_BACKEND=reference` loads none; `FDDA_FAST_ISA` selects the instruction set.

    Raises:
        ValueError: a variable has an unknown value, or this processor lacks the instruction set.
    """
    backend = os.environ.get("FDDA_FAST_BACKEND", "")
    isa = os.environ.get("FDDA_FAST_ISA", "")
    if backend not in ("", "reference"):
        raise ValueError(f"FDDA_FAST_BACKEND: expected 'reference' or nothing, got {backend!r}")
    if isa and isa not in ISAS:
        raise ValueError(f"FDDA_FAST_ISA: expected one of {', '.join(ISAS)}, got {isa!r}")
    if backend == "reference":
        return
    _load_cpu(isa)
    if torch.cuda.is_available():
        _load_cuda()
        _register_triton()


def _load_cpu(isa: str) -> None:
    global _extension
    try:
        _extension = importlib.import_module("fdda_fast._C")
    except ImportError as error:
        warnings.warn(
            f"fdda-fast runs on plain PyTorch: its compiled operators are not available ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if isa:
        _select_isa(isa, "FDDA_FAST_ISA")
    _register_compositions()


def _register_compositions() -> None:
    """CPU implementations made of compiled passes, and of the library's matrix products."""
    from fdda_fast.ops import (
        _few_outputs,
        _linear_maps,
        _max_pool,
        _norm_few_outputs,
        _upsample_twice,
        _winograd,
        _winograd_upsample,
    )

    for module, name in (
        (_winograd_upsample, "upsample_conv3x3"),
        (_few_outputs, "conv3x3_few_outputs"),
        (_norm_few_outputs, "conditional_bn_lrelu_conv3x3"),
        (_linear_maps, "linear_to_maps"),
        (_max_pool, "max_pool2d"),
    ):
        for operator in (name, f"{name}_backward"):
            LIBRARY.impl(operator, getattr(module, operator), "CPU")
    for operator in ("conv3x3", "conv3x3_input_gradient", "conv3x3_weight_gradient"):
        LIBRARY.impl(operator, getattr(_winograd, operator), "CPU")
    for operator in ("fixed_bn_lrelu", "fixed_bn_lrelu_conv3x3"):
        LIBRARY.impl(operator, getattr(_norm_few_outputs, operator), "CPU")
    LIBRARY.impl("upsample_twice_conv3x3", _upsample_twice.upsample_twice_conv3x3, "CPU")


def _load_cuda() -> None:
    global _cuda_loaded
    library = cuda_library()
    if library is not None:
        torch.ops.load_library(library)
        _cuda_loaded = True


def _register_triton() -> None:
    """Where the CUDA library, loaded before, has no kernel of its own."""
    try:
        from fdda_fast.kernels import OPERATORS
    except ImportError:
        return
    for name, function in OPERATORS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fdda::{name}", "CUDA"):
            LIBRARY.impl(name, function, "CUDA")


def cuda_library() -> Path | None:
    """The compiled CUDA operators of this installation, if it has them."""
    return next(iter(sorted(Path(__file__).parent.parent.glob("_C_cuda*.so"))), None)


def _select_isa(name: str, argument: str) -> None:
    supported = [isa for isa, _, usable in _extension.isas() if usable]
    if name not in supported:
        raise ValueError(
            f"{argument}: expected one of this processor's ({', '.join(supported)}), got {name!r}"
        )
    _extension.select_isa(name)


@contextmanager
def use_isa(name: str) -> Iterator[str]:
    """Run an instruction set's CPU kernels, for tests; `FDDA_FAST_ISA` does it for a process.

    Args:
        name: one of `ISAS`; where it has no kernels of its own, the next lower one that has serves.

    Yields:
        The instruction set in use.

    Raises:
        RuntimeError: the extension is not loaded.
        ValueError: this processor lacks the instruction set.
    """
    if _extension is None:
        raise RuntimeError("use_isa: the compiled operators are not loaded")
    previous = _extension.isa()
    _select_isa(name, "name")
    try:
        yield _extension.isa()
    finally:
        _extension.select_isa(previous)


def peak_macs_per_second() -> float:
    """8-bit multiply-accumulates per second of all threads, measured on registers; 0: not known."""
    return _extension.peak() * torch.get_num_threads() if _extension else 0.0


def prefers_own_products() -> bool:
    """Whether the compiled float32 products are faster than the framework's on this processor."""
    return _extension is not None and _extension.prefers_own_products()


def prefers_own_bfloat16_products() -> bool:
    """Whether the compiled bfloat16 convolutions are faster than the framework's here."""
    return _extension is not None and _extension.prefers_own_bfloat16_products()


def active_isa() -> str | None:
    """The instruction set in use; None: the compiled CPU operators are not loaded."""
    return _extension.isa() if _extension else None


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether the packed operators on the device are the CUDA library's."""
    return _cuda_loaded and device.type == "cuda"


def backend_info() -> dict:
    """Which implementations are in use.

    Returns:
        `extension`: whether the compiled CPU operators are loaded; `isa`: the instruction set in
        use, or None; `isas_compiled`, `isas_supported`: those with kernels of their own, those this
        processor has; `cuda_built`, `cuda_loaded`: the CUDA library.
    """
    isas = _extension.isas() if _extension else []
    return {
        "extension": _extension is not None,
        "isa": active_isa(),
        "isas_compiled": [name for name, compiled, _ in isas if compiled],
        "isas_supported": [name for name, _, supported in isas if supported],
        "cuda_built": cuda_library() is not None,
        "cuda_loaded": _cuda_loaded,
    }
