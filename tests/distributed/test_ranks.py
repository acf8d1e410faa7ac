"""N ranks that share a batch do what one process does with the whole: real processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdda_fast.checkpoint import load_tensors

SERVER = Path(__file__).with_name("rank_server.py")
SIZES = (1, 2, 4)
# A convolution's bias has no gradient but rounding where a norm follows, and Adam takes a whole
# step by it; the norm's mean moves along.
MOVED_BY_ROUNDING = (
    "conv1.bias",
    "conv2.bias",
    "norm1.norm.running_mean",
    "norm2.norm.running_mean",
)


def start(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SERVER), str(folder), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By scenario: what one process got, and what 2 and 4 ranks did."""
    folder, names = tmp_path_factory.mktemp("ranks"), [*TOLERANCES, "collectives"]
    start(folder, *(f"{size}:{name}" for name in names for size in SIZES))
    return {name: {size: read(folder, name, size) for size in SIZES} for name in names}


def distance(name, found, expected):
    """In the unit that the scenario's tolerance has."""
    difference = found.double() - expected.double()
    order = 2 if name in TRAINED else torch.inf
    scale = torch.linalg.vector_norm(expected.double(), order).clamp(min=1e-7)
    return (torch.linalg.vector_norm(difference, order) / scale).item()


def read(folder, name, size):
    """What each of the ranks has written."""
    files = (folder / f"{name}-{size}-{rank}.safetensors" for rank in range(size))
    return [load_tensors(file)[0] for file in files]


# Of losses in units of themselves, of tensors in units of their largest value. bfloat16 rounds to 3
# digits, before and after the statistics are taken.
TOLERANCES = {
    "gradients": (1e-5, 1e-4),
    "two_pass_gradients": (1e-5, 1e-4),
    "bfloat16_gradients": (5e-3, 0.3),
    "generator": (1e-3, 3e-2),
    "two_pass": (1e-3, 3e-2),
    "along": (1e-3, 1e-4),
    "paper": (1e-5, 1e-5),
    "frozen": (1e-3, 1e-4),
    "stages": (1e-4, 1e-5),
    "refined": (1e-4, 1e-4),
    "reconstruct": (1e-5, 1e-4),
    "stream": (0.0, 1e-6),
    "parts": (0.0, 0.0),
}
# Of a trained generator and of refined images, rounding is what Adam makes of it where a gradient
# is small: few values differ much, so that the differences' root mean square is looked at, not the
# largest. What the gradients are is compared by itself.
TRAINED = ("generator", "two_pass", "refined")
# A norm follows the last convolution's tanh: what its bias gets from the pixels nearly cancels.
CANCELS = {"bfloat16_gradients": ("conv3.bias",)}


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("name", TOLERANCES)
def test_ranks_agree_with_one_process(results, name, size):
    loss_tolerance, tolerance = TOLERANCES[name]
    (expected,) = results[name][1]
    first, *others = results[name][size]
    for other in others:  # the first rank alone is told of losses
        assert all(torch.equal(first[k], other[k]) for k in first.keys() - {"losses"})
    for key in expected.keys() - {"losses", *MOVED_BY_ROUNDING, *CANCELS.get(name, ())}:
        assert distance(name, first[key], expected[key]) <= tolerance, key
    if "losses" in expected:
        torch.testing.assert_close(
            first["losses"], expected["losses"], rtol=loss_tolerance, atol=1e-6
        )


def test_interrupted_on_two_ranks_and_resumed_on_four(results, tmp_path):
    start(tmp_path, "2:interrupted", "2:other_checkpoint", "4:resumed")
    assert all(rank["stopped"] for rank in read(tmp_path, "interrupted", 2))
    for rank in read(tmp_path, "other_checkpoint", 2):
        message = bytes(rank["message"].tolist()).decode()
        assert "must be one file that all processes see, but they found [3, 0] steps" in message
    assert load_tensors(tmp_path / "shared.safetensors")[1]["steps_done"] == "5"
    first, *others = read(tmp_path, "resumed", 4)
    assert first["steps"].tolist() == [4, 5]
    assert all(other["steps"].tolist() == [] for other in others)
    (expected,) = results["generator"][1]
    for key in expected.keys() - {"losses", *MOVED_BY_ROUNDING}:
        assert distance("generator", first[key], expected[key]) <= TOLERANCES["generator"][1], key


@pytest.mark.parametrize("size", SIZES)
def test_collectives(results, size):
    total = size * (size + 1) / 2
    for rank, found in enumerate(results["collectives"][size]):
        assert all(bool((found[f"sum{i}"] == total).all()) for i in range(5))
        assert found["rows"].tolist() == torch.arange(14).view(7, 2).tolist()
        assert found["few_rows"].tolist() == [[0, 1], [2, 3]]
        tasks = max(1, size // 2)
        members = list(range(rank % tasks, size, tasks))
        assert found["team"].tolist() == [members.index(rank), len(members), rank % tasks]
        assert found["team_sum"] == sum(m + 1 for m in members)
        few = min(size, 2)  # of whom the sum is 1 or 1 + 2
        expected = [few, few * (few + 1) / 2] if rank < few else [0, rank + 1]
        assert found["some"].tolist() == expected
        assert found["tasks"].tolist() == list(range(rank, 7, size))
        assert found["any"].tolist() == [size > 1, False]


def test_started_again_on_one_store():
    """By other numbers of ranks, on machines that differ in what they count as restarts."""
    server = str(Path(__file__).with_name("elastic_server.py"))
    starts = [[0, 0], [0, 0], [0, 0, 0], [1, 0], [0], [0, 0, 1, 2]]
    command = [sys.executable, server, *(",".join(map(str, counts)) for counts in starts)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = iter(result.stdout.splitlines())
    for counts in starts:
        size = len(counts)
        told = sorted(next(lines) for _ in counts)
        assert told == [f"{rank} {size} {size * (size + 1) // 2}" for rank in range(size)]
