"""Integer inference against OpenVINO, ONNX Runtime and PyTorch: `python bench/inference.py`.

Four parts. `networks`: whole networks at 224 px. `layers`: single 3x3 convolutions, W4A4, against
PyTorch's 8-bit ones. `gemm`: a matrix product, W4A8, against PyTorch's 8-bit ones. `memory`: what
loading and running ResNet-18 adds to the resident memory. But for the memory all in one process,
in turn; medians. `taskset -c 1` pins it to one core.

GMAC/s counts the multiply-adds of the plain formula; Winograd's does fewer. A network's error
is the root of the mean squared difference to float32's logits, over their standard deviation: that
of random weights that nobody fine-tuned, not what low bits cost a trained network.

The peers compute in 8 bits: they have no kernels for fewer. On processors with AMX those built on
oneDNN (OpenVINO, PyTorch) use it; `--onednn-isa AVX512_CORE_VNNI` predicts one without.
"""

from __future__ import annotations

import argparse
import os
import time

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
PARTS = ("networks", "layers", "gemm", "memory")


def arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--bits", nargs="+", type=int, default=(4, 8), help="4 is W4A4")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16, 128, 512), help="of gemm")
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="not elapsed time: for one thread, on a busy machine",
    )
    parser.add_argument("--split", action="store_true", help="the networks' time, by layer")
    parser.add_argument("--isa", help="of this library: sets FDDA_FAST_ISA")
    parser.add_argument("--onednn-isa", help="of peers on oneDNN: sets ONEDNN_MAX_CPU_ISA")
    args = parser.parse_args()
    if max(args.threads) > cores:
        parser.error(f"--threads {max(args.threads)}: this process may use {cores} core(s)")
    if args.cpu_time and max(args.threads) > 1:
        parser.error("--cpu-time: adds up all threads, one is possible")
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    return args


def main() -> None:
    args = arguments()
    # Read when the libraries are loaded, hence the imports below.
    if args.isa:
        os.environ["FDDA_FAST_ISA"] = args.isa
    if args.onednn_isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = args.onednn_isa

    import inference_layers
    import inference_memory
    import inference_networks
    import torch
    from machine import describe
    from rich.console import Console
    from runtimes import installation

    console = Console()
    console.width = max(console.width, 120)  # names and figures whole, in a file, too
    console.print(*describe(), *installation(), sep="\n", highlight=False, markup=False)
    console.print(f"medians of {'CPU' if args.cpu_time else 'elapsed'} time")
    torch.manual_seed(0)
    if "networks" in args.parts:
        inference_networks.report(console, args)
    if "layers" in args.parts:
        inference_layers.report_convolutions(console, args)
    if "gemm" in args.parts:
        inference_layers.report_products(console, args)
    if "memory" in args.parts:
        inference_memory.report(console)


if __name__ == "__main__":
    main()
