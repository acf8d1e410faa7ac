"""What nvcc makes of the CUDA kernels, without a GPU: `python bench/cuda_report.py`.

A row is a kernel on an architecture: registers, bytes of spills, and static shared memory of a
thread or block, and how many instructions it has of the tensor cores (imma, of those on 4 bits
imma4), of copies past the registers (LDGSTS), of loads of matrices (LDSM) and of loads of 16 bytes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90", "100")
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall"]
OPERANDS = ("kU8S8", "kU8S4", "kU4S4")  # as in gemm/tile.h
INSTRUCTIONS = {
    "imma": r"\bIMMA\.",
    "imma4": r"\bIMMA\.16864\.",
    "ldgsts": r"\bLDGSTS\.",
    "ldsm": r"\bLDSM\.",
    "load16": r"\b(LDG|LDS)\.\S*128",
}


def tool(name: str) -> str | None:
    """From the toolkit, or from triton, which brings the disassembler."""
    folders = ["/usr/local/cuda/bin"]
    folders += [f"{path}/triton/backends/nvidia/bin" for path in sys.path]
    return shutil.which(name) or next(
        filter(None, (shutil.which(name, path=f) for f in folders)), None
    )


def has_tools() -> bool:
    return bool(tool("nvcc") and tool("cuobjdump"))


def demangled(name: str) -> str:
    filter_ = shutil.which("c++filt")
    if filter_:
        name = subprocess.run([filter_, name], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"fdda::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\(Operands\)(\d)", lambda m: OPERANDS[int(m[1])], name)
    return name.partition("(")[0]


def report(source: Path, architecture: str) -> list[dict]:
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [tool("nvcc"), *FLAGS, f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
        log = subprocess.run(
            [*command, "-o", cubin, source], check=True, capture_output=True, text=True
        ).stderr
        sass = subprocess.run(
            [tool("cuobjdump"), "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    code = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    rows = []
    for part in log.split("Function properties for ")[1:]:
        name = part.split()[0]
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append(
            {
                "kernel": demangled(name),
                "architecture": f"sm_{architecture}",
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", part))),
                "shared": int(shared[1]) if shared else 0,
                **{key: len(re.findall(e, code[name])) for key, e in INSTRUCTIONS.items()},
            }
        )
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    if not has_tools():
        raise SystemExit("nvcc and cuobjdump: not found")
    rows = [r for a in arguments.architectures for s in SOURCES for r in report(s, a)]
    width = max(len(row["kernel"]) for row in rows)
    print(*("kernel".ljust(width), *list(rows[0])[1:]), sep="  ")
    for row in rows:
        values = [str(value).rjust(len(key)) for key, value in row.items() if key != "kernel"]
        print(row["kernel"].ljust(width), *values, sep="  ")


if __name__ == "__main__":
    main()
