"""The structures of csrc/common/codes.h, and the kernels that take them."""

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_void_p

import torch

from fdda_fast.ops._windows import output_size


class Quantize(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, c_int64) for name in ("stride_n", "stride_c", "stride_h", "stride_w")),
        *((name, c_float) for name in ("scale", "zero_point")),
        ("bits", c_int),
        ("out", c_void_p),
    )


class RequantizeCodes(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        *((name, c_float) for name in ("x_scale", "x_zero_point", "scale", "zero_point")),
        ("bits", c_int),
        ("out", c_void_p),
    )


class DequantizeCodes(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        *((name, c_float) for name in ("scale", "zero_point")),
        ("out", c_void_p),
    )


class DequantizeSums(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        *((name, c_double) for name in ("divisor", "zero_point")),
        ("out", c_void_p),
    )


class PoolShape(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("batch", "height", "width", "channels", "out_height", "out_width"),
            *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w"),
            *("dilation_h", "dilation_w"),
        )
    )


class MaxPool(ctypes.Structure):
    _fields_ = (("shape", PoolShape), ("x", c_void_p), ("out", c_void_p))


class SumPool(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("batch", "pixels", "channels")),
        ("out", c_void_p),
    )


def _run(emulation, entry, structure, shape, dtype):
    out = emulation.empty(torch.Size(shape).numel() * dtype.itemsize)
    structure.out = out
    emulation.run(entry, ctypes.byref(structure))
    return emulation.take(out, shape, dtype)


def run_quantize(emulation, x, scale, zero_point, bits):
    """x may have any strides: all of its storage is put."""
    memory = torch.empty(0).set_(x.untyped_storage())
    address = emulation.put(memory) + x.storage_offset() * x.element_size()
    size, stride = (*x.shape, 1, 1)[:4], (*x.stride(), 0, 0)[:4]
    shape = (size[0], *size[2:], size[1]) if x.dim() == 4 else x.shape
    a = Quantize(address, *size, *stride, scale, zero_point, bits)
    return _run(emulation, "quantize", a, shape, torch.uint8)


def run_requantize_codes(emulation, x, x_scale, x_zero_point, scale, zero_point, bits, offset=0):
    a = RequantizeCodes(emulation.put(x, offset), x.numel())
    a.x_scale, a.x_zero_point, a.scale, a.zero_point = x_scale, x_zero_point, scale, zero_point
    a.bits = bits
    return _run(emulation, "requantize_codes", a, x.shape, torch.uint8)


def run_requantize_codes_packed(
    emulation, x, x_scale, x_zero_point, scale, zero_point, bits, offset=0
):
    a = RequantizeCodes(emulation.put(x, offset), x.numel())
    a.x_scale, a.x_zero_point, a.scale, a.zero_point = x_scale, x_zero_point, scale, zero_point
    a.bits = bits
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return _run(emulation, "requantize_codes_packed", a, shape, torch.uint8)


def run_dequantize_codes(emulation, x, scale, zero_point):
    a = DequantizeCodes(emulation.put(x), x.numel(), scale, zero_point)
    return _run(emulation, "dequantize_codes", a, x.shape, torch.float32)


def run_dequantize_sums(emulation, x, count, scale, zero_point):
    a = DequantizeSums(emulation.put(x), x.numel(), scale * count, zero_point * count)
    return _run(emulation, "dequantize_sums", a, x.shape, torch.float32)


def run_max_pool(emulation, x, kernel, stride, padding, dilation, ceil_mode, offset=0):
    size = output_size(x.shape[1:3], kernel, stride, padding, dilation, ceil_mode)
    shape = PoolShape(*x.shape, *size, *kernel, *stride, *padding, *dilation)
    a = MaxPool(shape, emulation.put(x, offset))
    return _run(emulation, "max_pool", a, (x.shape[0], *size, x.shape[3]), torch.uint8)


def run_sum_pool(emulation, x):
    batch, height, width, channels = x.shape
    a = SumPool(emulation.put(x), batch, height * width, channels)
    return _run(emulation, "sum_pool", a, (batch, channels), torch.int32)
