"""The runtimes that inference is compared on: each loads a file and runs images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import NamedTuple

import torch

IMAGE = (3, 224, 224)
OURS, ONNX_RUNTIME, OPENVINO = "fdda-fast", "ONNX Runtime int8", "OpenVINO int8"
# The 8-bit model comes from the first three, whoever runs it.
_EXPORT = ("onnx", "onnxscript", "onnxruntime")
MODULES = {OURS: ("fdda_fast",), ONNX_RUNTIME: _EXPORT, OPENVINO: (*_EXPORT, "openvino")}


class Runtime(NamedTuple):
    """run: float32 images [N, 3, 224, 224] -> logits. kernels: what computes the layers."""

    run: Callable[[torch.Tensor], torch.Tensor]
    kernels: str = ""


def _missing(runtime: str) -> list[str]:
    return [name for name in MODULES[runtime] if util.find_spec(name) is None]


def peers() -> list[str]:
    """Those that are installed."""
    return [name for name in (OPENVINO, ONNX_RUNTIME) if not _missing(name)]


def installation() -> list[str]:
    """What to install for the others."""
    return [
        f"{name} is left out: {', '.join(_missing(name))} missing, pip install '.[bench]'"
        for name in (OPENVINO, ONNX_RUNTIME)
        if _missing(name)
    ]


def import_runtime(name: str) -> None:
    import_module(MODULES[name][-1])


def load(name: str, path: Path, batch: int, threads: int) -> Runtime:
    """Loads a .fdda or .onnx file; threads of fdda-fast are torch.set_num_threads."""
    loaders = {OURS: _ours, ONNX_RUNTIME: _onnx_runtime, OPENVINO: _openvino}
    return loaders[name](path, batch, threads)


def _ours(path: Path, batch: int, threads: int) -> Runtime:
    from fdda_fast import load_packed

    return Runtime(load_packed(path))


def _onnx_runtime(path: Path, batch: int, threads: int) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_free_dimension_override_by_name("batch", batch)
    # Threads that wait for work would take the cores from the runtime whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    return Runtime(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))


def _openvino(path: Path, batch: int, threads: int) -> Runtime:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([batch, *IMAGE])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the process is pinned
    }
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def run(x: torch.Tensor) -> torch.Tensor:
        request.infer([openvino.Tensor(x.numpy(), shared_memory=True)])
        return torch.from_numpy(request.get_output_tensor().data)

    return Runtime(run, _openvino_kernels(compiled))


def _openvino_kernels(compiled) -> str:
    """Of the execution graph's layers, from the primitives' names; I8 is an 8-bit kernel."""
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kernels = Counter(
        info["primitiveType"].astype(str)
        for info in infos
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    )
    return ", ".join(f"{count} {name}" for name, count in kernels.items())
