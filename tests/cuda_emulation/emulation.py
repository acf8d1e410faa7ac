"""Builds CUDA sources with g++ and runs their kernels on the CPU, see emulator.h."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE / 'include'}"]
EMULATOR = ["-O2"]
# The emulator has the functions that -fsanitize=thread calls, so the link has no sanitizer.
KERNELS = ["-O1", "-fsanitize=thread", "-ffp-contract=off", "-include", "cuda_runtime.h"]
NAMES = ("allocate", "initialise", "written", "reset", "error", "bank_conflicts")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def build(*sources: Path) -> "Emulation":
    """Built libraries stay in build/cuda_emulation under a hash of all that goes into them."""
    headers = [
        p
        for folder in (HERE, ROOT / "csrc/common", ROOT / "csrc/cuda", sources[0].parent)
        for p in folder.rglob("*")
        if p.suffix in (".h", ".cpp", ".cu")
    ]
    digest = hashlib.sha256(repr((COMPILER, FLAGS, EMULATOR, KERNELS, sources)).encode())
    for path in sorted({*headers, *sources}):
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_emulation" / digest.hexdigest()[:16]
    library = folder / "kernels.so"
    if not library.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        objects = []
        for source in (HERE / "emulator.cpp", *sources):
            objects.append(unfinished / f"{source.stem}.o")
            options = EMULATOR if source.suffix == ".cpp" else KERNELS
            command = [COMPILER, *FLAGS, *options, "-x", "c++", "-c", source, "-o", objects[-1]]
            subprocess.run(command, check=True)
        subprocess.run([COMPILER, "-shared", *objects, "-o", unfinished / library.name], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return Emulation(ctypes.CDLL(str(library)))


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

    def put(self, tensor):
        """The address of a copy of the tensor; None for None."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        address = self.empty(tensor.nbytes)
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
