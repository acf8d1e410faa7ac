"""The loop under every training stage: progress, interruption, checkpoints, resuming."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from .checkpoint import load_tensors, save_tensors
from .distributed import ALONE, Ranks
from .memory import resident_memory

Metrics = Mapping[str, float]
Progress = Callable[[int, int, Metrics], None]
_FORMAT = "fdda-fast checkpoint 1"
_CHECKPOINT_SECONDS = 60.0


class Stateful(Protocol):
    """Something that a checkpoint holds. Draws are stateless (see seeding.py), so tensors do."""

    def state_tensors(self) -> dict[str, torch.Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None: ...


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state, flattened to `index.name`."""
    return {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{prefix}."
    return {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C (and SIGTERM) set a flag, so that a step is never left half done; twice is at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(signum: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run_steps(
    step: Callable[[int], Metrics],
    total: int,
    state: Stateful,
    *,
    fingerprint: str,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    ended: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Calls step(i) for i in 0..total-1.

    Args:
        step: does step i and returns figures to show.
        state: what step changes.
        fingerprint: names the settings; a checkpoint made under others is refused.
        checkpoint: file written every minute, on interruption and when all is done. Whoever has
            the result safe removes it; until then, resuming gives the same result at once.
        resume: go on from `checkpoint` where it exists.
        progress: told (steps done, total, metrics) after every step.
        ended: whether no more steps are needed, asked after each; the same on all ranks.
        ranks: do the steps together. All read the checkpoint, whatever number of ranks made it;
            the first one writes it and tells of progress.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came, to any rank; the checkpoint holds all steps done.
        ValueError: the checkpoint is damaged or was made under other settings, or the ranks see
            different ones.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    start = _load(checkpoint, state, fingerprint) if resume and checkpoint is not None else 0
    starts = ranks.gather(torch.tensor(start)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(
            f"{checkpoint}: must be one file that all processes see, but they found {starts} steps"
        )
    if not ranks.first:
        checkpoint = progress = None
    saved = time.monotonic()
    with deferred_interrupt() as interrupted, ExitStack() as memory:
        for index in range(start, total):
            metrics = step(index)
            if index == start:
                memory.enter_context(resident_memory())
            if progress is not None:
                progress(index + 1, total, metrics)
            if ended():
                break
            stopping = ranks.any(interrupted.is_set()) and index + 1 < total
            if checkpoint is not None and (
                stopping or time.monotonic() - saved > _CHECKPOINT_SECONDS
            ):
                _save(checkpoint, state, fingerprint, index + 1)
                saved = time.monotonic()
            if stopping:
                ranks.wait()  # whoever leaves first may have the others ended while they save
                raise KeyboardInterrupt
        if checkpoint is not None and start < total:
            _save(checkpoint, state, fingerprint, total)  # none is left, also after an early end


def _save(path: Path, state: Stateful, fingerprint: str, done: int) -> None:
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "steps_done": str(done)}
    save_tensors(path, state.state_tensors(), metadata)


def _load(path: Path, state: Stateful, fingerprint: str) -> int:
    if not path.is_file():
        return 0
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a training checkpoint ({_FORMAT!r})")
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path}: made under other settings, model or data; start anew without resuming"
        )
    try:
        state.load_state_tensors(tensors)
        return int(metadata["steps_done"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged training checkpoint ({error})") from error
