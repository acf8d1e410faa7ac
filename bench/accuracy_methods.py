"""The rows of `bench/accuracy.py`: which images each method learns from, and how."""

from __future__ import annotations

from dataclasses import dataclass

import fdda_fast as fdda

_FAST, _FDDA = fdda.QuantizeConfig(), fdda.SynthesisConfig()
_MINMAX = _FAST.plain_minmax()
_MANY = 1024  # real images


@dataclass(frozen=True)
class Method:
    """How a student is made; seeds are set, and mirroring where the data allow it, by the run.

    Args:
        title: what the table calls it.
        config: settings of the quantisation.
        synthesis: settings of the generator; None: real images alone.
        kind: `method` of `fdda.quantize`.
        per_class: real images of every class; None: as near to 1,024 of all as the same number
            of each comes.
        centers: share of the classes, drawn by the seed, that the generator is given centers of.
    """

    title: str
    config: fdda.QuantizeConfig = _FAST
    synthesis: fdda.SynthesisConfig | None = None
    kind: str = "fdda"
    per_class: int | None = 1
    centers: float = 1.0

    def images_per_class(self, num_classes: int) -> int:
        return self.per_class or max(1, round(_MANY / num_classes))

    @property
    def generator(self) -> tuple[fdda.SynthesisConfig | None, int | None, float]:
        """Equal for methods that share a generator."""
        return self.synthesis, self.per_class, self.centers


_BFLOAT16 = {"dtype": "bfloat16"}
_BOTH_BATCHES = _FAST.real_batch + _FAST.synthetic_batch
METHODS = {
    "minmax": Method("min-max on the calibration images", _MINMAX),
    "mse": Method(
        "ranges of least squared error, untrained",
        _MINMAX.replace(ranges="mse", weight_ranges="mse"),
    ),
    "calibrated": Method("... and BatchNorm correction", _FAST.replace(steps=0)),
    "real": Method(
        "tuned on the calibration images",
        _FAST.replace(real_batch=_BOTH_BATCHES, synthetic_batch=0),
    ),
    "zero-shot": Method(
        "... and a generator without L_C, L_D",
        synthesis=_FDDA.replace(distorted_weight=0.0, centralized_weight=0.0),
    ),
    "fdda": Method("FDDA", synthesis=_FDDA),
    "fdda-bfloat16": Method(
        "FDDA, computed in bfloat16",
        _FAST.replace(**_BFLOAT16),
        synthesis=_FDDA.replace(**_BFLOAT16),
    ),
    "reconstruct": Method("reconstruction on the calibration images", kind="reconstruct"),
    "fdda+reconstruct": Method(
        "reconstruction on FDDA's, too, then FDDA", synthesis=_FDDA, kind="fdda+reconstruct"
    ),
    "reconstruct-1024": Method(
        "reconstruction on 1,024 real images", kind="reconstruct", per_class=None
    ),
}
ABLATIONS = {
    "without-centralized": Method(
        "FDDA without L_C", synthesis=_FDDA.replace(centralized_weight=0.0)
    ),
    "without-distorted": Method("FDDA without L_D", synthesis=_FDDA.replace(distorted_weight=0.0)),
    "centers-70": Method("FDDA, centers for 70 % of the classes", synthesis=_FDDA, centers=0.7),
    **{
        f"fdda-{count}": Method(f"FDDA, {count} images per class", synthesis=_FDDA, per_class=count)
        for count in (4, 16)
    },
    **{
        f"{name}-{weight}": Method(
            f"FDDA, weight of {symbol} {weight}",
            synthesis=_FDDA.replace(**{f"{name}_weight": weight}),
        )
        for name, symbol, weights in (
            ("distorted", "L_D", (0.25, 4.0)),
            ("centralized", "L_C", (0.01, 1.0)),
        )
        for weight in weights
    },
}
EVERY = METHODS | ABLATIONS
