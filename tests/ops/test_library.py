import json
import os
import subprocess
import sys

import pytest
from backends import ISAS

from fdda_fast import ops
from fdda_fast.ops import _library

REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from fdda_fast import ops
g = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (1, 9, 9, 20), generator=g, dtype=torch.uint8)
q = torch.randint(-4, 4, (24, 180), generator=g, dtype=torch.int8)
zeros = torch.zeros(24, dtype=torch.int64)
args = (ops.pack_weight(q, 3), 3, 24, 3, 1, 1, 1, 1, 8, zeros, torch.ones(24), torch.zeros(24))
y = ops.packed_conv2d(x, *args)
z = ops.fake_quantize_minmax(torch.randn(3, 5, generator=g), 4, axis=0)
ours = [str(w.message) for w in caught if "fdda" in str(w.message)]
result = {"sum": int(y.double().sum()), "z": z.tolist(), "warnings": ours}
print(json.dumps(ops.backend_info() | result))
"""

needs_extension = pytest.mark.skipif(ISAS == [None], reason="compiled operators are not built")


def run(code=REPORT, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FDDA_FAST_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def report(**environment):
    done = run(**environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reference_report():
    return report(FDDA_FAST_BACKEND="reference")


def test_reference_backend_loads_nothing(reference_report):
    assert not reference_report["extension"]
    assert reference_report["isa"] is None
    assert reference_report["warnings"] == []


@needs_extension
@pytest.mark.parametrize("isa", ops.backend_info()["isas_supported"])
def test_environment_selects_the_isa(isa, reference_report):
    result = report(FDDA_FAST_ISA=isa)
    names, compiled = _library.ISAS, result["isas_compiled"]
    assert result["isa"] == [n for n in names[: names.index(isa) + 1] if n in compiled][-1]
    assert result["sum"] == reference_report["sum"]
    assert result["z"] == reference_report["z"]


@needs_extension
def test_default_is_the_best_supported_isa():
    assert report()["isa"] == ISAS[-1]


def test_missing_extension_warns_once_and_falls_back(reference_report):
    hide = "import sys; sys.modules['fdda_fast._C'] = None\n"
    done = run(hide + REPORT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["warnings"]) == 1
    assert "plain PyTorch" in result["warnings"][0]
    assert result["sum"] == reference_report["sum"]


@pytest.mark.parametrize(
    ("variable", "value"), [("FDDA_FAST_ISA", "sse9"), ("FDDA_FAST_BACKEND", "fast")]
)
def test_unknown_values_are_refused_at_import(variable, value):
    done = run("import fdda_fast.ops", **{variable: value})
    assert done.returncode != 0
    assert f"ValueError: {variable}: expected" in done.stderr
    assert value in done.stderr


@needs_extension
def test_an_unsupported_isa_is_refused(monkeypatch):
    class Extension:
        @staticmethod
        def isas():
            return [("generic", True, True), ("avx2", True, False)]

    monkeypatch.setattr(_library, "_extension", Extension)
    with pytest.raises(ValueError, match=r"FDDA_FAST_ISA: .*\(generic\), got 'avx2'"):
        _library._select_isa("avx2", "FDDA_FAST_ISA")


@pytest.mark.skipif(_library.cuda_library() is None, reason="built without CUDA kernels")
def test_the_cuda_library_loads_without_a_device():
    done = run(
        "import torch\n"
        "from fdda_fast.ops import _library\n"
        "torch.ops.load_library(_library.cuda_library())\n"
        "registered = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "for name in ('packed_conv2d', 'packed_linear', 'reorder_weight', 'reordered_conv2d',\n"
        "             'quantize', 'requantize_codes', 'dequantize_codes', 'dequantize_sums',\n"
        "             'max_pool2d_codes', 'sum_pool_codes'):\n"
        "    assert registered(f'fdda::{name}', 'CUDA'), name\n"
        "assert not registered('fdda::pack_weight', 'CUDA')\n"
    )
    assert done.returncode == 0, done.stderr


@needs_extension
def test_use_isa_restores():
    before = ops.backend_info()["isa"]
    with _library.use_isa("generic") as isa:
        assert isa == ops.backend_info()["isa"] == "generic"
    assert ops.backend_info()["isa"] == before
