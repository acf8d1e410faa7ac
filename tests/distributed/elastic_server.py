"""Forks ranks as torchrun does, several times on one store: python elastic_server.py COUNT,... ...

Each argument is one start: a rank per comma-separated number, which is what its machine counts as
restarts. Every rank prints its number, how many there are, and the sum of (their numbers + 1).

The store has a process of its own, which never forks: its thread looks up names, and a rank forked
while it does so would find the resolver's lock taken for ever.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from forks import run_ranks

from fdda_fast.distributed import process_group

SECONDS = 30


def work(rank, size, count, port):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": count,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    if rank == 0:
        time.sleep(0.3)  # the others find what was there before
    with process_group() as ranks:
        total = torch.tensor([float(rank + 1)])
        ranks.sum_([total])
        os.write(1, f"{ranks.rank} {ranks.size} {int(total)}\n".encode())


def start_store():
    """The store's process and port."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writer)  # so that a store that fails is an end of file here
    return pid, int(os.read(reader, 16))


def main():
    torch.set_num_threads(1)
    store, port = start_store()
    try:
        for start in sys.argv[1:]:
            counts = start.split(",")
            run_ranks(
                start,
                len(counts),
                lambda rank, counts=counts: work(rank, len(counts), counts[rank], port),
                SECONDS,
            )
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)


if __name__ == "__main__":
    main()
