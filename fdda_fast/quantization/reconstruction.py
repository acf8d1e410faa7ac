"""Block-wise reconstruction: weight rounding and activation ranges, learned unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..config import QuantizeConfig, ReconstructConfig
from ..distributed import ALONE, Ranks
from ..graphs import note_shapes
from ..layers import LAYERS, convolved, use_layers
from ..seeding import stream
from ..tracing import trace
from ..training import Metrics, below, load_optimizer_tensors, optimizer_tensors, prefixed
from .modules import ActivationQuantizer, QuantConv2d, QuantLinear, take_ranges
from .rounding import LearnedRounding
from .units import Unit, find_units, part_of

_STREAM = 40
_BATCH = 64  # images per forward where nothing is learned
_RANGE_IMAGES = 256


class _RoundedLayer(nn.Module):
    """A layer whose weights are rounded softly."""

    def __init__(self, layer: QuantConv2d | QuantLinear, rounding: LearnedRounding) -> None:
        super().__init__()
        self.layer, self.rounding = layer, rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounding()
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return convolved(self.layer, x, weight)


class _Dropping:
    """What the quantisers of a unit share during a step: the rows of the batch, and the draws."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.rng: torch.Generator | None = None
        self.batch, self.rows = 0, slice(0, 0)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """True for `share` of the elements of x, which are the rows `rows` of the batch."""
        shape = (self.batch, *x.shape[1:])
        if x.dim() == 4:  # drawn in channels_last order, in which they are read
            shape = (self.batch, *x.shape[2:], x.shape[1])
        count = math.prod(shape)
        # Eight draws at once.
        words = torch.empty(-(-count // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self.rng)
        mask = (words.view(torch.uint8)[:count] < round(256 * self.share)).view(shape)[self.rows]
        return (mask.permute(0, 3, 1, 2) if x.dim() == 4 else mask).to(x.device)


class _DroppedQuantizer(nn.Module):
    """A quantiser that leaves elements drawn at random as they are.

    QDrop, Wei et al., ICLR 2022, equation 9; there per element, too.
    """

    def __init__(self, quantizer: ActivationQuantizer, dropping: _Dropping) -> None:
        super().__init__()
        self.quantizer, self.dropping = quantizer, dropping

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.quantizer(x)
        if self.dropping.rng is None or self.dropping.share == 0:
            return y
        return torch.where(self.dropping.mask(x), x, y)


class _Inputs(NamedTuple):
    """What a unit reads and should make, float32 [N, ...] each.

    student: its input in the quantised network, exact: in the FP32 one; target: its FP32 output.
    """

    student: torch.Tensor
    exact: torch.Tensor
    target: torch.Tensor


def _annealed(ends: tuple[float, float], progress: float) -> float:
    """From the first to the second along half a cosine."""
    first, last = ends
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


class _Learner:
    """One unit of the student while it is learned.

    Args:
        known: modules that earlier units have, since one may be used twice; they stay as they are.
    """

    def __init__(
        self, student: fx.GraphModule, unit: Unit, config: ReconstructConfig, known: set[nn.Module]
    ) -> None:
        self.config = config
        self.network = part_of(student, unit.entry, unit.exit)
        self.dropping = _Dropping(config.drop)
        self.layers = [student.get_submodule(name) for name in unit.layers]
        self.roundings = nn.ModuleList(LearnedRounding(layer) for layer in self.layers)
        self.quantizers: list[ActivationQuantizer] = []
        affine: list[nn.Parameter | None] = []
        for name, module in list(self.network.named_modules()):
            if module in known:
                continue
            if isinstance(module, ActivationQuantizer):
                self.quantizers.append(module)
                self.network.set_submodule(name, _DroppedQuantizer(module, self.dropping))
            elif module in self.layers:
                rounding = self.roundings[self.layers.index(module)]
                self.network.set_submodule(name, _RoundedLayer(module, rounding))
                affine.append(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                affine += [module.weight, module.bias]
        for quantizer in self.quantizers:
            quantizer.log_range.requires_grad_()
        groups = [
            {"params": [r.variable for r in self.roundings], "lr": config.lr},
            {"params": [q.log_range for q in self.quantizers], "lr": config.range_lr},
            {"params": [p for p in affine if p is not None], "lr": config.affine_lr},
        ]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(
        self,
        inputs: _Inputs,
        spread: torch.Tensor,
        progress: float,
        rng: torch.Generator,
        ranks: Ranks,
    ) -> Metrics:
        """One step.

        Args:
            inputs: the whole batch; of several ranks each computes its share.
            spread: the variance that errors are measured by.
            progress: share of the unit's steps that are done.
        """
        config, dropping = self.config, self.dropping
        dropping.rng, dropping.batch = rng, len(inputs.target)
        dropping.rows = rows = ranks.share(len(inputs.target))
        x, target = inputs.student[rows], inputs.target[rows]
        if config.drop:  # the input like the unit's own activations
            x = torch.where(dropping.mask(x), inputs.exact[rows], x)
        share = len(x) / len(inputs.target)
        error = F.mse_loss(self.network(x), target) / spread
        loss = error
        if progress >= config.warmup:
            beta = _annealed(config.betas, (progress - config.warmup) / (1 - config.warmup))
            weights = sum(r.variable.numel() for r in self.roundings)
            undecided = torch.stack([r.undecided(beta) for r in self.roundings]).sum() / weights
            loss = loss + config.rounding_weight * undecided
        _, ranges, affine = self.optimizer.param_groups
        ranges["lr"] = _annealed((config.range_lr, 0.0), progress)
        affine["lr"] = _annealed((config.affine_lr, 0.0), progress)
        self.optimizer.zero_grad()
        (share * loss).backward()
        dropping.rng = None
        figures = share * error.detach().view(1)
        ranks.sum_([*(p.grad for p in self.parameters if p.grad is not None), figures])
        self.optimizer.step()
        return {"reconstruction_loss": figures.item()}

    @torch.no_grad()
    def finish(self) -> None:
        """Rounds the weights of the student and makes its ranges final."""
        for layer, rounding in zip(self.layers, self.roundings, strict=True):
            rounding.harden(layer)
        for quantizer in self.quantizers:
            quantizer.keep_learned_range()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What is not the student's."""
        return {
            **prefixed("rounding", self.roundings.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.optimizer)),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.roundings.load_state_dict(below("rounding", tensors))
        load_optimizer_tensors(self.optimizer, below("optimizer", tensors))


class Reconstruction:
    """Learns a student's rounding and ranges, one unit after the other (BRECQ, QDrop).

    Every unit reads what the finished ones before it make, and learns to make what it does in the
    FP32 network. Its input is cached, for as many images at once as `cache_mib` allows: where that
    is not all of them, its steps see one part of the images after the other.

    Args:
        student: from `prepare`, ranges not yet known; it changes.
        model: the FP32 network; not changed.
        images: makes float32 [N, C, H, W], always the same; called when a step needs them.
        image_shape: (C, H, W).
        config: of it `reconstruct`, the seed, and how ranges are taken.
        ranks: do the steps together, each with its share of every batch.

    Raises:
        ValueError: `cache_mib` does not hold the inputs of one batch, or a batch has fewer images
            than there are ranks.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        model: nn.Module,
        images: Callable[[], torch.Tensor],
        image_shape: tuple[int, int, int],
        config: QuantizeConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.settings = config.reconstruct, config
        ranks.check_batch("ReconstructConfig.batch", self.config.batch)
        self.student, self.ranks = student.eval(), ranks
        self.exact = trace(model).requires_grad_(False)
        note_shapes(self.exact, image_shape)
        self.units = find_units(self.exact, student)
        self.parts = [self._parts(unit) for unit in self.units]
        use_layers(self.exact, LAYERS)
        self._images = images
        self._learner: _Learner | None = None
        self._number = 0
        self._held: tuple[int, int] | None = None
        self._cache: tuple[_Inputs, torch.Tensor] | None = None

    @property
    def steps(self) -> int:
        """In all."""
        return len(self.units) * self.config.steps

    def step(self, index: int) -> Metrics:
        """Step `index` of all units' steps."""
        number, step = divmod(index, self.config.steps)
        if self._learner is None:
            self._begin(number)
            # Before anything is rounded.
            read = self._cached(number, 0)[0].student[:_RANGE_IMAGES].split(_BATCH)
            take_ranges(self._learner.network, read, self.settings.ranges, self.settings.percentile)
        progress = step / self.config.steps
        inputs, spread = self._cached(number, int(progress * self.parts[number]))
        rng = stream(self.settings.seed, _STREAM, index)
        rows = torch.randint(len(inputs.target), (self.config.batch,), generator=rng)
        batch = _Inputs(*(tensor[rows] for tensor in inputs))
        metrics = self._learner.step(batch, spread, progress, rng, self.ranks)
        if not math.isfinite(metrics["reconstruction_loss"]):
            raise ValueError(
                f"reconstruction diverged at {self.units[number].exit!r}: lower the learning rates"
            )
        if step + 1 == self.config.steps:
            self._learner.finish()
            self._learner = None
        return {"unit": number, **metrics}

    def _begin(self, number: int) -> None:
        """Makes unit `number` the one that is learned, its ranges not yet taken."""
        earlier = {
            module
            for unit in self.units[:number]
            for module in part_of(self.student, unit.entry, unit.exit).modules()
        }
        self._number = number
        self._learner = _Learner(self.student, self.units[number], self.config, earlier)

    def _parts(self, unit: Unit) -> int:
        """How many times the images must be taken apart for the unit's cache to hold one part."""
        shapes = {node.name: node.meta["shape"] for node in self.exact.graph.nodes}
        floats = 2 * math.prod(shapes[unit.entry]) + math.prod(shapes[unit.exit])
        fitting = self.config.cache_mib * 2**20 // (4 * floats)
        if fitting < self.config.batch:
            raise ValueError(
                f"ReconstructConfig.cache_mib must hold a batch of {self.config.batch} images, "
                f"{4 * floats / 2**20:.1f} MiB each at {unit.exit!r}, got {self.config.cache_mib}"
            )
        return -(-self.config.images // fitting)

    def _cached(self, number: int, part: int) -> tuple[_Inputs, torch.Tensor]:
        """What a unit reads, of one part of the images, and the variance of its target."""
        if self._held != (number, part):
            self._cache = None  # its memory first
            unit, count = self.units[number], self.parts[number]
            images = self._images()
            images = images[len(images) * part // count : len(images) * (part + 1) // count]
            first = self.units[0].entry
            exact = _outputs(part_of(self.exact, first, unit.entry), images)
            target = _outputs(part_of(self.exact, unit.entry, unit.exit), exact)
            student = _outputs(part_of(self.student, first, unit.entry), images)
            but_channels = [d for d in range(target.dim()) if d != 1]
            spread = target.var(but_channels, correction=0).mean().clamp(min=1e-12)
            self._cache = _Inputs(student, exact, target), spread
            self._held = number, part
        return self._cache

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What is not the student's."""
        if self._learner is None:
            return {}
        return {"unit": torch.tensor(self._number), **self._learner.state_tensors()}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """To be called when the student has its own state."""
        if "unit" in tensors:
            self._begin(int(tensors["unit"]))
            self._learner.load_state_tensors(tensors)


@torch.no_grad()
def _outputs(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """network(x) in batches, where possible in channels_last."""
    made = None
    for start in range(0, len(x), _BATCH):
        y = network(x[start : start + _BATCH])
        if made is None:
            layout = torch.channels_last if y.dim() == 4 else torch.contiguous_format
            made = torch.empty(len(x), *y.shape[1:], memory_format=layout).to(y)
        made[start : start + len(y)] = y
    return made
