"""Data sets, the calibration draw and image augmentation."""

from .augment import blended, random_resized_crop, random_shift, warped
from .calibration import Calibration, draw, every, from_record
from .preprocessing import Preprocessing
from .sources import ImageSource, open_source

__all__ = [
    "Calibration",
    "ImageSource",
    "Preprocessing",
    "blended",
    "draw",
    "every",
    "from_record",
    "open_source",
    "random_resized_crop",
    "random_shift",
    "warped",
]
