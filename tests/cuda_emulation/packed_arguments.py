"""Arguments of the packed operators, generated, and as the structures of csrc/common/packed.h."""

import ctypes
import math
from ctypes import c_bool, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops._windows import output_size


class Epilogue(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("multiplier", "bias", "residual_u8", "residual_f32")),
        ("residual_scale", c_float),
        ("out_u8", c_void_p),
        ("out_f32", c_void_p),
        ("lo", c_float),
        ("hi", c_float),
        ("out_u4", c_void_p),
    )


class PackedConv(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("batch", "height", "width", "channels")),
        ("weight", c_void_p),
        ("bits", c_int),
        *((name, c_int64) for name in ("out_channels", "out_height", "out_width")),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, c_int64) for name in ("pad_h", "pad_w", "dilation_h", "dilation_w", "groups")),
        ("x_zero_point", c_int32),
        ("weight_offset", c_void_p),
        ("weight_fits_s8", c_bool),
        ("epilogue", Epilogue),
        ("x_packed", c_bool),
    )


class PackedLinearS32(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("rows", c_int64),
        ("depth", c_int64),
        ("weight", c_void_p),
        ("bits", c_int),
        ("out_features", c_int64),
        ("x_zero_point", c_int64),
        ("weight_offset", c_void_p),
        ("epilogue", Epilogue),
    )


def epilogue(
    emulation, out, multiplier, bias, residual, residual_scale, output_range, out_packed=False
):
    codes = residual is not None and residual.dtype == torch.uint8
    e = Epilogue(emulation.put(multiplier), emulation.put(bias))
    e.residual_u8 = emulation.put(residual if codes else None)
    e.residual_f32 = emulation.put(None if codes else residual)
    e.residual_scale = residual_scale
    setattr(e, "out_u4" if out_packed else "out_u8" if output_range else "out_f32", out)
    e.lo, e.hi = output_range or (0, 0)
    return e


def reordered_memory(emulation, bits, channels, depth, depthwise=False):
    """The address and size of the memory for reordered weights."""
    size = emulation.library.reordered_bytes
    size.restype = c_int64
    size = size(bits, c_int64(channels), c_int64(depth), depthwise)
    return emulation.empty(size), size


def run_reorder(emulation, packed, bits, channels, depth, depthwise=False):
    memory, size = reordered_memory(emulation, bits, channels, depth, depthwise)
    sizes = (c_int64(channels), c_int64(depth))
    planes = c_void_p(emulation.put(packed))
    emulation.run("reorder_weight", planes, bits, *sizes, depthwise, c_void_p(memory))
    return emulation.take(memory, (size,), torch.uint8)


def run_conv(
    emulation,
    entry,
    args,
    x_offset=0,
    x_bits=8,
    capability=80,
    at_once=None,
    x_packed=False,
    out_packed=False,
):
    """`entry(const PackedConv*, ...)` on the arguments of torch.ops.fdda.packed_conv2d.

    x lies `x_offset` bytes behind an aligned address. x_packed, out_packed: as of reordered_conv2d.
    """
    x, weight, bits, out_channels, kernel, stride, padding, dilation, groups, zero_point = args[:10]
    size = output_size(x.shape[1:3], kernel, stride, padding, dilation)
    shape = (x.shape[0], *size, out_channels // (2 if out_packed else 1))
    dtype = torch.uint8 if args[-1] else torch.float32
    out = emulation.empty(math.prod(shape) * dtype.itemsize)
    x_shape = (*x.shape[:3], x.shape[3] * (2 if x_packed else 1))
    geometry = (*kernel, *stride, *padding, *dilation, groups)
    x_address = emulation.put(x, x_offset)
    conv = PackedConv(x_address, *x_shape, emulation.put(weight), bits, out_channels, *size)
    for (name, _), value in zip(PackedConv._fields_[10:19], geometry, strict=True):
        setattr(conv, name, value)
    conv.x_zero_point = zero_point
    conv.weight_offset = emulation.put(args[10])
    conv.epilogue = epilogue(emulation, out, *args[11:], out_packed)
    conv.x_packed = x_packed
    arguments = ()
    if entry.startswith("conv_gemm"):
        depth = kernel[0] * kernel[1] * x_shape[3]
        memory = reordered_memory(emulation, bits, out_channels, depth)[0]
        arguments = (c_void_p(memory), x_bits, capability)
    elif entry == "reordered_conv2d":
        arguments = (x_bits, capability)
    elif entry == "conv_gemm_of_images":
        arguments = (x_bits, capability, c_int64(at_once))
    emulation.run(entry, ctypes.byref(conv), *arguments)
    return emulation.take(out, shape, dtype)


def run_linear(emulation, args):
    x, weight, bits, features, zero_point, offset = args[:6]
    shape = (x.shape[0], features)
    dtype = torch.uint8 if args[-1] else torch.float32
    out = emulation.empty(math.prod(shape) * dtype.itemsize)
    linear = PackedLinearS32(emulation.put(x), *x.shape, emulation.put(weight), bits, features)
    linear.x_zero_point = zero_point
    linear.weight_offset = emulation.put(offset)
    linear.epilogue = epilogue(emulation, out, *args[6:])
    emulation.run("packed_linear_s32", ctypes.byref(linear))
    return emulation.take(out, shape, dtype)


def weights(draw, rows, depth, bits, g):
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (rows, depth), generator=g, dtype=torch.int8)
    if draw(st.booleans()):
        q = torch.where(q < 0, -half, half - 1).to(torch.int8)
    return ops.pack_weight(q, bits)


def epilogues(draw, shape, limit, g):
    """Of accumulators up to `limit`."""
    multiplier = torch.randn(shape[-1], generator=g) * (100 / limit)
    bias = torch.randn(shape[-1], generator=g) * 50 + 60
    kind = draw(st.sampled_from([None, torch.uint8, torch.float32]))
    residual = None if kind is None else (torch.rand(shape, generator=g) * 255).to(kind)
    output_range = draw(st.sampled_from([None, [0, 255], [0, 15], [10, 200]]))
    return multiplier, bias, residual, draw(st.floats(-1, 1)), output_range


BITS = st.integers(2, 8)


@st.composite
def convolutions(draw, groups, channels, outputs, kernels, sizes, bits=BITS, x_bits=8):
    """Arguments of torch.ops.fdda.packed_conv2d; channels and outputs to a group."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    bits = draw(bits)
    groups, depth, outputs = draw(groups), draw(channels), draw(outputs)
    kernel = [draw(kernels) for _ in range(2)]
    stride, dilation = ([draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    size = [
        max(draw(sizes), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    shape = (draw(st.integers(1, 2)), *size, groups * depth)
    most = 2**x_bits - 1
    x = torch.randint(0, most + 1, shape, generator=g, dtype=torch.uint8)
    if draw(st.booleans()):
        x = torch.where(x < most / 2, 0, most).to(torch.uint8)
    out_channels, depth = groups * outputs, kernel[0] * kernel[1] * depth
    weight = weights(draw, out_channels, depth, bits, g)
    limit = draw(st.sampled_from([0, 3, 200, 2**40]))
    offset = torch.randint(-limit, limit + 1, (out_channels,), generator=g)
    zero_point = draw(st.sampled_from([0, 1, most // 2, most]))
    args = (x, weight, bits, out_channels, kernel, stride, padding, dilation, groups, zero_point)
    shape = (shape[0], *output_size(size, kernel, stride, padding, dilation), out_channels)
    return (*args, offset, *epilogues(draw, shape, depth * 255 * (2 ** (bits - 1) + limit), g))


def packable_convolutions(largest_size):
    """Of `convolutions`, those whose codes may lie packed."""
    return convolutions(
        groups=st.just(1),
        channels=st.sampled_from([32, 64, 96]),
        outputs=st.sampled_from([32, 64, 160]),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, largest_size),
        bits=st.integers(2, 4),
        x_bits=4,
    )


@st.composite
def linears_s32(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    bits, rows = draw(BITS), draw(st.integers(1, 9))
    depth, features = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    x = torch.randint(-(2**31), 2**31, (rows, depth), generator=g).to(torch.int32)
    offset = torch.randint(-(2**20), 2**20, (features,), generator=g)
    args = (x, weights(draw, features, depth, bits, g), bits, features, draw(st.integers(-9, 9)))
    return (*args, offset, *epilogues(draw, (rows, features), depth * 2.0**51, g))
