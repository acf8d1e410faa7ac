"""Large synthetic data sets in WebDataset tar files, written by any number of processes."""

from .dataset import ShardDataset
from .plan import ShardConfig
from .synthesis import synthesize_shards
from .verification import verify_shards

__all__ = ["ShardConfig", "ShardDataset", "synthesize_shards", "verify_shards"]
