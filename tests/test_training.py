"""The training loop: progress, interruption, checkpoints, resuming."""

import os
import signal
import threading

import pytest
import torch

from fdda_fast import training
from fdda_fast.checkpoint import load_tensors, save_tensors
from fdda_fast.training import (
    below,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    run_steps,
)


class Counter:
    """State that depends on the order and number of the steps done."""

    def __init__(self):
        self.value = torch.zeros(1, dtype=torch.int64)
        self.steps = []

    def step(self, index):
        self.steps.append(index)
        self.value = 31 * self.value + index + 1
        return {"value": float(self.value)}

    def state_tensors(self):
        return {"value": self.value}

    def load_state_tensors(self, tensors):
        self.value = tensors["value"].clone()


def run(counter, total, **options):
    run_steps(counter.step, total, counter, **{"fingerprint": "settings", **options})
    return int(counter.value)


def interrupt_at(*indices, signum=signal.SIGINT):
    def progress(done, total, metrics):
        if done in indices:
            os.kill(os.getpid(), signum)

    return progress


def test_steps_and_progress_in_order():
    counter, told = Counter(), []
    run(counter, 4, progress=lambda *arguments: told.append(arguments))
    assert counter.steps == [0, 1, 2, 3]
    assert [t[:2] for t in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [t[2]["value"] for t in told] == [1, 33, 1026, 31810]


def test_no_steps(tmp_path):
    assert run(Counter(), 0, checkpoint=tmp_path / "c") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume(tmp_path, stop, signum):
    path = tmp_path / "new" / "checkpoint"
    first = Counter()
    with pytest.raises(KeyboardInterrupt):
        run(first, 6, checkpoint=path, progress=interrupt_at(stop, signum=signum))
    assert first.steps == list(range(stop))
    assert load_tensors(path)[1]["steps_done"] == str(stop)
    second = Counter()
    assert run(second, 6, checkpoint=path, resume=True) == run(Counter(), 6)
    assert second.steps == list(range(stop, 6))


@pytest.mark.parametrize("total", [6, 9])
def test_a_finished_run_goes_straight_to_its_end(tmp_path, total):
    """Whatever comes after the steps may fail and be tried again; also after an early end."""
    path = tmp_path / "checkpoint"
    first, again = Counter(), Counter()
    value = run(first, total, checkpoint=path, ended=lambda: len(first.steps) == 6)
    assert first.steps == list(range(6))
    assert run(again, total, checkpoint=path, resume=True) == value
    assert again.steps == []
    assert load_tensors(path)[1]["steps_done"] == str(total)


def test_interrupted_twice(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        run(Counter(), 6, checkpoint=path, progress=interrupt_at(2))
    with pytest.raises(KeyboardInterrupt):
        run(Counter(), 6, checkpoint=path, resume=True, progress=interrupt_at(4))
    assert run(Counter(), 6, checkpoint=path, resume=True) == run(Counter(), 6)


def test_without_resume_the_checkpoint_is_ignored(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        run(Counter(), 6, checkpoint=path, progress=interrupt_at(2))
    counter = Counter()
    run(counter, 6, checkpoint=path)
    assert counter.steps == list(range(6))


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    counter = Counter()
    run(counter, 3, checkpoint=tmp_path / "absent", resume=True)
    assert counter.steps == [0, 1, 2]


def test_interruption_without_a_checkpoint():
    counter = Counter()
    with pytest.raises(KeyboardInterrupt):
        run(counter, 6, progress=interrupt_at(2))
    assert counter.steps == [0, 1]


def test_a_step_is_finished_before_stopping(tmp_path):
    counter, path = Counter(), tmp_path / "checkpoint"
    half = []

    def step(index):
        os.kill(os.getpid(), signal.SIGINT)
        half.append(index)  # reached: the signal is kept for later
        return counter.step(index)

    with pytest.raises(KeyboardInterrupt):
        run_steps(step, 6, counter, fingerprint="settings", checkpoint=path)
    assert half == [0]
    assert load_tensors(path)[0]["value"].item() == 1


def test_a_second_signal_stops_at_once(tmp_path):
    counter, reached = Counter(), []

    def step(index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.getsignal(signal.SIGINT)
        reached.append(index)
        return counter.step(index)

    with pytest.raises(KeyboardInterrupt):
        run_steps(step, 6, counter, fingerprint="settings", checkpoint=tmp_path / "c")
    assert not reached
    assert not (tmp_path / "c").exists()


def test_a_signal_during_the_last_step_loses_nothing(tmp_path):
    counter = Counter()
    run(counter, 3, checkpoint=tmp_path / "c", progress=interrupt_at(3))
    assert counter.steps == [0, 1, 2]
    assert load_tensors(tmp_path / "c")[1]["steps_done"] == "3"


def test_handlers_are_restored(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run(Counter(), 2)
    with pytest.raises(KeyboardInterrupt):
        run(Counter(), 3, progress=interrupt_at(1))
    counter = Counter()
    counter.step = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(counter, 3)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread():
    counter = Counter()
    thread = threading.Thread(target=run, args=(counter, 3))
    thread.start()
    thread.join()
    assert counter.steps == [0, 1, 2]


def test_a_checkpoint_is_written_now_and_then(tmp_path, monkeypatch):
    path, seen = tmp_path / "checkpoint", []
    clock = iter(range(0, 10_000, 25))  # seconds; one reading per step and one per save
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))

    def progress(done, total, metrics):
        seen.append(load_tensors(path)[1]["steps_done"] if path.is_file() else None)

    run(Counter(), 8, checkpoint=path, progress=progress)
    assert seen == [None, None, None, "3", "3", "3", "6", "6"]
    assert load_tensors(path)[1]["steps_done"] == "8"


@pytest.fixture
def unfinished(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        run(Counter(), 6, checkpoint=path, progress=interrupt_at(2))
    return path


def refused(path, message, **options):
    counter = Counter()
    with pytest.raises(ValueError, match=message):
        run(counter, 6, checkpoint=path, resume=True, **options)
    assert not counter.steps
    assert path.is_file()


def test_other_settings_are_refused(unfinished):
    refused(unfinished, "other settings, model or data", fingerprint="others")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_damaged_checkpoints_are_refused(unfinished, keep):
    unfinished.write_bytes(unfinished.read_bytes()[:keep])
    refused(unfinished, "not a valid safetensors file")


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {}, "damaged training checkpoint"),
        ({"value": torch.ones(1)}, {"steps_done": "many"}, "damaged training checkpoint"),
        ({"value": torch.ones(1)}, {"format": "another"}, "not a training checkpoint"),
    ],
)
def test_checkpoints_with_other_contents_are_refused(unfinished, tensors, changes, message):
    metadata = load_tensors(unfinished)[1]
    save_tensors(unfinished, tensors, {**metadata, **changes})
    refused(unfinished, message)


def test_checkpoint_without_a_step_count(unfinished):
    tensors, metadata = load_tensors(unfinished)
    del metadata["steps_done"]
    save_tensors(unfinished, tensors, metadata)
    refused(unfinished, "damaged training checkpoint")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, 0.01),
        lambda p: torch.optim.SGD(p, 0.01, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.01),
    ],
)
def test_optimizer_state_round_trip(make):
    def build():
        torch.manual_seed(0)
        parameters = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
        return parameters, make(parameters)

    def steps(parameters, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            sum((p**3).sum() for p in parameters).backward()
            optimizer.step()

    straight, optimizer = build()
    steps(straight, optimizer, 2)
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    resumed, twin = build()
    for target, source in zip(resumed, straight, strict=True):
        target.data.copy_(source.data)
    load_optimizer_tensors(twin, tensors)
    steps(straight, optimizer, 2)
    steps(resumed, twin, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_prefixes():
    tensors = {"a.b": torch.zeros(1), "c": torch.ones(1)}
    joined = {**prefixed("one", tensors), **prefixed("one_two", tensors)}
    assert set(joined) == {"one.a.b", "one.c", "one_two.a.b", "one_two.c"}
    assert below("one", joined) == tensors
