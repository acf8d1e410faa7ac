"""GPU kernels without a GPU: registers to predicted times; `fdda-fast info --gpu-report`."""

from __future__ import annotations

from argparse import ArgumentParser

from fdda_fast.cli.inference import print_gpu_report

if __name__ == "__main__":
    ArgumentParser(description=__doc__).parse_args()
    print_gpu_report()
