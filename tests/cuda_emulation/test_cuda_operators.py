"""The kernels of csrc/cuda, bit for bit equal to the operators of the CPU."""

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
from emulation import (
    HERE,
    KERNEL_SOURCES,
    build,
    build_operators,
    copy_sources,
    generator,
    needs_compiler,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_arguments import (
    BITS,
    convolutions,
    linears_s32,
    packable_convolutions,
    run_conv,
    run_linear,
    run_reorder,
)

from fdda_fast import ops

pytestmark = needs_compiler
FEW = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 9)  # of the order of the threads


def assert_same_bits(actual, expected):
    assert actual.shape == expected.shape
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.fixture(scope="module")
def emulation():
    return build_operators()


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.sampled_from([1, 2, 3, 12]),
        channels=st.integers(1, 9),
        outputs=st.integers(1, 7),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 6),
    ),
    seed=SEEDS,
)
def test_direct_convolution(emulation, args, seed):
    emulation.reset(seed)
    actual = run_conv(emulation, "packed_conv2d", args)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))


@settings(FEW, max_examples=30)
@given(args=linears_s32(), seed=SEEDS)
def test_linear_of_int32(emulation, args, seed):
    emulation.reset(seed)
    assert_same_bits(run_linear(emulation, args), torch.ops.fdda.packed_linear(*args))


TILES = st.sampled_from(["conv_gemm_128x128", "conv_gemm_32x64"])


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.just(1),
        channels=st.sampled_from([1, 3, 4, 8, 16, 20, 24, 48, 80]),
        outputs=st.integers(1, 150),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 12),
    ),
    tile=TILES,
    seed=SEEDS,
)
def test_convolution_on_tensor_cores(emulation, args, tile, seed):
    emulation.reset(seed)
    actual = run_conv(emulation, tile, args)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))
    assert emulation.bank_conflicts == 0


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.just(1),
        channels=st.sampled_from([8, 16, 24, 48, 80]),
        outputs=st.integers(1, 150),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 12),
        bits=st.integers(2, 4),
        x_bits=4,
    ),
    tile=TILES,
    seed=SEEDS,
)
def test_convolution_of_4_bits_on_tensor_cores(emulation, args, tile, seed):
    emulation.reset(seed)
    actual = run_conv(emulation, tile, args, x_bits=4)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))
    assert emulation.bank_conflicts == 0


@settings(FEW, max_examples=60)
@given(
    args=packable_convolutions(12),
    packed=st.sampled_from([(True, False), (False, True), (True, True)]),
    capability=st.sampled_from([80, 90]),
    tile=TILES,
    seed=SEEDS,
)
def test_convolution_of_packed_codes(emulation, args, packed, capability, tile, seed):
    emulation.reset(seed)
    x_packed, out_packed = packed
    x, *rest = args
    if out_packed:
        rest[-1] = [1, 13]
    expected = torch.ops.fdda.packed_conv2d(x, *rest)
    x = ops.pack_codes(x) if x_packed else x
    arguments = {"x_packed": x_packed, "out_packed": out_packed, "capability": capability}
    actual = run_conv(emulation, tile, (x, *rest), x_bits=4, **arguments)
    assert_same_bits(actual, ops.pack_codes(expected) if out_packed else expected)
    assert emulation.bank_conflicts == 0


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.sampled_from([2, 3, 4, 16, 20, 33]),
        channels=st.just(1),
        outputs=st.just(1),
        kernels=st.integers(1, 5),
        sizes=st.integers(1, 7),
    ),
    x_offset=st.sampled_from([0, 1]),
    seed=SEEDS,
)
def test_depthwise_convolution(emulation, args, x_offset, seed):
    emulation.reset(seed)
    x, weight, bits, channels, kernel = args[:5]
    reordered = run_reorder(emulation, weight, bits, channels, kernel[0] * kernel[1], True)
    actual = run_conv(emulation, "reordered_conv2d", (x, reordered, *args[2:]), x_offset)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 64), (17, 65), (40, 190)])
def test_reordering(emulation, bits, rows, cols, depthwise):
    emulation.reset(bits)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (rows, cols), generator=generator(bits), dtype=torch.int8)
    args = (ops.pack_weight(q, bits), bits, rows, cols, depthwise)
    assert_same_bits(run_reorder(emulation, *args), ops.reorder_weight(*args))


SCALES = st.floats(1 / 64, 50, width=32)
ZERO_POINTS = st.floats(-40, 40, width=32)


@settings(FEW, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=4, max_size=4)
    | st.tuples(BITS, st.integers(1, 300)),
    order=st.sampled_from(["dense", "channels_last", "sliced"]),
    numbers=st.tuples(SCALES, ZERO_POINTS, BITS),
    seed=SEEDS,
)
def test_quantize(emulation, shape, order, numbers, seed):
    emulation.reset(seed)
    x = torch.randn(*shape, generator=generator(seed)) * 5
    if order == "channels_last" and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif order == "sliced":
        x = torch.cat([x, x], -1)[..., 1::2]
    assert_same_bits(run_quantize(emulation, x, *numbers), torch.ops.fdda.quantize(x, *numbers))


@settings(FEW, max_examples=60)
@given(
    count=st.integers(1, 9000),
    offset=st.sampled_from([0, 1, 16]),
    numbers=st.tuples(SCALES, st.integers(0, 255), SCALES, ZERO_POINTS, BITS),
    seed=SEEDS,
)
def test_requantize_codes(emulation, count, offset, numbers, seed):
    emulation.reset(seed)
    x = torch.randint(0, 256, (count,), generator=generator(seed), dtype=torch.uint8)
    actual = run_requantize_codes(emulation, x, *numbers, offset)
    assert_same_bits(actual, torch.ops.fdda.requantize_codes(x, *numbers))


@settings(FEW, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 90), st.sampled_from([32, 96])),
    offset=st.sampled_from([0, 1, 16]),
    numbers=st.tuples(SCALES, st.integers(0, 255), SCALES, ZERO_POINTS, st.integers(2, 4)),
    seed=SEEDS,
)
def test_requantize_codes_packed(emulation, shape, offset, numbers, seed):
    emulation.reset(seed)
    x = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    actual = run_requantize_codes_packed(emulation, x, *numbers, offset)
    assert_same_bits(actual, ops.requantize_codes_packed(x, *numbers))


@settings(FEW, max_examples=30)
@given(
    count=st.integers(1, 900),
    numbers=st.tuples(SCALES, st.integers(0, 255)),
    pixels=BITS,
    seed=SEEDS,
)
def test_dequantize(emulation, count, numbers, pixels, seed):
    emulation.reset(seed)
    x = torch.randint(0, 256, (count,), generator=generator(seed), dtype=torch.uint8)
    actual = run_dequantize_codes(emulation, x, *numbers)
    assert_same_bits(actual, torch.ops.fdda.dequantize_codes(x, *numbers))
    sums = torch.randint(-(2**31), 2**31, (count,), generator=generator(seed)).to(torch.int32)
    actual = run_dequantize_sums(emulation, sums, pixels, *numbers)
    assert_same_bits(actual, torch.ops.fdda.dequantize_sums(sums, pixels, *numbers))


@settings(FEW, max_examples=60)
@given(
    shape=st.tuples(BITS, st.integers(5, 9), st.integers(5, 9), st.sampled_from([1, 3, 4, 12])),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    offset=st.sampled_from([0, 1]),
    seed=SEEDS,
)
def test_max_pool(emulation, shape, kernel, stride, dilation, ceil_mode, offset, seed):
    emulation.reset(seed)
    x = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    args = (kernel, stride, [k // 2 for k in kernel], dilation, ceil_mode)
    actual = run_max_pool(emulation, x, *args, offset=offset)
    assert_same_bits(actual, torch.ops.fdda.max_pool2d_codes(x, *args))


@settings(FEW, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 4), *([st.integers(1, 9)] * 2), st.integers(1, 70)), seed=SEEDS
)
def test_sum_pool(emulation, shape, seed):
    emulation.reset(seed)
    x = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    assert_same_bits(run_sum_pool(emulation, x), torch.ops.fdda.sum_pool_codes(x))


# file, what it has, and what a mutation has for it
MUTATIONS = {
    "table without a barrier": ("codes", "half);\n  __syncthreads();", "half);"),
    "table of values without a barrier": ("codes", "a.scale;\n  __syncthreads();", "a.scale;"),
    "codes in another order": ("codes", "} << j;", "} << (24 - j);"),
    "packed codes in another order": ("codes", "low.y | high.y << 4", "high.y | low.y << 4"),
    "tail of packed codes": ("codes", "a.count / 2 - wide * 16", "a.count / 2 - wide * 16 + 1"),
    "strides of x": ("codes", "y * a.stride_h", "y * a.stride_w"),
    "sums in float32": ("codes", "static_cast<double>(a.x[i])", "static_cast<float>(a.x[i])"),
    "sums without a barrier": ("pools", "[lane] = sum;\n  __syncthreads();", "[lane] = sum;"),
    "tail of the channels": ("pools", "warp > 0 || c >= a.channels", "warp > 0 || c > a.channels"),
    "tail of the image": ("pools", "x >= s.width", "x > s.width"),
    "padding": ("pools", "y < 0 || y >= s.height", "y >= s.height"),
    "tail of the taps": ("depthwise", "if (tap < taps)", "if (tap <= taps)"),
    "sign of the weights": (
        "depthwise",
        "static_cast<int8_t>(weights",
        "static_cast<uint8_t>(weights",
    ),
    "sums of x": ("depthwise", "inputs[j] += value", "inputs[j] += value + 1"),
    "tail of k": ("packed", "if (k >= linear.depth) break;", ""),
    "a part of the warp": ("packed", "lanes = kLanes / 2", "lanes = kLanes / 4"),
    "tail of the loop": ("loop", "threadIdx.x; i < count;", "threadIdx.x; i <= count;"),
}


def codes(*shape):
    return torch.randint(0, 256, shape, generator=generator(0), dtype=torch.uint8)


def is_right(emulation, seed):
    """Whether one case of every operator is."""
    emulation.reset(seed)
    g = generator(0)
    x, wide, numbers = codes(2, 5, 5, 12), codes(70, 32), (3.3, 128, 0.7, 1.5, 4)
    image = torch.randn(2, 3, 4, 5, generator=g)
    sums = torch.randint(-(2**31), 2**31, (900,), generator=g).to(torch.int32)
    fdda, pool = torch.ops.fdda, ([3, 3], [2, 2], [1, 1], [1, 1], True)
    epilogue = (torch.tensor([3] * 12), torch.rand(12, generator=g), torch.rand(12, generator=g))
    weight = ops.pack_weight(torch.randint(-8, 8, (12, 9), generator=g, dtype=torch.int8), 4)
    conv = (4, 12, [3, 3], [1, 1], [1, 1], [1, 1], 12, 7, *epilogue, None, 0.0, [0, 255])
    deep = ops.pack_weight(torch.randint(-8, 8, (12, 90), generator=g, dtype=torch.int8), 4)
    linear = (sums.reshape(10, 90), deep, 4, 12, 5, *epilogue, None, 0.0, None)
    reordered = run_reorder(emulation, weight, 4, 12, 9, True)
    cases = [
        (run_quantize(emulation, image, 9.0, 0.5, 4), fdda.quantize(image, 9.0, 0.5, 4)),
        (run_requantize_codes(emulation, x, *numbers), fdda.requantize_codes(x, *numbers)),
        (
            run_requantize_codes_packed(emulation, wide, *numbers),
            ops.requantize_codes_packed(wide, *numbers),
        ),
        (run_dequantize_codes(emulation, x, 3.3, 9), fdda.dequantize_codes(x, 3.3, 9)),
        (run_dequantize_sums(emulation, sums, 49, 3.3, 9), fdda.dequantize_sums(sums, 49, 3.3, 9)),
        (run_max_pool(emulation, x, *pool), fdda.max_pool2d_codes(x, *pool)),
        (run_sum_pool(emulation, x), fdda.sum_pool_codes(x)),
        (reordered, ops.reorder_weight(weight, 4, 12, 9, True)),
        (
            run_conv(emulation, "reordered_conv2d", (x, reordered, *conv)),
            fdda.packed_conv2d(x, weight, *conv),
        ),
        (run_linear(emulation, linear), fdda.packed_linear(*linear)),
    ]
    return all(torch.equal(actual, expected) for actual, expected in cases)


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_mutations_are_caught(tmp_path, mutation):
    file, *change = MUTATIONS.get(mutation, ("",))
    mutated = {path.stem: path for path in copy_sources(tmp_path, *change)}
    changed = [file] if file in mutated else ["codes", "pools", "depthwise", "packed"]
    sources = [mutated[p.stem] if p.stem in changed else p for p in KERNEL_SOURCES]
    emulation = build(*sources, HERE / "operators.cu")
    for seed in range(2):
        try:
            right = is_right(emulation, seed)
        except RuntimeError:
            right = False
        assert right == (mutation is None)
