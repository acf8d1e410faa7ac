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
        config: settings of the quantisation, the method included.
        synthesis: settings of the generator, whose images are taken as they are.
        refined: whether there are refined calibration images; where there is no generator
            either, real images are all there is.
        per_class: real images of every class; None: as near to 1,024 of all as the same number
            of each comes.
        centers: share of the classes, drawn by the seed, that the generator is given centers of.
    """

    title: str
    config: fdda.QuantizeConfig = _FAST
    synthesis: fdda.SynthesisConfig | None = None
    refined: bool = False
    per_class: int | None = 1
    centers: float = 1.0

    def images_per_class(self, num_classes: int) -> int:
        return self.per_class or max(1, round(_MANY / num_classes))

    @property
    def images(self) -> tuple[fdda.SynthesisConfig | None, bool, int | None, float]:
        """Equal for methods that share their synthetic images."""
        return self.synthesis, self.refined, self.per_class, self.centers


_TUNED = _FAST.replace(method="fdda")
_RECONSTRUCTED = _FAST.replace(method="reconstruct")
_AS_GENERATED = _FAST.refine.replace(images=0)
_GENERATED = _TUNED.replace(refine=_AS_GENERATED)
_ALONE = _FAST.replace(real_batch=_FAST.real_batch + _FAST.synthetic_batch, synthetic_batch=0)
_ZERO_SHOT = _FDDA.replace(distorted_weight=0.0, centralized_weight=0.0)
METHODS = {
    "minmax": Method("min-max on the calibration images", _MINMAX),
    "mse": Method(
        "ranges of least squared error, untrained",
        _MINMAX.replace(ranges="mse", weight_ranges="mse"),
    ),
    "calibrated": Method("... and BatchNorm correction", _TUNED.replace(steps=0)),
    "real": Method("tuned on the calibration images", _ALONE.replace(method="fdda")),
    "zero-shot": Method("... and a generator without L_C, L_D", _GENERATED, _ZERO_SHOT),
    "fdda-generator": Method("... and FDDA's generator", _GENERATED, synthesis=_FDDA),
    "fdda": Method("... and refined images", _TUNED, refined=True),
    "fdda-bfloat16": Method(
        "... the same, tuned in bfloat16", _TUNED.replace(dtype="bfloat16"), refined=True
    ),
    "reconstruct": Method("reconstruction on the calibration images", _RECONSTRUCTED),
    "real+reconstruct": Method("... then tuned on them", _ALONE),
    "zero-shot+reconstruct": Method(
        "... on a generator's without L_C, L_D, too, then tuned",
        _FAST.replace(refine=_AS_GENERATED),
        _ZERO_SHOT,
    ),
    "fdda+reconstruct": Method("... on refined images, too, then tuned (`fast`)", refined=True),
    "equalized": Method(
        "... channels equalised before", _FAST.replace(equalize=True), refined=True
    ),
    "reconstruct-1024": Method(
        "reconstruction on 1,024 real images", _RECONSTRUCTED, per_class=None
    ),
}
ABLATIONS = {
    "without-centralized": Method(
        "generator without L_C", _GENERATED, _FDDA.replace(centralized_weight=0.0)
    ),
    "without-distorted": Method(
        "generator without L_D", _GENERATED, _FDDA.replace(distorted_weight=0.0)
    ),
    "centers-70": Method(
        "generator, centers for 70 % of the classes", _GENERATED, _FDDA, centers=0.7
    ),
    **{
        f"{name}-{weight}": Method(
            f"generator, weight of {symbol} {weight}",
            _GENERATED,
            _FDDA.replace(**{f"{name}_weight": weight}),
        )
        for name, symbol, weights in (
            ("distorted", "L_D", (0.25, 4.0)),
            ("centralized", "L_C", (0.01, 1.0)),
        )
        for weight in weights
    },
    **{
        f"fdda-{count}": Method(
            f"refined images, {count} per class", _TUNED, refined=True, per_class=count
        )
        for count in (4, 16)
    },
}
EVERY = METHODS | ABLATIONS
