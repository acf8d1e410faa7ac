"""What of bench/gpu.py runs without a GPU: its cases, its comparison, its table's arithmetic."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdda_fast import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_line_and_exit_code_2():
    command = [sys.executable, gpu.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == gpu.NO_GPU + "\n"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--batch", "4", "0"], ["--batch"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments)
    assert caught.value.code == 2
    assert "--batch" in capsys.readouterr().err or "--rounds" in arguments


def test_every_kernel_has_a_case():
    pytest.importorskip("triton")
    from fdda_fast.kernels import OPERATORS

    names = {case.name for case in gpu.cases()}
    assert names >= set(OPERATORS)
    registration = Path(__file__).parents[1] / "csrc/cuda/registration.cpp"
    assert names >= set(re.findall(r'm\.impl\("(\w+)"', registration.read_text()))


@pytest.mark.parametrize("bits", [4, 8])
def test_reordered_layers_are_the_packed_ones(bits):
    layers = {layer.name: layer for layer in gpu.resnet18()}
    for name in ("layer1.0.conv1", "layer2.0.downsample"):
        layer = layers[name]._replace(size=6)
        outputs = []
        for reordered in (False, True):
            g = torch.Generator().manual_seed(0)
            operator, args = gpu.packed_layer(layer, 2, bits, reordered, g)
            outputs.append(getattr(torch.ops.fdda, operator)(*args))
            assert operator == ("reordered_conv2d" if reordered else "packed_conv2d")
        expected, actual = outputs
        packed = bits == 4 and layer.packed_out
        assert torch.equal(actual, ops.pack_codes(expected) if packed else expected)
        assert len(expected.unique()) > 4


def test_cases_run_and_equal_themselves(capsys):
    assert gpu.check("cpu")
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    assert "packed_conv2d" in printed


@pytest.mark.parametrize(("exact", "wrong"), [(True, True), (False, False)])
def test_a_difference_of_a_rounding_is_wrong_where_bits_must_be_equal(
    exact, wrong, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "cases", lambda: [gpu.Case("unpack_weight", (), exact)])
    monkeypatch.setattr(gpu, "compare", lambda case, device: 1e-7)
    assert gpu.check("cpu") is not wrong
    assert ("WRONG" in capsys.readouterr().out) is wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_on_a_gpu():
    assert gpu.check("cuda")


def test_difference():
    x = torch.tensor([1.0, -4.0, float("nan")])
    assert gpu.difference(x[:2].clone(), x[:2]) == 0
    assert gpu.difference(x.clone(), x) == 0
    assert gpu.difference(x + torch.tensor([1.0, 0, 0]), x) == 0.25
    assert gpu.difference((x[:2], x[:2] * 2), (x[:2], x[:2])) == 1.0
    assert gpu.difference(x[:1], x) == float("inf")
    assert gpu.difference(x.nan_to_num(0), x) == float("inf")
    assert gpu.difference(x[:2].int(), x[:2]) == float("inf")


def test_operators_on_codes_move_what_they_read_and_write():
    for name, (moved, run) in gpu.code_runs(2, "cpu").items():
        arguments = [run.__self__] if name == "copy" else [*run.args]
        read = sum(t.nbytes for t in arguments if isinstance(t, torch.Tensor))
        assert moved == read + run().nbytes, name


def test_medians_take_turns_and_leave_out_the_first_round():
    order = []
    times = {"a": iter([99.0, 3.0, 1.0, 2.0]), "b": iter([0.0, 5.0, 5.0, 9.0])}

    def seconds(run):
        order.append(run)
        return next(times[run])

    found = gpu.medians({"a": "a", "b": "b"}, 3, seconds)
    assert found == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 4


def test_row_compares_with_the_fastest_other_library():
    times = {"W4A4": 2e-6, "W8A8": 1e-6, "cuBLAS fp16": 8e-6, "torch.compile fp16": 5e-6}
    assert gpu.row("conv", 32, times) == ["conv", "32", "2.0", "1.0", "8.0", "", "5.0", "2.50"]
    times["torch._int_mm"] = 3e-6
    assert gpu.row("conv", 1, times)[-2:] == ["5.0", "1.50"]
