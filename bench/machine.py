"""What a benchmark's figures belong to: processor, instruction sets, versions."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from fdda_fast.ops._library import backend_info

PACKAGES = "torch", "openvino", "onnxruntime", "onnx"


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _versions() -> list[str]:
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return [f"{name} {installed[name]}" for name in PACKAGES if name in installed]


def _amx() -> str:
    if "amx_int8" not in _cpuinfo("flags"):
        return "AMX: not on this processor"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    onednn = (
        f"ONEDNN_MAX_CPU_ISA={limit} limits OpenVINO and PyTorch"
        if limit
        else "OpenVINO and PyTorch (oneDNN, --onednn-isa) and this library (--isa) may use it"
    )
    return f"AMX: present. {onednn}. ONNX Runtime's kernels (MLAS) have no known switch"


def describe() -> list[str]:
    """Lines to print above a table."""
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    isa = backend_info()["isa"]
    return [
        f"{_cpuinfo('model name')} (family {family}, model {model}), cores in use: "
        f"{sorted(os.sched_getaffinity(0))}",
        f"fdda-fast's instruction set: {isa or 'none, plain PyTorch'}",
        _amx(),
        ", ".join(_versions()),
    ]
