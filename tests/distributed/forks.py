"""Ranks that share what one process has imported."""

import os
import signal
import sys
import traceback


def run_ranks(name, size, work, seconds):
    """Runs work(rank) in `size` forks, each for `seconds` at most; one that fails ends all."""
    running = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            signal.alarm(seconds)
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        running.append(pid)
    failed = [os.waitpid(pid, 0)[1] for pid in running]
    if any(failed):
        sys.exit(f"{name}: {failed}")
