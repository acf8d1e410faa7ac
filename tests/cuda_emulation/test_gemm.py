"""The tensor cores' kernels of csrc/cuda/gemm: layout of the weights, alignments, and mutations."""

import ctypes
import itertools
import re

import pytest
import torch
from emulation import (
    HERE,
    KERNEL_SOURCES,
    build,
    build_operators,
    copy_sources,
    generator,
    needs_compiler,
)
from packed_arguments import PackedConv, run_conv, run_reorder

from fdda_fast import ops

pytestmark = needs_compiler
ENTRIES = ["conv_gemm_128x128", "conv_gemm_32x64"]


@pytest.fixture(scope="module")
def emulation():
    return build_operators()


def arguments(bits, x_shape, out_channels, kernel, x_bits=8):
    """A convolution of torch.ops.fdda.packed_conv2d with everything a kernel could leave out."""
    g = generator(bits)
    half = 2 ** (bits - 1)
    x = torch.randint(0, 2**x_bits, x_shape, generator=g, dtype=torch.uint8)
    shape = (out_channels, kernel * kernel * x_shape[3])
    q = torch.randint(-half, half, shape, generator=g, dtype=torch.int8)
    offset = torch.randint(-9, 9, (out_channels,), generator=g)
    multiplier = torch.rand(out_channels, generator=g) * 1e-3
    bias = torch.randn(out_channels, generator=g)
    geometry = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], 1)
    epilogue = (offset, multiplier, bias, None, 0.0, None)
    return (x, ops.pack_weight(q, bits), bits, out_channels, *geometry, 77 % 2**x_bits, *epilogue)


def is_right(emulation, entry, args, seed=0, x_offset=0, x_bits=8):
    """Whether the kernel neither has a fault nor waits for banks, and gives the CPU's bits."""
    emulation.reset(seed)
    actual = run_conv(emulation, entry, args, x_offset, x_bits)
    return torch.equal(actual, torch.ops.fdda.packed_conv2d(*args)) and not emulation.bank_conflicts


def is_right_packed(emulation, entry, args, seed=0, capability=80):
    """The same of packed codes in and out."""
    emulation.reset(seed)
    x, *rest = args
    rest[-1] = [0, 15]
    expected = ops.pack_codes(torch.ops.fdda.packed_conv2d(x, *rest))
    kind = {"capability": capability, "x_packed": True, "out_packed": True}
    actual = run_conv(emulation, entry, (ops.pack_codes(x), *rest), x_bits=4, **kind)
    return torch.equal(actual, expected) and not emulation.bank_conflicts


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("bits", "x_bits"), [(4, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("rows", [1, 31, 129, 256])
@pytest.mark.parametrize(("depth", "features"), [(64, 128), (16, 1), (208, 129), (1040, 10)])
def test_linear_layers(emulation, entry, bits, x_bits, rows, depth, features):
    args = arguments(bits, (rows, 1, 1, depth), features, 1, x_bits)
    assert is_right(emulation, entry, args, x_bits=x_bits)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("rows", [1, 31, 129, 256])
@pytest.mark.parametrize(("depth", "features"), [(32, 32), (64, 128), (544, 160)])
def test_linear_layers_of_packed_codes(emulation, entry, capability, rows, depth, features):
    args = arguments(4, (rows, 1, 1, depth), features, 1, 4)
    assert is_right_packed(emulation, entry, args, capability=capability)


@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize("x_offset", [0, 1, 4, 8])
def test_inputs_of_any_alignment(emulation, x_offset, x_bits):
    args = arguments(4, (2, 6, 5, 48), 20, 3, x_bits)
    assert is_right(emulation, "conv_gemm_32x64", args, x_offset=x_offset, x_bits=x_bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_codes_do_not_matter(emulation, bits):
    args = list(arguments(bits, (2, 5, 5, 63), 20, 1))
    expected = torch.ops.fdda.packed_conv2d(*args)
    q = ops.unpack_weight(args[1], bits, 20, 63)
    args[1] = ops.pack_weight(torch.cat([q, torch.full_like(q[:, :1], 5)], 1), bits)
    emulation.reset(0)
    assert torch.equal(run_conv(emulation, "conv_gemm_32x64", args), expected)


# batch, height, width, channels, out_channels, groups
@pytest.mark.parametrize(
    ("shape", "taken", "large"),
    [
        ((1, 1, 1, 2048, 1000, 1), True, False),
        ((32, 56, 56, 64, 256, 1), True, True),
        ((32, 56, 56, 64, 64, 64), False, None),
        ((0, 56, 56, 64, 64, 1), False, None),
        ((1, 1 << 15, 1 << 15, 1, 1, 1), False, None),  # inputs and pixels
        ((1, 1, 1, 65000, 20000, 1), False, None),  # weights
        ((1, 1, 1, 1, 65535 * 64, 1), False, None),  # blocks
    ],
)
def test_choice_of_the_kernel(emulation, shape, taken, large):
    *x_shape, out_channels, groups = shape
    conv = PackedConv(None, *x_shape, None, 4, out_channels, *x_shape[1:3])
    conv.kernel_h = conv.kernel_w = conv.stride_h = conv.stride_w = 1
    conv.groups = groups
    takes, is_large = emulation.library.gemm_takes, emulation.library.gemm_tile_is_large
    takes.restype = is_large.restype = ctypes.c_bool
    assert takes(ctypes.byref(conv)) == taken
    if taken:
        assert is_large(ctypes.byref(conv)) == large


@pytest.mark.parametrize("residual", [None, torch.uint8, torch.float32])
@pytest.mark.parametrize("output_range", [None, [0, 15]])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_some_images_at_once(emulation, residual, output_range, at_once):
    emulation.reset(0)
    args = list(arguments(4, (5, 6, 5, 24), 20, 3, 4))
    if residual is not None:
        args[13:15] = [(torch.rand(5, 6, 5, 20, generator=generator(1)) * 9).to(residual), 0.7]
    args[15] = output_range
    expected = torch.ops.fdda.packed_conv2d(*args)
    args[1] = run_reorder(emulation, args[1], 4, 20, 9 * 24)
    actual = run_conv(emulation, "conv_gemm_of_images", args, x_bits=4, at_once=at_once)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("residual", [None, torch.uint8])
@pytest.mark.parametrize("at_once", [2, 5])
def test_some_images_of_packed_codes_at_once(emulation, residual, at_once):
    emulation.reset(0)
    args = list(arguments(4, (5, 6, 5, 32), 64, 3, 4))
    if residual is not None:
        args[13:15] = [(torch.rand(5, 6, 5, 64, generator=generator(1)) * 9).to(residual), 0.7]
    args[15] = [0, 15]
    expected = ops.pack_codes(torch.ops.fdda.packed_conv2d(*args))
    args[0] = ops.pack_codes(args[0])
    args[1] = run_reorder(emulation, args[1], 4, 64, 9 * 32)
    kind = {"x_bits": 4, "x_packed": True, "out_packed": True}
    actual = run_conv(emulation, "conv_gemm_of_images", args, at_once=at_once, **kind)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("batch", "out_channels", "at_once"), [(0, 1, 0), (7, 1, 7), (64, 1, 32), (2, 65535 * 64, 0)]
)
def test_images_at_once(emulation, batch, out_channels, at_once):
    conv = PackedConv(None, batch, 1 << 12, 1 << 12, 1, None, 4, out_channels, 1 << 12, 1 << 12)
    conv.kernel_h = conv.kernel_w = conv.stride_h = conv.stride_w = conv.groups = 1
    count = emulation.library.images_at_once
    count.restype = ctypes.c_int64
    assert count(ctypes.byref(conv)) == at_once


U8S8, U8S4, U4S4, PACKED_U8S4, PACKED_U4S4 = range(5)


@pytest.mark.parametrize(
    ("bits", "x_bits", "zero_point", "channels", "capability", "operands"),
    [
        (4, 4, 15, 64, 80, U4S4),
        (2, 3, 0, 24, 89, U4S4),
        (4, 4, 15, 64, 90, U8S4),
        (4, 4, 15, 64, 100, U8S4),
        (4, 4, 15, 64, 120, U8S4),
        (4, 5, 15, 64, 80, U8S4),  # inputs of too many bits
        (4, 4, 16, 64, 80, U8S4),  # as padding has
        (4, 4, 15, 20, 80, U8S4),  # copied by 4 bytes
        (5, 4, 15, 64, 80, U8S8),
    ],
)
def test_choice_of_the_product(emulation, bits, x_bits, zero_point, channels, capability, operands):
    conv = PackedConv(None, 1, 1, 1, channels, None, bits, 16, 1, 1)
    conv.x_zero_point = zero_point
    choice = emulation.library.gemm_operands(ctypes.byref(conv), x_bits, capability)
    assert choice == operands


@pytest.mark.parametrize(("capability", "operands"), [(86, PACKED_U4S4), (90, PACKED_U8S4)])
def test_choice_of_the_product_of_packed_codes(emulation, capability, operands):
    conv = PackedConv(None, 1, 1, 1, 64, None, 4, 16, 1, 1)
    conv.x_packed = True
    assert emulation.library.gemm_operands(ctypes.byref(conv), 4, capability) == operands


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("value", "zero_point"), [(255, 0), (0, 255)])
def test_the_largest_sums(emulation, bits, value, zero_point):
    depth = (2**31 - 1) // (255 * 128)
    x, _, *rest = arguments(bits, (1, 1, 1, depth), 3, 1)
    q = torch.full((3, depth), -(2 ** (bits - 1)), dtype=torch.int8)
    q[1] = 2 ** (bits - 1) - 1
    x.fill_(value)
    args = (x, ops.pack_weight(q, bits), *rest[:7], zero_point, *rest[8:])
    assert is_right(emulation, "conv_gemm_32x64", args)


MUTATIONS = {
    "missing barrier": ("    __syncthreads();  // all threads' copies", "//"),
    "missing barrier before a slice": ("    __syncthreads();  // all are done", "//"),
    "missing barrier behind a slice": (
        "    __syncthreads();\n    if (!inside)",
        "    if (!inside)",
    ),
    "missing wait": ("    ptx::wait_copies<S::kCount - 2>();\n", ""),
    "wait for one group too few": ("wait_copies<S::kCount - 2>", "wait_copies<S::kCount - 1>"),
    "no group behind the last step": (
        "    }\n    ptx::commit_copies();",
        "    ptx::commit_copies();\n    }",
    ),
    "load into the stage in use": ("stage == 0 ? S::kCount - 1 : stage - 1", "stage"),
    "no swizzle": ("(chunk ^ (row / rows & (chunks - 1)))", "chunk"),
    "another swizzle where it is read": (
        "inputs + swizzled<kRowBytes>(row, depth * 2 + lane / 16)",
        "inputs + swizzled<kRowBytes>(row ^ 2, depth * 2 + lane / 16) + (row - (row ^ 2)) * 64",
    ),
    "tail of the pixels": ("if (pixel >= pixels) continue;", "if (pixel > pixels) continue;"),
    "tail of the channels": (
        "inside = channel < conv.out_channels",
        "inside = channel <= conv.out_channels",
    ),
    "tail of k": (
        "tap_row_ < static_cast<int>(conv_.kernel_h)",
        "tap_row_ <= static_cast<int>(conv_.kernel_h)",
    ),
    "tail of the image": ("(y_[i] + dy) <", "(y_[i] + dy) <="),
    "uninitialised padding": ("ptx::store_16(shared, {fill, fill, fill, fill});", ";"),
    "sums of a part of the row": ("sum += __shfl_xor_sync(0xffffffff, sum, 2);", ""),
    "halves in another order": ("a[1] | a[3] << 4", "a[3] | a[1] << 4"),
    "halves of another row": ("packed[depth * 2] = a[0]", "packed[depth * 2] = a[1]"),
    "divergent shuffle": (
        "sum += __shfl_xor_sync(0xffffffff, sum, 1);",
        "if (threadIdx.x == 7) continue;",
    ),
}


def build_with(folder, *operands):
    """The kernels of a copy of the sources, of the GEMM's only those that multiply so."""
    source = folder / "cuda/gemm/gemm.cu"
    text = re.sub(r".*run<Tile, kOperands, [841]>\(.*\n", "", source.read_text())
    keep = "|".join(operands)
    source.write_text(re.sub(rf".*run<Tile, Operands::(?!({keep})>).*\n", "", text))
    others = [path for path in KERNEL_SOURCES if path.name != "gemm.cu"]
    return build(*others, source, HERE / "operators.cu")


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_mutations_are_caught(tmp_path, mutation):
    copy_sources(tmp_path, *MUTATIONS.get(mutation, ()))
    emulation = build_with(tmp_path, "kU4S4")
    args = arguments(4, (1, 7, 7, 48), 24, 3, 4)
    for seed in range(2):
        for entry in ENTRIES:
            try:
                right = is_right(emulation, entry, args, seed, x_bits=4)
            except RuntimeError:
                right = False
            assert right == (mutation is None)


# The processors on which they show; some show in one of the tiles only.
BOTH, WITH_4_BITS = (80, 90), (80,)
PACKED_MUTATIONS = {
    "fill of bytes": (BOTH, "? 0x11111111u", "? 0x01010101u"),
    "all threads copy": (BOTH, "if (kIdle && row(0) >= Tile::kRows) return;", ""),
    "bytes of a pixel": (BOTH, "(reads_packed(kOperands) ? 2 : 1)", "1"),
    "no swizzle": (BOTH, *MUTATIONS["no swizzle"]),
    "another chunk": (WITH_4_BITS, "(matrix_row(r), lane / 16)", "(matrix_row(r), 1 - lane / 16)"),
    "another half": (BOTH, "a[half + 2] = packed[half] >> 4", "a[half + 2] = packed[half] >> 0"),
    "other rows": (BOTH, "a[half] = packed[half] &", "a[half] = packed[1 - half] &"),
    "halves swapped": (BOTH, "code | other << 4", "other | code << 4"),
    "partner of the wrong lane": (BOTH, "code, 16);", "code, 8);"),
    "both lanes store": (BOTH, "if (threadIdx.x & 16) return;", ""),
}


@pytest.mark.parametrize("mutation", [None, *PACKED_MUTATIONS])
def test_mutations_are_caught_on_packed_codes(tmp_path, mutation):
    capabilities, *change = PACKED_MUTATIONS.get(mutation, ((),))
    copy_sources(tmp_path, *change)
    emulation = build_with(tmp_path, "kPackedU8S4", "kPackedU4S4")
    args = arguments(4, (1, 7, 7, 32), 64, 3, 4)
    for capability, seed in itertools.product(BOTH, range(2)):
        try:
            right = all(
                is_right_packed(emulation, entry, args, seed, capability) for entry in ENTRIES
            )
        except RuntimeError:
            right = False
        assert right == (capability not in capabilities)
