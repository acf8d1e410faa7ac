"""Teachers."""

from .loading import SHIPPED, load_teacher

__all__ = ["SHIPPED", "load_teacher"]
