"""Memory stays with the process inside the block, and goes back to the system after it."""

import platform
import resource
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Page faults of 20 tensors of 16 MiB, made and dropped one after the other.
SCRIPT = """
import contextlib, resource, sys, torch
from fdda_fast.memory import resident_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
outside = faults()
with resident_memory():
    faults()
    inside = faults()
after = faults()
print(outside, inside, after)
"""


@glibc
def test_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    outside, inside, after = (int(v) for v in done.stdout.split())
    pages = 20 * (1 << 24) // resource.getpagesize()
    assert inside < pages // 100
    assert outside > 10 * inside or outside < pages // 100  # huge pages fault less
    assert after > 10 * inside or outside < pages // 100
