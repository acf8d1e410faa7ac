"""Large synthetic data sets: WebDataset tar files, written by many processes, killed and resumed."""

from .dataset import ShardDataset
from .plan import ShardConfig
from .synthesis import synthesize_shards
from .verification import verify_shards

__all__ = ["ShardConfig", "ShardDataset", "synthesize_shards", "verify_shards"]
