"""Every kind of fault is found, in every order of the threads, and named."""

import ctypes

import pytest
import torch
from emulation import HERE, build, generator, needs_compiler

pytestmark = needs_compiler

# Without a barrier the order of the threads decides which of two accesses is the wrong one.
FAULTS = {
    "(race|uninitialised|in flight)": [
        *("missing_barrier", "barrier_of_the_warp_only", "shuffle_for_a_barrier"),
        "wait_without_barrier",
    ],
    "(race|in flight)": ["missing_barrier_before_the_next_write", "copy_over_what_is_read"],
    "race": ["two_writers", "global_race"],
    "in flight": ["missing_wait", "wait_for_the_group_before", "wait_without_commit"],
    "thread ends with cp.async in flight": ["end_in_flight"],
    "uninitialised": [
        *("uninitialised_shared", "uninitialised_static", "uninitialised_global"),
        "uninitialised_matrix",
    ],
    "out of bounds": [
        *("tail_of_a_read", "tail_of_a_write", "before_a_buffer", "tail_of_shared"),
        *("tail_of_a_copy", "null_pointer"),
    ],
    "misaligned": [
        *("misaligned_vector", "misaligned_word", "misaligned_copy", "misaligned_source"),
        "misaligned_matrix",
    ],
    "divergent": [
        *("divergent_barrier", "divergent_return", "divergent_shuffle", "different_functions"),
    ],
    "launch": ["too_much_shared"],
}


@pytest.fixture(scope="module")
def emulation():
    return build(HERE / "faults.cu")


def run(emulation, fault, seed):
    emulation.reset(seed)
    values = torch.randint(0, 256, (1024,), generator=generator(seed), dtype=torch.uint8)
    out = emulation.empty(1024)
    emulation.run(f"fault_{fault}", *map(ctypes.c_void_p, (emulation.put(values), out)))
    return values, out


@pytest.mark.parametrize(
    ("message", "fault"), [(message, name) for message, names in FAULTS.items() for name in names]
)
def test_fault(emulation, message, fault):
    for seed in range(5):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            run(emulation, fault, seed)


def test_no_fault(emulation):
    for seed in range(5):
        values, out = run(emulation, "none", seed)
        expected = values[:64].flip(0).reshape(32, 2).flip(1).flatten()
        assert torch.equal(emulation.take(out, (64,), torch.uint8), expected)
