"""Forks ranks that talk over gloo: python rank_server.py FOLDER SIZE:SCENARIO...

Rank r of SIZE writes FOLDER/SCENARIO-SIZE-r.safetensors: tensors that the scenario returns, and its
losses as "losses" [steps, names]. One process imports everything; the ranks share that.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from scenarios import SCENARIOS, digit_centers

from fdda_fast.checkpoint import save_tensors

SECONDS = 240  # of a rank that waits for one that is gone


def work(folder, scenario, rank, size):
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
        running = []
        for rank in range(int(size)):
            pid = os.fork()
            if pid == 0:
                signal.alarm(SECONDS)
                try:
                    work(folder, scenario, rank, int(size))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            running.append(pid)
        failed = [os.waitpid(pid, 0)[1] for pid in running]
        if any(failed):
            sys.exit(f"{argument}: {failed}")


if __name__ == "__main__":
    main()
