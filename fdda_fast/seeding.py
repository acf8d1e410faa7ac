"""Stateless random streams: what is drawn depends on the seed and a path of integers only.

Nothing carries generator state from step to step, so a resumed run draws what an undisturbed one
would have drawn, and a sample does not depend on the ones before it.
"""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, *path: int) -> torch.Generator:
    """A CPU generator for `path` (say: purpose, step) under `seed`; all must be >= 0."""
    state = np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
