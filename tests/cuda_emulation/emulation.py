"""Builds CUDA sources with g++ and runs their kernels on the CPU, see emulator.h."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])
needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler, on Linux"
)

FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
]
EMULATOR = ["-O2"]
# The emulator has the functions that -fsanitize=thread calls, so the link has no sanitizer.
KERNELS = ["-O1", "-fsanitize=thread", "-ffp-contract=off", "-include", "cuda_runtime.h"]
NAMES = ("allocate", "initialise", "written", "reset", "error", "bank_conflicts")


KERNEL_SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def build_operators() -> "Emulation":
    """All kernels of csrc/cuda, behind the entries of operators.cu."""
    return build(*KERNEL_SOURCES, HERE / "operators.cu")


def copy_sources(folder: Path, old: str | None = None, new: str = "") -> list[Path]:
    """A copy of the kernels in which `new` stands for `old`, which they have once."""
    for name in ("common", "cuda"):
        shutil.copytree(ROOT / "csrc" / name, folder / name)
    if old is not None:
        texts = {path: path.read_text() for path in (folder / "cuda").rglob("*.*")}
        assert sum(text.count(old) for text in texts.values()) == 1
        for path, text in texts.items():
            if old in text:
                path.write_text(text.replace(old, new))
    return sorted((folder / "cuda").rglob("*.cu"))


def build(*sources: Path) -> "Emulation":
    objects = [compiled(HERE / "emulator.cpp", EMULATOR)]
    objects += [compiled(source, KERNELS) for source in sources]
    command = [COMPILER, "-shared", *objects]
    return Emulation(ctypes.CDLL(str(cached("so", repr(command).encode(), command))))


def compiled(source: Path, options: list[str]) -> Path:
    command = [COMPILER, *FLAGS, *options, "-x", "c++", "-c"]
    headers = {*HERE.rglob("*.h"), *(ROOT / "csrc").rglob("*.h"), *source.parent.rglob("*.h")}
    contents = [path.read_bytes() for path in (source, *sorted(headers))]
    return cached("o", b"\0".join([repr(command).encode(), *contents]), [*command, source])


def cached(suffix: str, key: bytes, command: list) -> Path:
    """What the command makes, kept under a hash of all that goes into it."""
    path = ROOT / "build/cuda_emulation" / f"{hashlib.sha256(key).hexdigest()[:24]}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", unfinished], check=True)
        unfinished.rename(path)
    return path


class Emulation:
    def __init__(self, library):
        self.library = library
        for name in NAMES:
            setattr(self, f"_{name}", getattr(library, f"emulation_{name}"))
        self._allocate.restype = ctypes.c_void_p
        self._written.restype = ctypes.c_size_t
        self._error.restype = ctypes.c_char_p
        self._bank_conflicts.restype = ctypes.c_int64
        self.reset(0)

    def reset(self, seed):
        """Forgets all buffers and draws another order of the threads."""
        self._reset(seed)

    def empty(self, size):
        """The address of a buffer that kernels may not read before they have written it."""
        address = self._allocate(ctypes.c_size_t(size))
        assert address, "the emulator's memory is full"
        return address

    def put(self, tensor, offset=0):
        """The address of a copy, `offset` bytes behind an aligned one; None for None."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        address = self.empty(offset + tensor.nbytes) + offset
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        self._initialise(ctypes.c_void_p(address), ctypes.c_size_t(tensor.nbytes))
        return address

    def take(self, address, shape, dtype):
        """What kernels wrote to a buffer, all of it."""
        out = torch.empty(shape, dtype=dtype)
        size = ctypes.c_size_t(out.nbytes)
        assert self._written(ctypes.c_void_p(address), size) == out.nbytes
        ctypes.memmove(out.data_ptr(), address, out.nbytes)
        return out

    def run(self, name, *arguments):
        """Calls a function that launches kernels; raises what the emulator found."""
        getattr(self.library, name)(*arguments)
        if error := self._error().decode():
            raise RuntimeError(error)

    @property
    def bank_conflicts(self):
        return self._bank_conflicts()
