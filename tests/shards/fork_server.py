"""Workers forked from one process that has imported everything: python fork_server.py.

Reads lines `start POINT FOLDER` (answers with a process id; the worker kills itself at the POINT-th
of the points below, 0: never) and `wait PID` (answers with the exit status, negative: a signal).
"""

import os
import signal
import sys

import torch

from fdda_fast.claims import Claims
from fdda_fast.data import Preprocessing
from fdda_fast.generator import Generator
from fdda_fast.shards import ShardConfig, synthesize_shards
from fdda_fast.shards.writer import ShardWriter

GREY = Preprocessing(8, 8, (0.4,), (0.3,))
# Where a worker can die: before and after each call of these.
POINTS = [(os, "replace"), (os, "fsync"), (os, "unlink"), (ShardWriter, "add"),
          (ShardWriter, "_write"), (Claims, "take"), (Claims, "drop")]  # fmt: skip


def tiny_generator():
    torch.manual_seed(3)
    return Generator(5, (1, 8, 8)).eval()


def config(shards=20):
    return ShardConfig(num_images=64 * shards - 10, shard_size=64, image_format="raw", seed=1)


def die_at(point):
    passed = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal passed
            for before in (True, False):
                passed += 1
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                if before:
                    result = function(*args, **kwargs)
            return result

        return call

    for owner, name in POINTS:
        setattr(owner, name, counted(getattr(owner, name)))


def work(folder, generator, point):
    die_at(point)
    try:
        synthesize_shards(generator, folder, config(), preprocessing=GREY)
    except KeyboardInterrupt:
        return 130
    return 0


def main():
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # no machine fails here, and a disk can be slow
    generator = tiny_generator()
    for line in sys.stdin:
        command, number, *folder = line.split(maxsplit=2)
        if command == "wait":
            status = os.waitstatus_to_exitcode(os.waitpid(int(number), 0)[1])
            print(status, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = work(folder[0].rstrip(), generator, int(number))
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
