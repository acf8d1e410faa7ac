"""Killed, interrupted, out of space, truncated: the same bytes in the end."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import GREY, config, tiny_generator

from fdda_fast import claims as claims_module
from fdda_fast.claims import Claims
from fdda_fast.shards import synthesis, synthesize_shards
from fdda_fast.shards.dataset import read_shard
from fdda_fast.shards.plan import write_json
from fdda_fast.shards.writer import ShardWriter

RANKS, KILLS, LAST_POINT = 2, 5, 60


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".claims"}


def finished(folder):
    """Without the temporary files, which end while another rank is at work."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def run(folder, shards=20):
    return synthesize_shards(tiny_generator(), folder, config(shards), preprocessing=GREY)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return contents(folder)


class Workers:
    def __init__(self, process):
        self.process = process

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder, point=0):
        return self._ask(f"start {point} {folder}")

    def wait(self, pid):
        return self._ask(f"wait {pid}")


@pytest.fixture(scope="module")
def pool():
    server = str(Path(__file__).with_name("fork_server.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, server],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield Workers(process)
        process.stdin.close()


def test_sigkill_at_random_points(pool, tmp_path, undisturbed):
    """Two ranks and five that are to be killed, ten times."""
    killed = 0
    for seed in range(10):
        target = tmp_path / str(seed)
        draw = random.Random(seed)
        points = [draw.randint(1, LAST_POINT) for _ in range(KILLS)]
        running = [pool.start(target, points.pop()) for _ in range(RANKS)]
        while running:
            status = pool.wait(running.pop(0))
            if status == 0:
                continue
            assert status == -signal.SIGKILL
            killed += 1
            # Whole files only, and all of them as they should be.
            assert finished(target).items() <= undisturbed.items()
            running.append(pool.start(target, points.pop() if points else 0))
        assert contents(target) == undisturbed
        keys = [k for p in sorted(target.glob("*.tar")) for k, _ in read_shard(p)]
        assert keys == [f"{i:010d}" for i in range(20 * 64 - 10)]
    assert killed >= 30  # of 50: the set is finished before the others get that far


def test_sigterm_ends_at_once_and_cleanly(pool, tmp_path, undisturbed):
    target = tmp_path / "set"
    pid = pool.start(target)
    while not list(target.glob("*.tar")):
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    assert pool.wait(pid) in (130, 0)  # 0: it was done already
    found = contents(target)
    assert not [name for name in found if name.startswith(".")]
    assert found.items() <= undisturbed.items()
    assert pool.wait(pool.start(target)) == 0
    assert contents(target) == undisturbed


def test_a_claim_ends_with_its_process(tmp_path):
    code = """
import runpy, sys, time
claims = runpy.run_path(sys.argv[1])["Claims"](sys.argv[2])
print(claims.take(7), claims.take(8), flush=True)
claims.drop(8)
print(flush=True)
time.sleep(60)
"""
    path = tmp_path / ".claims"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, claims_module.__file__, str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder, Claims(path) as claims:
        assert holder.stdout.readline() == "True True\n"
        holder.stdout.readline()
        assert not claims.take(7)
        assert claims.take(8)
        holder.kill()
        holder.wait()
        with claims.held(7):
            pass
        assert claims.take(7)


def full_disk(monkeypatch, after):
    """The disk has room for so many writes."""
    written = 0
    write = ShardWriter._write

    def limited(self, data):
        nonlocal written
        written += 1
        if written > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(ShardWriter, "_write", limited)


@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_full_disk(tmp_path, undisturbed, monkeypatch, after):
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    found = contents(tmp_path)
    assert not [name for name in found if name.startswith(".")]
    assert found.items() <= undisturbed.items()
    assert len(list(tmp_path.glob("*.tar"))) == after // 2  # a block and the end each
    run(tmp_path)
    assert contents(tmp_path) == undisturbed


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-000003.tar", truncate),
        ("shard-000003.tar", Path.unlink),
        ("shard-000019.json", truncate),
        ("shard-000000.json", Path.unlink),
        ("index.json", Path.unlink),
        ("index.json", truncate),
    ],
)
def test_a_lost_file_is_made_again(tmp_path, undisturbed, name, damage):
    run(tmp_path)
    damage(tmp_path / name)
    (tmp_path / f".{name}.123.tmp").write_text("left by a killed process")
    run(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_the_index_may_go_while_it_is_returned(tmp_path, undisturbed, monkeypatch):
    """Another process has found a shard missing, and begins to make it again."""

    def written_and_gone(path, values):
        write_json(path, values)
        if path.name == "index.json":
            path.unlink()

    monkeypatch.setattr(synthesis, "write_json", written_and_gone)
    assert run(tmp_path) == json.loads(undisturbed["index.json"])


def test_what_is_there_is_not_made_again(tmp_path):
    run(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    run(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == times


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, shards=2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"started with other settings: \['config.num_images'\]"):
        run(tmp_path, shards=3)
    assert contents(tmp_path) == before
