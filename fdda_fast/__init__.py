"""Low-bit post-training quantisation of CNNs from a few real images, on fast kernels."""

from . import ops
from .config import QuantizeConfig, ReconstructConfig, RefineConfig, SynthesisConfig
from .deploy import PackedModel, load_packed, pack
from .generator import Generator, sample
from .quantization.bits import Bits
from .quantization.quantize import quantize
from .refinement import refine
from .shards import ShardConfig, ShardDataset, synthesize_shards, verify_shards
from .statistics import BNSCenters, collect_centers, stream_centers
from .synthesis import train_generator
from .writing import synthesize

__all__ = [
    "BNSCenters",
    "Bits",
    "Generator",
    "PackedModel",
    "QuantizeConfig",
    "ReconstructConfig",
    "RefineConfig",
    "ShardConfig",
    "ShardDataset",
    "SynthesisConfig",
    "collect_centers",
    "load_packed",
    "ops",
    "pack",
    "quantize",
    "refine",
    "sample",
    "stream_centers",
    "synthesize",
    "synthesize_shards",
    "train_generator",
    "verify_shards",
]
