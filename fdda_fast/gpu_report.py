"""What compilers made of the GPU kernels, and what data sheets allow. Needs no GPU, times nothing.

CUDA kernels are read from the library of this installation, Triton kernels are compiled here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from .ops._library import cuda_library

# Of SASS: tensor cores on integers (of those, on 4 bits) and on halves, copies from global to
# shared memory past the registers, loads of matrices, accesses of 128 bits. Hopper's wgmma and
# Blackwell's tcgen05 have names of their own.
INSTRUCTIONS = {
    "IMMA": r"\b(?:IMMA|IGMMA|UTCIMMA)\b",
    "on s4": r"\bIMMA\.16864\b",
    "HMMA": r"\b(?:HMMA|HGMMA|UTCHMMA)\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDSM": r"\bLDSM\b",
    "128 bits": r"\b(?:LDG|LDS|STG|STS|LDGSTS)\.\S*128\b",
}
_AMD_INSTRUCTIONS = {
    "IMMA": r"\bv_mfma_i32",
    "on s4": r"(?!)",  # none
    "HMMA": r"\bv_mfma_f32",
    "LDGSTS": r"\b(?:global_load|buffer_load)\S*_lds\b|\bbuffer_load.* lds$",
    "LDSM": r"(?!)",
    "128 bits": r"\b(?:global|buffer)_(?:load|store)_dwordx4|\bds_(?:read|write)_b128",
}


class Processor(NamedTuple):
    """Limits of a multiprocessor, as documented."""

    warps: int
    blocks: int
    shared: int  # bytes
    warp: int = 32
    registers: int = 65536
    register_unit: int = 256  # to a warp
    reserved: int = 1024  # bytes of shared memory that every block has in addition


# CUDA C++ Programming Guide, technical specifications per compute capability. gfx942: AMD CDNA3 ISA
# guide: 4 SIMDs with 512 registers a lane, in units of 8, and 8 waves each.
PROCESSORS = {
    "sm_80": Processor(64, 32, 164 * 1024),
    "sm_86": Processor(48, 16, 100 * 1024),
    "sm_89": Processor(48, 24, 100 * 1024),
    "sm_90": Processor(64, 32, 228 * 1024),
    "sm_100": Processor(64, 32, 228 * 1024),
    "gfx942": Processor(32, 16, 64 * 1024, 64, 4 * 512 * 64, 8 * 64, 0),
}


class Kernel(NamedTuple):
    """A kernel on an architecture. Spills: bytes of the stack (gfx942: registers) of a thread."""

    name: str
    architecture: str
    registers: int
    spills: int
    shared: int
    threads: int
    mix: dict[str, int]

    @property
    def blocks(self) -> int:
        """To a multiprocessor at a time."""
        return blocks_per_processor(self.architecture, self.registers, self.shared, self.threads)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps."""
        limits = PROCESSORS[self.architecture]
        return self.blocks * -(-self.threads // limits.warp) / limits.warps


def blocks_per_processor(architecture: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds.

    Args:
        architecture: one of `PROCESSORS`.
        registers: of a thread.
        shared: bytes of shared memory of a block, static and dynamic.
        threads: of a block.
    """
    limits = PROCESSORS[architecture]
    warps = -(-threads // limits.warp)
    per_warp = _up(max(1, registers) * limits.warp, limits.register_unit)
    # A quarter of the registers belongs to every scheduler, and a warp to one of them.
    resident = limits.registers // 4 // per_warp * 4
    by_shared = limits.shared // (_up(shared, 128) + limits.reserved or 1)
    return min(limits.blocks, limits.warps // warps, resident // warps, by_shared)


def cuda_kernels(library: Path) -> list[Kernel]:
    """The kernels of a compiled library; FileNotFoundError without cuobjdump."""
    usage = _by_architecture(library, "-res-usage")
    notes = _by_architecture(library, "-elf")
    code = _by_architecture(library, "-sass")
    kernels = []
    for architecture, text in usage.items():
        sass = dict(part.split("\n", 1) for part in code[architecture].split("Function : ")[1:])
        threads = _max_threads(notes[architecture])
        # From sm_90 on, cuobjdump counts what the system reserves where a kernel uses any.
        counted = PROCESSORS[architecture].reserved if int(architecture[3:]) >= 90 else 0
        for name, line in re.findall(r"Function (\S+):\n(.*)", text):
            values = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            kernels.append(
                Kernel(
                    _demangled(name),
                    architecture,
                    values["REG"],
                    values["STACK"] + values["LOCAL"],
                    max(0, values["SHARED"] - counted) + dynamic_shared(name),
                    threads[name],
                    _mix(sass[name], INSTRUCTIONS),
                )
            )
    return kernels


def dynamic_shared(name: str) -> int:
    """Bytes that the launch of a mangled kernel adds, as `Stages` in csrc/cuda/gemm/tile.h."""
    found = re.search(
        r"BlockTileILi(\d+)ELi(\d+)ELi\d+ELi\d+ELi\d+EEE(?:Lb|LNS\w*8OperandsE)(\d)", name
    )
    if not found:
        return 0
    rows, channels, operands = (int(group) for group in found.groups())
    stage = rows * (32 if operands > 2 else 64) + channels // 16 * (512 if operands else 1024)
    return stage * (4 if 4 * stage <= 48 * 1024 else 3)


def triton_kernels() -> Iterator[Kernel]:
    """The plainest and the fullest configuration of every kernel for every target, compiled.

    Raises:
        ImportError: Triton is not installed.
    """
    from .kernels import _tiles, offline

    for entry in offline.TABLE:
        configurations = list(entry.some)
        several = len({dtype for _, dtype in configurations}) > 1
        for constants, dtype in (configurations[0], configurations[-1])[: len(configurations)]:
            for architecture, target in offline.TARGETS.items():
                binary = offline.build(entry, constants, dtype, target)
                found = offline.resources(binary)
                amd = "amdgcn" in binary.asm
                sass = binary.asm["amdgcn"] if amd else offline.cuobjdump(binary, "-sass")
                yield Kernel(
                    " ".join([entry.name, *_labels(constants), *([dtype] if several else [])]),
                    architecture,
                    found.registers,
                    found.spills,
                    found.shared,
                    constants.get("threads", _tiles.THREADS),
                    _mix(sass, _AMD_INSTRUCTIONS if amd else INSTRUCTIONS),
                )


class Sheet(NamedTuple):
    """Dense rates of a GPU's data sheet: tensor operations, two a multiply-add, and bytes a second.

    Four bits: where the tensor cores have no products of them, they run as eight.
    """

    name: str
    int8: float
    int4: float
    bandwidth: float


SHEETS = (
    Sheet("A100 SXM 80 GB", 624e12, 1248e12, 2.039e12),
    Sheet("H100 SXM", 1979e12, 1979e12, 3.35e12),
)
LAUNCH = 3e-6  # seconds between kernels: an assumption, no data sheet has it
BATCHES = (1, 32, 256)


class Layer(NamedTuple):
    """A convolution of square images or, of size 1, a linear layer.

    residual: bytes of what is added to an output, 0 without. packed_in, packed_out: codes of 4 bits
    lie two to a byte there, see deploy/reordered.py.
    """

    name: str
    size: int
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    residual: int = 0
    in_bytes: int = 1  # of an input
    out_bytes: int = 1
    packed_in: bool = False
    packed_out: bool = False

    @property
    def out_size(self) -> int:
        return -(-self.size // self.stride)

    @property
    def macs(self) -> int:
        """Of an image."""
        return self.out_size**2 * self.out_channels * self.in_channels * self.kernel**2

    def bytes(self, batch: int, bits: int) -> float:
        """What goes in and out once, and packed weights."""
        out_bytes = 0.5 if self.packed_out and bits == 4 else self.out_bytes
        in_bytes = 0.5 if self.packed_in and bits == 4 else self.in_bytes
        outputs = self.out_size**2 * self.out_channels * (out_bytes + self.residual)
        inputs = self.size**2 * self.in_channels * in_bytes
        weights = self.in_channels * self.kernel**2 * self.out_channels * bits / 8
        return batch * (inputs + outputs) + weights

    def seconds(self, sheet: Sheet, batch: int, bits: int) -> tuple[float, str]:
        """Predicted, without the launch; whether products ("c") or memory ("m") bound it."""
        rate = sheet.int4 if bits == 4 else sheet.int8
        compute = 2 * batch * self.macs / rate
        memory = self.bytes(batch, bits) / sheet.bandwidth
        return max((compute, "c"), (memory, "m"))


def resnet18() -> list[Layer]:
    """Layers with weights of ResNet-18 at 224 pixels, as `PackedModel` runs them on a GPU.

    A block's last convolution adds the block's input, in 8 bits; where that is reduced first, the
    reducing one comes last and adds float32.
    """
    layers = [Layer("conv1", 224, 3, 64, 7, 2)]
    channels, size = 64, 56
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}"
            # What no addition reads has 4 bits; the pool reads bytes.
            narrow = block == 1 and stage < 4
            first = Layer(f"{name}.conv1", size, channels, width, 3, stride, packed_out=True)
            last = Layer(f"{name}.conv2", size // stride, width, width, 3, 1)
            added = {"residual": 4 if stride == 2 else 1, "packed_out": narrow}
            if stride == 2:
                down = Layer(f"{name}.downsample", size, channels, width, 1, stride, **added)
                block_layers = [first, last._replace(out_bytes=4), down]
            else:
                block_layers = [first, last._replace(**added)]
            layers += [layer._replace(packed_in=True) for layer in block_layers]
            channels, size = width, size // stride
    # The sums of the pooled codes are int32, the logits float32.
    return [*layers, Layer("fc", 1, 512, 1000, 1, 1, in_bytes=4, out_bytes=4)]


def roofline(sheet: Sheet) -> Table:
    """Microseconds of every layer at every batch, in 8 and in 4 bits, as packed as they are.

    The last row: what all would take if every code had a byte of its own.
    """
    table = Table("layer")
    table.add_column("MMAC", justify="right")
    columns = [(batch, bits) for batch in BATCHES for bits in (8, 4)]
    for batch, bits in columns:
        table.add_column(f"{batch}, W{bits}A{bits}", justify="right")
    totals, in_bytes = dict.fromkeys(columns, 0.0), dict.fromkeys(columns, 0.0)
    layers = resnet18()
    for layer in layers:
        loose = layer._replace(packed_in=False, packed_out=False)
        cells = []
        for batch, bits in columns:
            seconds, bound = layer.seconds(sheet, batch, bits)
            totals[batch, bits] += seconds + LAUNCH
            in_bytes[batch, bits] += loose.seconds(sheet, batch, bits)[0] + LAUNCH
            cells.append(f"{1e6 * seconds:.2f} {bound}")
        table.add_row(layer.name, f"{layer.macs / 1e6:.1f}", *cells)
    table.add_row(
        f"all, and {len(layers)} launches",
        f"{sum(layer.macs for layer in layers) / 1e6:.1f}",
        *(f"{1e6 * seconds:.1f}  " for seconds in totals.values()),
    )
    table.add_row(
        "the same, a byte to a code", "", *(f"{1e6 * s:.1f}  " for s in in_bytes.values())
    )
    return table


def report() -> Iterator[tuple[str, Table | None]]:
    """Titles and tables; a title alone says what is missing."""
    library = cuda_library()
    if library is None:
        yield (
            "CUDA kernels: this installation was built without nvcc and has none",
            None,
        )
    elif cuobjdump_path() is None:
        yield "CUDA kernels: cuobjdump not found (the CUDA toolkit and Triton have it)", None
    else:
        yield f"CUDA kernels in {library.name}", _table(cuda_kernels(library))
    if importlib.util.find_spec("triton") is None:
        yield "Triton kernels: Triton is not installed", None
    else:
        yield "Triton kernels, plainest and fullest configuration", _table(triton_kernels())
    for sheet in SHEETS:
        yield (
            f"ResNet-18 on {sheet.name}, *predicted*, not measured: microseconds by batch and "
            f"bits, bound by products (c) at {sheet.int8 / 1e12:.0f} (int8) and "
            f"{sheet.int4 / 1e12:.0f} (int4) tera-operations/s or by memory (m) at "
            f"{sheet.bandwidth / 1e9:.0f} GB/s, the data sheet's; a launch is assumed to take "
            f"{1e6 * LAUNCH:.0f} us",
            roofline(sheet),
        )


def cuobjdump_path() -> str | None:
    """From the CUDA toolkit, or from Triton, which brings it along."""
    folders = [Path("/usr/local/cuda/bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    candidates = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return shutil.which("cuobjdump") or next(filter(None, candidates), None)


def _table(kernels: Iterator[Kernel] | list[Kernel]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="fold")
    table.add_column("target")
    headings = ("regs", "spills", "shared", "threads", "blocks", "occupied", *INSTRUCTIONS)
    for heading in headings:
        table.add_column(heading, justify="right")
    for k in kernels:
        numbers = (k.registers, k.spills, k.shared, k.threads, k.blocks)
        cells = [*map(str, numbers), f"{100 * k.occupancy:.0f} %", *map(str, k.mix.values())]
        table.add_row(escape(k.name), k.architecture, *cells)
    return table


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _mix(code: str, instructions: dict[str, str]) -> dict[str, int]:
    return {name: len(re.findall(e, code, re.MULTILINE)) for name, e in instructions.items()}


def _by_architecture(library: Path, flag: str) -> dict[str, str]:
    """What cuobjdump says of all files of an architecture."""
    tool = cuobjdump_path()
    if tool is None:
        raise FileNotFoundError("cuobjdump: not found")
    text = subprocess.run([tool, flag, library], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)[1:]
    found: dict[str, str] = {}
    for architecture, part in zip(parts[::2], parts[1::2], strict=True):
        found[architecture] = found.get(architecture, "") + part
    return {a: text for a, text in found.items() if a in PROCESSORS}


def _max_threads(notes: str) -> dict[str, int]:
    """Launch bounds by kernel; 1024 without."""
    threads = {}
    for name, section in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", notes, re.M | re.S):
        sizes = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(.*)", section)
        x, y, z = (int(s, 16) for s in sizes[1].split()) if sizes else (1024, 1, 1)
        threads[name] = x * y * z
    return threads


def _demangled(name: str) -> str:
    filter_ = shutil.which("c++filt")
    if filter_:
        command = [filter_, name]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"fdda::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"BlockTile<(\d+), (\d+)[^>]*>", r"\1x\2", name)
    name = re.sub(r"\(Operands\)(\d)", r"operands \1", name).partition("(")[0]
    return name.replace("_kernel", "").replace(", ", ",")


def _labels(constants: dict) -> list[str]:
    """The blocks, and the flags that are set."""
    flags = [name.lower() for name, value in constants.items() if value is True]
    blocks = [str(value) for name, value in constants.items() if name.startswith("BLOCK")]
    return ["x".join(blocks), *flags] if blocks else flags
