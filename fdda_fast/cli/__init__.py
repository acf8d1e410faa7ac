"""The command line: one command per stage, each writing a run folder (see runs.py)."""

from . import allocation, inference, train  # noqa: F401  (they add their commands to the app)
from .app import app, main

__all__ = ["app", "main"]
