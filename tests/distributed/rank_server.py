"""Forks ranks that talk over gloo: python rank_server.py FOLDER SIZE:SCENARIO...

Rank r of SIZE writes FOLDER/SCENARIO-SIZE-r.safetensors: tensors that the scenario returns, and its
losses as "losses" [steps, names]. One process imports everything; the ranks share that.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from forks import run_ranks
from scenarios import SCENARIOS, digit_centers

from fdda_fast.checkpoint import save_tensors

SECONDS = 240  # of a rank that waits for one that is gone


def work(folder, scenario, size, rank):
    store = dist.FileStore(str(folder / f".{scenario}-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    tensors = SCENARIOS[scenario](folder)
    save_tensors(folder / f"{scenario}-{size}-{rank}.safetensors", tensors, {})
    dist.destroy_process_group()


def main():
    torch.set_num_threads(1)
    digit_centers()  # the ranks have it, too
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        size, scenario = argument.split(":")
        run_ranks(argument, int(size), partial(work, folder, scenario, int(size)), SECONDS)


if __name__ == "__main__":
    main()
