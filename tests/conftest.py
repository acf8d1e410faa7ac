"""Tests marked `gpu` are skipped where there is no device, or no kernels for it."""

import pytest
import torch

from fdda_fast.ops import backend_info


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not backend_info()["cuda_loaded"]:
        pytest.skip("built without CUDA kernels")
