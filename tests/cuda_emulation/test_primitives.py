"""Every emulated instruction against its documented meaning."""

import ctypes

import pytest
import torch
from emulation import HERE, build, generator, needs_compiler

pytestmark = [needs_compiler, pytest.mark.parametrize("seed", [0, 1])]


@pytest.fixture(scope="module")
def library():
    return build(HERE / "primitives.cu")


@pytest.fixture
def emulation(library, seed):
    library.reset(seed)
    return library


def pointers(*addresses):
    return [ctypes.c_void_p(a) for a in addresses]


def test_indices(emulation):
    out = emulation.empty(12 * 24 * 4)
    emulation.run("index", *pointers(out))
    expected = torch.arange(12)[:, None] * 1000 + torch.arange(24)
    assert torch.equal(emulation.take(out, (12, 24), torch.int32), expected.int())


def test_shuffles(emulation):
    out = emulation.empty(4 * 32 * 4)
    emulation.run("shuffle", *pointers(out))
    lanes = range(32)
    expected = [
        [(i + 5) % 32 * 3 for i in lanes],
        [(i ^ 2) * 3 for i in lanes],
        [(i - 4 if i >= 4 else i) * 3 for i in lanes],
        [i + 4 if i + 4 < 32 else i for i in lanes],
    ]
    assert emulation.take(out, (4, 32), torch.int32).tolist() == expected


def test_shuffles_of_8_bytes(emulation):
    out = emulation.empty(32 * 8)
    emulation.run("shuffle_of_8_bytes", *pointers(out))
    expected = [2**40 * (i ^ 5) - (i ^ 5) for i in range(32)]
    assert emulation.take(out, (32,), torch.int64).tolist() == expected


def test_largest_bytes(emulation):
    words = torch.randint(0, 256, (32, 4), generator=generator(0), dtype=torch.uint8)
    out = emulation.empty(32 * 4)
    emulation.run("max_bytes", *pointers(emulation.put(words), out))
    expected = torch.maximum(words, words.flip(0))
    assert torch.equal(emulation.take(out, (32, 4), torch.uint8), expected)


def test_sums_of_bytes(emulation):
    words = torch.randint(0, 256, (32, 4), generator=generator(0), dtype=torch.uint8)
    words[0] = 255
    out = emulation.empty(32 * 4)
    emulation.run("add_bytes", *pointers(emulation.put(words), out))
    expected = words.sum(1) + torch.arange(32)
    assert torch.equal(emulation.take(out, (32,), torch.int32), expected.int())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulation, count, transposed):
    """PTX ISA, ldmatrix: thread 4 r + c gets elements 2 c and 2 c + 1 of row r of each matrix."""
    elements = torch.arange(4 * 8 * 8, dtype=torch.int16).reshape(4, 8, 8)
    out = emulation.empty(count * 32 * 4)
    rows = emulation.put(elements)
    emulation.run("load_matrices", count, transposed, *pointers(rows, out))
    actual = emulation.take(out, (count, 32, 2), torch.int16)
    for matrix in range(count):
        m = elements[matrix].T if transposed else elements[matrix]
        for lane in range(32):
            row, column = divmod(lane, 4)
            assert actual[matrix, lane].tolist() == m[row, 2 * column : 2 * column + 2].tolist()
    assert emulation.bank_conflicts == 0


# PTX ISA, "Matrix Fragments for mma.m16n8k32" with 8 bits and "... mma.m16n8k64" with 4:
# (row, column) of element i of lane's a, b and c.


def a_index(lane, i, bits):
    group, thread = lane >> 2, lane % 4
    if bits == 8:
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        column = thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16
    else:
        row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
        column = thread * 8 + (i & 7) if i < 16 else thread * 8 + (i & 7) + 32
    return row, column


def b_index(lane, i, bits):
    group, thread = lane >> 2, lane % 4
    if bits == 8:
        row = thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16
    else:
        row = thread * 8 + (i & 7) if i < 8 else thread * 8 + (i & 7) + 32
    return row, group


def c_index(lane, i):
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), lane % 4 * 2 + (i & 1)


def fragments(matrix, index, bits, elements):
    """uint8 [32, elements * bits / 8]; the first element is in the low bits."""
    codes = torch.empty(32, elements, dtype=torch.int64)
    for lane in range(32):
        for i in range(elements):
            codes[lane, i] = matrix[index(lane, i, bits)] & (2**bits - 1)
    codes = codes.reshape(32, -1, 8 // bits)
    return sum(codes[:, :, i] << (bits * i) for i in range(8 // bits)).to(torch.uint8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_mma(emulation, seed, bits, signed):
    g, half, depth = generator(seed), 2 ** (bits - 1), 256 // bits
    low, high = (-half, half) if signed else (0, 2 * half)
    a = torch.randint(low, high, (16, depth), generator=g)
    b = torch.randint(-half, half, (depth, 8), generator=g)
    c = torch.randint(-(2**31), 2**31, (16, 8), generator=g)
    c_registers = torch.tensor([[c[c_index(lane, i)] for i in range(4)] for lane in range(32)])
    out = emulation.empty(32 * 4 * 4)
    a_address = emulation.put(fragments(a, a_index, bits, 128 // bits))
    b_address = emulation.put(fragments(b, b_index, bits, 64 // bits))
    c_address = emulation.put(c_registers.int())
    emulation.run("mma", bits, signed, *pointers(a_address, b_address, c_address, out))
    actual = emulation.take(out, (32, 4), torch.int32)
    expected = (a @ b + c).int()  # wraps
    for lane in range(32):
        for i in range(4):
            assert actual[lane, i] == expected[c_index(lane, i)]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(emulation, size):
    data = torch.randint(1, 256, (2, 64, size), generator=generator(0), dtype=torch.uint8)
    out = emulation.empty(data.numel())
    emulation.run("copy", size, *pointers(emulation.put(data), out))
    expected = data.clone()
    for thread in range(64):
        expected[0, thread, thread % (size + 1) :] = 0
    assert torch.equal(emulation.take(out, data.shape, torch.uint8), expected)
