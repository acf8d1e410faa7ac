"""Networks for the inference benchmarks, as the files that the runtimes load."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from runtimes import IMAGE
from torch import nn

import fdda_fast as fdda
from fdda_fast.quantization.modules import quantizer_mode
from fdda_fast.quantization.prepare import prepare

_BATCHES, _BATCH = 3, 8


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def _calibration() -> list[torch.Tensor]:
    return [images(_BATCH, seed) for seed in range(_BATCHES)]


@torch.no_grad()
def network(name: str) -> nn.Module:
    """Random weights, and the BatchNorm statistics that they have on the calibration images."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages
    model.train()
    for batch in _calibration():
        model(batch)
    return model.eval()


@torch.no_grad()
def packed(model: nn.Module, bits: int, path: Path) -> fdda.PackedModel:
    """The network with `bits` for weights and activations, saved to `path`."""
    quantized = prepare(model, fdda.Bits(bits, bits))
    with quantizer_mode(quantized, "observe"):
        for batch in _calibration():
            quantized(batch)
    result = fdda.pack(quantized, images(1, 0))
    result.save(path)
    return result


def onnx_int8(model: nn.Module, path: Path) -> None:
    """Writes the network with 8-bit Q/DQ pairs, channels' weights apart, to `path`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(_calibration())

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    exported, folded = path.with_suffix(".float.onnx"), path.with_suffix(".folded.onnx")
    torch.onnx.export(
        model,
        (images(2, 0),),
        exported,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    quant_pre_process(exported, folded, skip_symbolic_shape=True)
    quantize_static(
        folded,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
