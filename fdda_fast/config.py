"""Settings of every stage: frozen dataclasses with the presets `fast` (default) and `reference`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from .files import written_whole
from .quantization.bits import Bits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = ("fast", "reference")
DTYPES = ("float32", "bfloat16")
RANGES = ("mse", "minmax", "percentile", "reference")
WEIGHT_RANGES = ("auto", "minmax", "percentile", "mse")
RANGE_IMAGES = ("all", "real", "synthetic")
AUGMENTATIONS = ("shift", "crop")
METHODS = ("fdda", "reconstruct", "fdda+reconstruct")
_EPOCH = 200  # steps, in the paper's settings
_Config = TypeVar("_Config", bound="Section")


class Section:
    """What all settings share: checks that speak of the field, plain-dict conversion."""

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}.{name} must be {expected}, got {getattr(self, name)!r}"
            )

    def replace(self: _Config, **changes: Any) -> _Config:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class SynthesisConfig(Section):
    """How the generator is trained.

    Args:
        steps: generator steps when it is trained on its own.
        seed: decides every draw.
        batch_size: images of random classes per step (batch A: cross entropy and L_BNS).
        classes_per_step, images_per_class: batch B, whose classes are aligned with their centers.
        joint_pass: batches A and B go through the generator together and share its batch
            statistics; otherwise one after the other, as in the paper.
        any_class_steps: for this many steps batch B may be of any class, reliable or not.
        lr, betas, lr_milestones, lr_decay: Adam; the rate is multiplied by lr_decay at each
            milestone (a step).
        ce_weight, bns_weight: on batch A. class_ce_weight, distorted_weight (L_D),
            centralized_weight (L_C): on batch B.
        distortion_std: of the noise on the centers' means and variances in L_D.
        whiten: compare statistics in units of the teacher's running ones, so that every layer
            and channel counts alike; otherwise as they are, as in the paper.
        clamp_variance: keep the variance targets of L_D at or above zero.
        dtype: of the convolutions and what is between them; parameters, statistics and losses are
            float32.
    """

    steps: int = 1200
    seed: int = 0
    batch_size: int = 16
    classes_per_step: int = 8
    images_per_class: int = 4
    joint_pass: bool = True
    any_class_steps: int = 100
    lr: float = 1e-2
    betas: tuple[float, float] = (0.5, 0.999)
    lr_milestones: tuple[int, ...] = (900,)
    lr_decay: float = 0.1
    ce_weight: float = 0.5
    bns_weight: float = 3.0
    class_ce_weight: float = 0.5
    distorted_weight: float = 1.0
    centralized_weight: float = 0.1
    distortion_std: tuple[float, float] = (0.2, 0.2)
    whiten: bool = True
    clamp_variance: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch_size", "classes_per_step", "images_per_class"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("steps", "seed", "any_class_steps"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        self._require("lr", self.lr > 0, "> 0")
        self._require("dtype", self.dtype in DTYPES, f"one of {DTYPES}")
        for name in ("betas", "distortion_std"):
            self._require(name, len(getattr(self, name)) == 2, "two numbers")
        self._require("betas", all(0 <= b < 1 for b in self.betas), "in [0, 1)")

    @classmethod
    def reference(cls) -> SynthesisConfig:
        """The paper's settings (method and released code), to the letter."""
        return cls(
            steps=400 * _EPOCH,
            classes_per_step=1,
            images_per_class=16,
            joint_pass=False,
            any_class_steps=5 * _EPOCH,
            lr=1e-3,
            lr_milestones=(100 * _EPOCH, 200 * _EPOCH, 300 * _EPOCH),
            bns_weight=0.2,
            distorted_weight=0.9,
            centralized_weight=0.01,
            distortion_std=(0.5, 1.0),
            whiten=False,
            clamp_variance=False,
        )


@dataclass(frozen=True)
class RefineConfig(Section):
    """How synthetic images are refined, see `fdda_fast.refine`.

    Args:
        images: in all; 0: none, a generator's are taken as they are.
        group: images whose statistics are compared with the teacher's as those of one batch.
        steps: of every group. lr: of Adam, in units of the normalised images; it falls to 0.
        bns_weight: of L_BNS, in units of the teacher's running statistics. ce_weight: of the cross
            entropy.
    """

    images: int = 512
    group: int = 128
    steps: int = 200
    lr: float = 0.05
    bns_weight: float = 3.0
    ce_weight: float = 0.05

    def __post_init__(self) -> None:
        self._require("images", self.images >= 0, ">= 0")
        for name in ("group", "steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require("lr", self.lr > 0, "> 0")
        for name in ("bns_weight", "ce_weight"):
            self._require(name, getattr(self, name) >= 0, ">= 0")


@dataclass(frozen=True)
class ReconstructConfig(Section):
    """How rounding and ranges are learned, see `fdda_fast.quantization.reconstruction`.

    Args:
        steps: per unit (a residual block, or a layer outside of such).
        images: that the units learn on, made like those of fine-tuning steps.
        batch: images per step.
        lr, range_lr, affine_lr: of Adam, for the rounding, the logarithm of the activation ranges,
            and the unit's BatchNorm weights and biases. The first is constant, the others fade.
        rounding_weight: of the rounding's regulariser, beside the error in units of the target's
            variance. warmup: share of the steps without it. betas: its exponent, from the first to
            the second along a cosine.
        drop: share of the unit's input and of its quantised activations that a step draws at
            random and leaves in FP32; 0: none.
        cache_mib: MiB for what a unit reads and should make, beside the images themselves; where
            it is more, the unit's steps see one part of the images after the other.
    """

    steps: int = 400
    images: int = 1024
    batch: int = 32
    lr: float = 0.1
    range_lr: float = 5e-3
    affine_lr: float = 3e-3
    rounding_weight: float = 3.0
    warmup: float = 0.2
    betas: tuple[float, float] = (20.0, 2.0)
    drop: float = 0.5
    cache_mib: int = 2048

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "cache_mib"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require("images", self.images >= self.batch, f">= batch ({self.batch})")
        self._require("lr", self.lr > 0, "> 0")
        for name in ("range_lr", "affine_lr", "rounding_weight"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        self._require("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        self._require("drop", 0 <= self.drop < 1, "in [0, 1)")
        first, last = self.betas
        self._require("betas", first >= last > 0, "(first, last) with first >= last > 0")


@dataclass(frozen=True)
class QuantizeConfig(Section):
    """How the student is quantised and fine-tuned.

    Args:
        method: `fdda` fine-tunes the student from end to end. `reconstruct` learns its rounding and
            ranges instead, unit by unit, from the calibration images alone. `fdda+reconstruct`
            does that from synthetic images, too, and then fine-tunes from end to end; where it
            trains a generator, it does so before, in `warmup_steps`.
        steps: fine-tuning steps; `reconstruct` has none. 0 with another method: nothing is learned,
            ranges are taken from the calibration images or, with a generator, from batches like
            those of the steps.
        warmup_steps: generator steps before the first fine-tuning step, where a generator is
            trained along the way.
        seed: decides every draw of the fine-tuning.
        placement, keep_float: see `fdda_fast.quantization.prepare`.
        ranges: of the activations. `mse`: taken just before fine-tuning from `range_steps` batches
            like those of the steps, then shrunk to the least squared error; `percentile`: shrunk
            to the percentiles 100 - p and p; `minmax`: not shrunk; `reference`: the paper's, a
            moving average from zero over the first `range_steps` generator steps'
            images, however untrained the generator then is.
        range_images: of these batches, `all`, the `real` or the `synthetic` ones.
        weight_ranges: how weights are clipped beforehand, see
            `fdda_fast.quantization.clipping`; `auto` does so where `ranges` is `mse`.
        percentile: p of both ranges, 50..100.
        equalize: first move scale from activation channels into weights where BatchNorms allow it,
            see `fdda_fast.quantization.equalization`; for networks whose channels differ widely.
        correct_batch_norms: also take the shift that quantisation causes out of the student's
            BatchNorm statistics, see `fdda_fast.quantization.correction`; never with `reference`
            ranges.
        real_batch, synthetic_batch: images per fine-tuning step; either may be 0.
        augmentation: of both, best the one that the teacher was trained with. `shift`: by up to
            `max_shift` of the image's side; `crop`: random resized crops, as in the paper.
        max_shift: 0..1. real_crop, synthetic_crop: range of the crop's share of the area.
        flip: mirror half of the images.
        blend: share of the images that are blended with another of their batch, see
            `fdda_fast.data.augment.blended`.
        range_lr: the rate at which Adam learns the logarithm of the activation ranges; 0: they
            stay as taken.
        lr, momentum, weight_decay: SGD with Nesterov momentum. cosine_steps: half period of the
            cosine that the rate follows; None: `steps`.
        average_decay: the result is the exponential moving average of the steps' parameters with
            this decay, smaller in the first steps; 0: those of the last step. At 2 bits weights
            jump between two levels to the end, and their average settles.
        check_every: steps between two looks at the student's divergence from the teacher on
            synthetic images that no step sees (on the real ones, differently augmented, where there
            are no others); the result is the student of the least one, the one before the first
            step included. 0, and where a generator is trained along: no looks, the last step's.
        patience: fine-tuning ends after so many looks without a new best.
        max_grad_norm: gradients are scaled down to this norm where theirs is larger.
        temperature, distillation_weight: of the divergence from the teacher, see
            `fdda_fast.losses.distillation`. label_weight: of the cross entropy with the labels;
            blended images have none, so with `blend` it must be 0.
        dtype: of the convolutions and what is between them in fine-tuning steps; parameters,
            ranges, batch norms, losses and the refinement are float32.
        synthesis: how the generator is trained when none is given.
        refine: how the synthetic images are made, of a given generator's or, without one, of the
            calibration images. With refine.images 0 they are a generator's as they are, and one
            is trained along where none is given, as in FDDA.
        reconstruct: for the methods that reconstruct.
    """

    method: str = "fdda+reconstruct"
    steps: int = 1200
    warmup_steps: int = 1200
    seed: int = 0
    placement: str = "full_integer"
    keep_float: tuple[str, ...] = ()
    ranges: str = "mse"
    range_steps: int = 20
    range_images: str = "all"
    weight_ranges: str = "auto"
    percentile: float = 99.9
    equalize: bool = False
    correct_batch_norms: bool = True
    real_batch: int = 16
    synthetic_batch: int = 16
    augmentation: str = "shift"
    max_shift: float = 1 / 14
    real_crop: tuple[float, float] = (0.08, 1.0)
    synthetic_crop: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    blend: float = 1.0
    lr: float = 5e-5
    range_lr: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    cosine_steps: int | None = None
    average_decay: float = 0.995
    check_every: int = 100
    patience: int = 4
    max_grad_norm: float = 1000.0
    temperature: float = 20.0
    distillation_weight: float = 20.0
    label_weight: float = 0.0
    dtype: str = "float32"
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "seed", "real_batch", "synthetic_batch"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        self._require(
            "real_batch", self.real_batch + self.synthetic_batch > 0, "> 0 where synthetic_batch is"
        )
        self._require("ranges", self.ranges in RANGES, f"one of {RANGES}")
        self._require("range_steps", self.range_steps >= 1, ">= 1")
        known = f"one of {RANGE_IMAGES}"
        self._require("range_images", self.range_images in RANGE_IMAGES, known)
        batches = {"real": self.real_batch, "synthetic": self.synthetic_batch}
        some = batches.get(self.range_images, 1) > 0
        self._require("range_images", some, "of images of which there are some in a batch")
        known = f"one of {WEIGHT_RANGES}"
        self._require("weight_ranges", self.weight_ranges in WEIGHT_RANGES, known)
        self._require("percentile", 50 < self.percentile <= 100, "in (50, 100]")
        self._require("augmentation", self.augmentation in AUGMENTATIONS, f"one of {AUGMENTATIONS}")
        for name in ("max_shift", "blend"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._require("label_weight", self.label_weight == 0 or self.blend == 0, "0 with blend > 0")
        for name in ("real_crop", "synthetic_crop"):
            low, high = getattr(self, name)
            self._require(name, 0 < low <= high <= 1, "(low, high) with 0 < low <= high <= 1")
        self._require("dtype", self.dtype in DTYPES, f"one of {DTYPES}")
        for name in ("lr", "temperature", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "> 0")
        self._require("range_lr", self.range_lr >= 0, ">= 0")
        for name in ("momentum", "average_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("check_every", self.check_every >= 0, ">= 0")
        self._require("patience", self.patience >= 1, ">= 1")
        self._require("weight_decay", self.weight_decay >= 0, ">= 0")
        self._require(
            "cosine_steps", self.cosine_steps is None or self.cosine_steps >= 1, ">= 1 where given"
        )
        self._require("method", self.method in METHODS, f"one of {METHODS}")
        # Reconstruction takes ranges from the images that it learns on.
        fits = {"ranges": self.ranges != "reference", "range_images": self.range_images == "all"}
        for name, holds in fits.items():
            expected = f"'fdda' with {name} = {getattr(self, name)!r}"
            self._require("method", holds or self.method == "fdda", expected)

    def plain_minmax(self) -> QuantizeConfig:
        """The same without tuning: activation ranges are the calibration images' min and max."""
        return self.replace(
            method="fdda", steps=0,
            ranges="minmax", weight_ranges="minmax", correct_batch_norms=False,
        )  # fmt: skip

    @classmethod
    def reference(cls) -> QuantizeConfig:
        """The paper's settings (method and released code), to the letter."""
        return cls(
            method="fdda",
            steps=350 * _EPOCH,
            warmup_steps=50 * _EPOCH,
            placement="paper",
            ranges="reference",
            range_steps=4 * _EPOCH,
            correct_batch_norms=False,
            augmentation="crop",
            blend=0.0,
            label_weight=1.0,
            lr=1e-6,
            range_lr=0.0,
            cosine_steps=20_000,
            average_decay=0.0,
            check_every=0,
            max_grad_norm=math.inf,
            synthesis=SynthesisConfig.reference(),
            refine=RefineConfig(images=0),
        )


def preset(name: str) -> QuantizeConfig:
    """The settings called `fast` or `reference`.

    Raises:
        ValueError: another name.
    """
    if name == "fast":
        return QuantizeConfig()
    if name == "reference":
        return QuantizeConfig.reference()
    raise ValueError(f"preset must be one of {PRESETS}, got {name!r}")


def to_dict(section: Any) -> dict[str, Any]:
    """A dataclass as plain values; None is left out, since TOML has no such value."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(v) for name, v in pairs if v is not None}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(section)


def from_dict(base: _Config | Bits, values: Mapping[str, Any], where: str = "config") -> Any:
    """`base` with the fields named in `values` replaced; types must be those of the fields.

    Raises:
        ValueError: an unknown field, a value of another type, or one out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of settings, got {values!r}")
    hints = get_type_hints(type(base))
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{where}: unknown setting {min(unknown)!r}; known: {sorted(hints)}")
    changes = {}
    for name, value in values.items():
        current, label = getattr(base, name), f"{where}.{name}"
        if dataclasses.is_dataclass(current):
            changes[name] = from_dict(current, value, label)
        else:
            changes[name] = _typed(hints[name], value, label)
    return dataclasses.replace(base, **changes)


def _typed(hint: Any, value: Any, label: str) -> Any:
    """`value` as the type `hint`, one of those that the settings use."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # X | None, and None is never written
        return _typed(arguments[0], value, label)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{label} must be a list, got {value!r}")
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{label} must have {len(kinds)} values, got {value!r}")
        return tuple(
            _typed(k, v, f"{label}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{label} must be a table, got {value!r}")
        return {name: _typed(arguments[1], v, f"{label}.{name}") for name, v in value.items()}
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{label} must be {hint.__name__}, got {value!r}")
    return hint(value)


def write_toml(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes the whole file or none."""
    with written_whole(path) as temporary:
        temporary.write_text(tomli_w.dumps(values), encoding="utf-8")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError when the file is not TOML."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error
