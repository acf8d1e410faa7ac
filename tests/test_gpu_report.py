"""Occupancy, predicted times and what a report says where tools are missing."""

import pytest
import torch
from torchvision.models import resnet18
from typer.testing import CliRunner

from fdda_fast import gpu_report
from fdda_fast.cli import app
from fdda_fast.ops._library import cuda_library

HAS_CUDA_KERNELS = cuda_library() is not None and gpu_report.cuobjdump_path() is not None
LARGE = "_ZN4fdda4cuda16conv_gemm_kernelINS0_9BlockTileILi128ELi128ELi64ELi32ELi2EEE"


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "blocks"),
    [
        ("sm_80", 32, 0, 256, 8),  # all 64 warps
        ("sm_80", 33, 0, 256, 6),  # 40 registers, since a warp's come in 256: 51 warps, 48 of them
        ("sm_80", 128, 0, 256, 2),
        ("sm_80", 129, 0, 256, 1),
        ("sm_80", 255, 0, 512, 0),  # does not start
        ("sm_80", 32, 48 * 1024, 128, 3),
        ("sm_80", 16, 0, 32, 32),  # the number of blocks
        ("sm_86", 32, 0, 256, 6),  # 48 warps
        ("sm_86", 32, 50 * 1024, 128, 1),  # 1 KiB a block is the system's
        ("sm_89", 16, 0, 32, 24),
        ("sm_90", 64, 56 * 1024, 128, 4),
        ("gfx942", 128, 0, 256, 4),  # 4 waves to a SIMD
        ("gfx942", 129, 0, 256, 3),
        ("gfx942", 32, 32 * 1024, 64, 2),
    ],
)
def test_blocks_per_processor(architecture, registers, shared, threads, blocks):
    found = gpu_report.blocks_per_processor(architecture, registers, shared, threads)
    assert found == blocks


def test_occupancy_counts_warps():
    kernel = gpu_report.Kernel("k", "sm_80", 128, 0, 0, 250, {})
    assert (kernel.blocks, kernel.occupancy) == (2, 0.25)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (f"{LARGE}Lb0ELi1EEEv", 3 * 16384),
        (f"{LARGE}Lb1ELi1EEEv", 4 * 12288),
        (f"{LARGE}LNS0_8OperandsE0ELi1EEEv", 3 * 16384),
        (f"{LARGE}LNS0_8OperandsE2ELi1EEEv", 4 * 12288),
        (f"{LARGE}LNS0_8OperandsE3ELi16EEEv", 4 * 8192),
        (f"{LARGE}LNS0_8OperandsE4ELi16EEEv", 4 * 8192),
        ("_ZN4fdda4cuda11conv_kernelENS_10PackedConvEl", 0),
    ],
)
def test_dynamic_shared_memory_is_that_of_the_stages(name, size):
    assert gpu_report.dynamic_shared(name) == size


def test_layers_are_those_of_the_network():
    shapes = []

    def note(module, inputs, output):
        size = inputs[0].shape[-1] if inputs[0].dim() == 4 else 1
        macs = module.weight.numel() * output.numel() // output.shape[1]
        shapes.append((size, module.weight.shape[1], module.weight.shape[0], macs))

    with torch.device("meta"):
        network = resnet18()
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(note)
        network(torch.zeros(1, 3, 224, 224))
    layers = gpu_report.resnet18()
    found = [(y.size, y.in_channels, y.out_channels, y.macs) for y in layers]
    assert sorted(found) == sorted(shapes)


def test_prediction_is_the_larger_of_products_and_memory():
    sheet = gpu_report.Sheet("", int8=2e12, int4=4e12, bandwidth=1e12)
    layer = gpu_report.Layer("", 10, 20, 30, 3, 2, residual=1)
    assert (layer.out_size, layer.macs) == (5, 25 * 30 * 20 * 9)
    assert layer.bytes(2, 4) == 2 * (100 * 20 + 25 * 30 * 2) + 30 * 20 * 9 / 2
    packed = layer._replace(packed_in=True, packed_out=True)
    assert packed.bytes(2, 8) == layer.bytes(2, 8)
    assert packed.bytes(2, 4) == 2 * (100 * 20 / 2 + 25 * 30 * 1.5) + 30 * 20 * 9 / 2
    assert layer.seconds(sheet, 2, 8) == (2 * 2 * layer.macs / 2e12, "c")
    assert layer.seconds(sheet, 2, 4) == (2 * 2 * layer.macs / 4e12, "c")
    slow = sheet._replace(bandwidth=1e9)
    assert layer.seconds(slow, 2, 4) == (layer.bytes(2, 4) / 1e9, "m")
    table = gpu_report.roofline(slow)
    assert table.row_count == len(gpu_report.resnet18()) + 2
    all_8, all_4 = (list(table.columns[c].cells)[-2:] for c in (2, 3))
    assert all_8[0] == all_8[1]
    assert float(all_4[0]) < float(all_4[1])
    assert len(table.columns) == 2 + 2 * len(gpu_report.BATCHES)


@pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="needs the CUDA library and cuobjdump")
def test_cuda_kernels():
    """No spills; tensor cores, copies past the registers, two blocks of the large tile."""
    kernels = gpu_report.cuda_kernels(cuda_library())
    assert {k.architecture for k in kernels} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100"}
    for kernel in kernels:
        assert kernel.spills == 0
        assert kernel.blocks >= 1
        assert kernel.shared >= 0
        if kernel.name == "linear":
            assert kernel.shared == 0
        if kernel.mix["IMMA"]:
            assert kernel.mix["LDGSTS"] > 0
            assert kernel.mix["LDSM"] > 0
            assert kernel.shared > 0
        if "_gemm<128x128" in kernel.name:
            assert kernel.threads == 256
            assert kernel.blocks >= 2
    large = [k for k in kernels if "_gemm<128x128" in k.name and k.mix["IMMA"]]
    for kernel in large:
        assert kernel.mix["128 bits"] > 0
        # 64 x 32 outputs x 64 k of a warp in products of 16 x 8 x 32, or 64.
        assert (kernel.mix["IMMA"], kernel.mix["on s4"]) in ((32, 0), (16, 16))
    # Tensor cores have products of 4 bits up to sm_89.
    on_4_bits = {kernel.architecture for kernel in large if kernel.mix["on s4"]}
    assert on_4_bits == {"sm_80", "sm_86", "sm_89"}
    assert {kernel.architecture for kernel in large} == {kernel.architecture for kernel in kernels}


def test_triton_kernels(monkeypatch):
    """Of one kernel; the table of all takes a minute."""
    pytest.importorskip("triton")
    from fdda_fast.kernels import offline

    entries = [e for e in offline.TABLE if e.name == "packed_conv"]
    monkeypatch.setattr(offline, "TABLE", entries)
    kernels = list(gpu_report.triton_kernels())
    assert len(kernels) == 2 * len(offline.TARGETS)
    for kernel in kernels:
        assert (kernel.spills, kernel.mix["HMMA"]) == (0, 0)
        assert kernel.mix["IMMA"] > 0
        assert kernel.blocks >= 1


def test_report_says_in_a_line_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_report, "cuda_library", lambda: None)
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    cuda, triton, *rest = gpu_report.report()
    assert cuda[1] is None
    assert "nvcc" in cuda[0]
    assert triton == ("Triton kernels: Triton is not installed", None)
    assert len(rest) == 2
    assert all("*predicted*, not measured" in title for title, _ in rest)
    monkeypatch.setattr(gpu_report, "cuda_library", lambda: "library.so")
    monkeypatch.setattr(gpu_report, "cuobjdump_path", lambda: None)
    assert "cuobjdump not found" in next(gpu_report.report())[0]


def test_info_prints_the_report(monkeypatch):
    sheet = gpu_report.SHEETS[0]
    report = [("nothing here", None), ("predicted", gpu_report.roofline(sheet))]
    monkeypatch.setattr(gpu_report, "report", lambda: iter(report))
    plain = CliRunner().invoke(app, ["info"])
    assert "nothing here" not in plain.stdout
    output = CliRunner().invoke(app, ["info", "--gpu-report"]).stdout
    assert "nothing here\n" in output
    assert "layer4.1.conv2" in output
