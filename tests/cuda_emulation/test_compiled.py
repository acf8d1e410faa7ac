"""What nvcc makes of the tensor cores' kernels."""

import sys

import pytest
from emulation import HERE, ROOT

sys.path.insert(0, str(ROOT / "bench"))
import cuda_report


@pytest.mark.skipif(not cuda_report.has_tools(), reason="needs nvcc and cuobjdump")
def test_instructions_and_registers():
    rows = cuda_report.report(HERE / "instances.cu", "80")
    assert len(rows) == 3
    for row in rows:
        assert row["spills"] == 0
        assert row["registers"] <= 128  # of two blocks to a multiprocessor
        # 64 x 32 outputs x 64 k of a warp in products of 16 x 8 x 32, or 64
        products = 16 if row["imma4"] else 32
        assert row["imma"] == products
        assert min(row["ldgsts"], row["ldsm"], row["load16"]) > 0
    assert sorted(row["imma4"] for row in rows) == [0, 0, 16]


@pytest.mark.skipif(not cuda_report.has_tools(), reason="needs nvcc and cuobjdump")
def test_no_products_of_4_bits_where_the_processor_has_none():
    rows = cuda_report.report(HERE / "instances.cu", "90")
    assert sorted(row["imma"] for row in rows) == [0, 32, 32]
