"""Every kernel and configuration, and their compilation without a GPU: tests, triton_report.py."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fdda_fast.kernels import (
    _tiles,
    bn_fake_quantize,
    class_moments,
    conditional_bn,
    fake_quantize,
    minmax,
    packed,
    upsample_conv,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}

# An argument of one name has one type in all kernels; T: the tensors' dtype. Others: *fp32.
_TYPES = {
    **dict.fromkeys(("x", "y", "residual", "grad", "grad_y", "grad_x", "grad_residual"), "*T"),
    "factors": "*T",
    **dict.fromkeys(("ids", "labels", "count", "counts", "sizes"), "*i64"),
    **dict.fromkeys(("half", "low", "high", "eps", "negative_slope"), "fp32"),
    **dict.fromkeys(("quant_min", "quant_max", "above_low", "below_high"), "fp32"),
    **dict.fromkeys(("pixel_units", "channel_units", "pixels", "chunk", "rows"), "i32"),
    **dict.fromkeys(("splits", "tiles", "groups"), "i32"),
    **dict.fromkeys(("height", "width", "in_channels", "out_channels"), "i32"),
    **dict.fromkeys(("codes", "packed"), "*u8"),
    **{"q": "*i8", "sums": "*i32", "integers": "*i32", "weight_offset": "*i64"},
    "residual_scale": "fp32",
    **dict.fromkeys(("out_height", "out_width", "depth_units", "filter_units", "filters"), "i32"),
    **dict.fromkeys(("columns", "row_stride", "depth", "depth_stride", "kernel_width"), "i32"),
    **dict.fromkeys(("taps", "stride_h", "stride_w", "pad_h", "pad_w"), "i32"),
    **dict.fromkeys(("dilation_h", "dilation_w", "x_zero_point"), "i32"),
}

# One view for every layout and pair of blocks that `View.blocks` gives: rows on 16 bytes, then rows
# that no vector divides.
ALIGNED = [
    _tiles.View(4, 64, 4096, False),
    _tiles.View(4, 64, 4096, True),
    _tiles.View(4, 64, 256, False),
    _tiles.View(4, 64, 64, False),
    _tiles.View(4, 16, 4096, True),
    _tiles.View(4, 1024, 1, True),
]
UNALIGNED = [
    _tiles.View(4, 65, 49, False),
    _tiles.View(4, 65, 49, True),
    _tiles.View(4, 65, 225, False),
    _tiles.View(4, 65, 4095, False),
    _tiles.View(4, 3, 4096, True),
    _tiles.View(4, 1025, 1, True),
]
# One of each layout.
SOME_VIEWS = [*ALIGNED[:2], *UNALIGNED[:2]]


class Entry(NamedTuple):
    """A kernel, the constants it is compiled with beside a view's, and what it moves.

    `passes(constants)`: tensors read and written per element; `least`: what its task needs.
    `exact`: compiled without fused multiply-adds, because its bits equal the CPU's.
    """

    kernel: triton.JITFunction
    passes: Callable[[dict], int] | None = None
    least: Callable[[dict], int] | None = None
    variants: tuple[dict, ...] = ({},)
    configs: tuple[dict, ...] = ()
    exact: bool = True

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def builds(self, views: list[_tiles.View]) -> Iterator[tuple[dict, str]]:
        """Constants and dtype of every configuration on these views."""
        tensors = any(_TYPES.get(name) == "*T" for name in self.kernel.arg_names)
        dtypes = ("fp32", "bf16") if tensors else ("fp32",)
        for constants, dtype in product(self._constants(views), dtypes):
            if constants.get("bytes", DTYPES[dtype]) == DTYPES[dtype]:
                yield constants, dtype

    @property
    def every(self) -> Iterator[tuple[dict, str]]:
        """Every configuration."""
        return self.builds([*ALIGNED, *UNALIGNED])

    @property
    def some(self) -> Iterator[tuple[dict, str]]:
        """The plainest and the fullest variant in both memory orders, aligned and not."""
        variants = (self.variants[0], self.variants[-1])[: len(self.variants)]
        return self._replace(variants=variants).builds(SOME_VIEWS)

    @property
    def tested(self) -> Iterator[tuple[dict, str]]:
        """Of `some`, one dtype a memory order and alignment, the plainest variant only once."""
        for constants, dtype in self.some:
            aligned, last = constants.get("ALIGN", 16) == 16, constants.get("LAST", False)
            plain = len(self.variants) > 1 and self.variants[0].items() <= constants.items()
            if plain and (last or not aligned):
                continue
            if constants.keys() & {"bytes", "types"} or (dtype == "bf16") == (last == aligned):
                yield constants, dtype

    def _constants(self, views: list[_tiles.View]) -> Iterator[dict]:
        """ "threads" among them where they are not `_tiles.THREADS`, "types" of arguments that do
        not have one type in all kernels.
        """
        if self.configs:
            yield from self.configs
            return
        for view, variant in product(views, self.variants):
            yield {k: v for k, v in view.grid().sizes.items() if k.isupper()} | variant


def _variants(*names: str) -> tuple[dict, ...]:
    """Every combination of flags, the plainest first."""
    return tuple(
        dict(zip(names, values, strict=True))
        for values in product((False, True), repeat=len(names))
    )


def _reduction_blocks(**flags: bool) -> tuple[dict, ...]:
    return tuple({"BLOCK_R": r, "BLOCK_C": c} | flags for r, c in ((1024, 1), (32, 32)))


_ROWS = tuple(
    {"ALIGN": align, "BLOCK": block, "LOOPED": looped, "threads": threads}
    for align, (block, looped, threads) in (
        *((16, config) for config in (*minmax.ROW_CONFIGS, minmax.LONG_ROW_CONFIG)),
        *((1, config) for config in (minmax.ROW_CONFIGS[-1], minmax.LONG_ROW_CONFIG)),
    )
)

# A residual is added to a batch norm only.
_NORMS = tuple(v for v in _variants("NORM", "RESIDUAL") if v["NORM"] or not v["RESIDUAL"])


def _products(*variants: dict) -> tuple[dict, ...]:
    """Configurations of matrix products, whose blocks depend on the bytes of an element."""
    names = ("bytes", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    blocks = (dict(zip(names, (b, *m), strict=True)) for b, m in upsample_conv.BLOCKS.items())
    common = {"ALIGN": upsample_conv.CHANNELS, "threads": upsample_conv.PRODUCT_THREADS}
    return tuple(common | b | v for b, v in product(blocks, variants))


def _packed(tile: packed.Tile, **constants: int | bool) -> dict:
    """Plain sums of float32, or codes with a residual of codes."""
    stored = "*u8" if constants["QUANTIZED"] else "*fp32"
    types = {"addend": stored, "result": stored}
    return {**constants, **tile.constants, "threads": tile.threads, "types": types}


_EPILOGUES = tuple({"RESIDUAL": v, "QUANTIZED": v} for v in (False, True))
_PACKED_CONVS = tuple(
    _packed(tile, ALIGN=aligns[0], OUT_ALIGN=aligns[1], FOLDED=folded, **epilogue)
    for tile, aligns in (
        *product((packed.LARGE, packed.SMALL, packed.THIN), ((16, 16), (16, 1))),
        (packed.THIN, (1, 1)),
    )
    for folded, epilogue in product((False, True), _EPILOGUES)
)
_PACKED_LINEARS = tuple(
    _packed(packed.WIDE_INPUTS, ALIGN=packed.VECTOR, **epilogue) for epilogue in _EPILOGUES
)

TABLE = [
    Entry(fake_quantize.affine_kernel, lambda c: 2),
    Entry(
        fake_quantize.affine_backward_kernel,
        lambda c: 2 + c["CLIPPED"],
        variants=_variants("CLIPPED", "PARAMETERS")[1:],
    ),
    Entry(fake_quantize.range_kernel, lambda c: 2),
    Entry(
        fake_quantize.range_backward_kernel,
        lambda c: 2 + c["CLIPPED"],
        variants=_variants("CLIPPED", "ENDS")[1:],
    ),
    Entry(minmax.row_kernel, lambda c: 2 + c["LOOPED"], lambda c: 2, configs=_ROWS),
    Entry(minmax.minmax_kernel, lambda c: 1, exact=False),
    Entry(minmax.merge_kernel, configs=_reduction_blocks(), exact=False),
    Entry(
        class_moments.moments_kernel,
        lambda c: 1 + c["NORM"] * (1 + c["RESIDUAL"]),
        variants=_NORMS,
    ),
    Entry(
        class_moments.moments_backward_kernel,
        lambda c: 2 + c["NORM"] * (1 + 2 * c["RESIDUAL"]),
        variants=_NORMS,
    ),
    Entry(
        class_moments.merge_moments_kernel, configs=({"BLOCK_R": 32, "BLOCK_C": 32},), exact=False
    ),
    Entry(bn_fake_quantize.range_parameters_kernel, configs=({},)),
    Entry(class_moments.fold_kernel, configs=({"BLOCK": 256},)),
    Entry(conditional_bn.conditional_bn_kernel, lambda c: 2, exact=False),
    Entry(conditional_bn.conditional_bn_sums_kernel, lambda c: 2, exact=False),
    Entry(conditional_bn.conditional_bn_backward_kernel, lambda c: 3, exact=False),
    Entry(
        bn_fake_quantize.bn_fake_quantize_kernel,
        lambda c: 2 + c["RESIDUAL"],
        variants=_variants("RESIDUAL"),
    ),
    Entry(
        bn_fake_quantize.bn_fake_quantize_backward_kernel,
        lambda c: 3 + 2 * c["RESIDUAL"],
        variants=_variants("RESIDUAL", "CLIPPED", "ENDS"),
    ),
    Entry(
        upsample_conv.gather_conv_kernel,
        configs=_products({"TAPS": 2, "PHASED": True}, {"TAPS": 4, "PHASED": False}),
        exact=False,
    ),
    Entry(upsample_conv.weight_gradient_kernel, configs=_products({}), exact=False),
    Entry(
        packed.unpack_kernel,
        configs=tuple({"BITS": b, "BLOCK_K": packed.UNPACK_DEPTH} for b in range(2, 9)),
    ),
    Entry(packed.packed_conv_kernel, configs=_PACKED_CONVS),
    Entry(packed.packed_linear_s32_kernel, configs=_PACKED_LINEARS),
    Entry(
        _tiles.sum_kernel,
        configs=(
            *_reduction_blocks(GROUPED=False, WEIGHTED=False),
            {"BLOCK_R": 32, "BLOCK_C": 32, "GROUPED": True, "WEIGHTED": False},
            {"BLOCK_R": 32, "BLOCK_C": 32, "GROUPED": True, "WEIGHTED": True},
        ),
        exact=False,
    ),
]


def build(entry: Entry, constants: dict, dtype: str, target: GPUTarget) -> CompiledKernel:
    """Compiles as a launch with tensors on 16 bytes does."""
    warps = constants.get("threads", _tiles.THREADS) // target.warp_size
    options = {"num_warps": warps, "enable_fp_fusion": not entry.exact}
    own = constants.get("types", {})
    constants = {k: v for k, v in constants.items() if k.isupper()}
    names = entry.kernel.arg_names
    types = {n: (_TYPES | own).get(n, "*fp32").replace("T", dtype) for n in names}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = ASTSource(entry.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


class Resources(NamedTuple):
    """Per thread: registers, bytes (gfx: registers) spilled, 128-bit accesses of global memory in
    the program as written, a loop's body once; per program: bytes of shared memory.
    """

    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int

    def wide_passes(self, constants: dict, dtype: str) -> float:
        """How often the accesses of 128 bits cover the tile."""
        tile = constants.get("BLOCK") or constants["BLOCK_P"] * constants["BLOCK_C"]
        per_thread = tile / constants.get("threads", _tiles.THREADS) * DTYPES[dtype]
        return 16 * (self.wide_loads + self.wide_stores) / per_thread


_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(binary: CompiledKernel) -> Resources:
    """What the compiler says of a kernel of `build`."""
    hip = "amdgcn" in binary.asm
    text = binary.asm["amdgcn" if hip else "ptx"]
    wide = [
        len(re.findall(pattern, text))
        for pattern in (
            (r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_store_dwordx4")
            if hip
            else (r"ld\.global\S*\.v4\.b32|cp\.async.*0x10", r"st\.global\S*\.v4\.b32")
        )
    ]
    if hip:
        fields = dict(re.findall(r"\.(\w+_count):\s+(\d+)", text))
        spills = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
        return Resources(int(fields["vgpr_count"]), spills, binary.metadata.shared, *wide)
    text = cuobjdump(binary, "--dump-resource-usage")
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, binary.metadata.shared, *wide)


def cuobjdump(binary: CompiledKernel, flag: str) -> str:
    """What it prints of a kernel for NVIDIA's."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
