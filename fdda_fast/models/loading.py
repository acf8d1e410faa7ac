"""Teachers: shipped ones, torchvision names with local weights, a user's own factory."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import nn

from ..checkpoint import load_tensors
from .small import mobilenetv2, regnetx, resnet8, resnet20

WEIGHTS_DIR = Path(__file__).parent / "weights"
_WRAPPER = "module."
SHIPPED = {
    "fashion-mnist-resnet20": (resnet20, "fashion_mnist_resnet20.safetensors"),
    "fashion-mnist-mobilenetv2": (mobilenetv2, "fashion_mnist_mobilenetv2.safetensors"),
    "fashion-mnist-regnetx": (regnetx, "fashion_mnist_regnetx.safetensors"),
    "glyphs-resnet20": (partial(resnet20, num_classes=128), "glyphs_resnet20.safetensors"),
    "digits-resnet8": (resnet8, "digits_resnet8.safetensors"),
}


def load_teacher(
    spec: str, weights: str | Path | None = None, num_classes: int | None = None
) -> nn.Module:
    """Builds a trained network in eval mode.

    Args:
        spec: a shipped network (one of `SHIPPED`), a torchvision classification architecture
            (`resnet18`), or `module:factory` of the user's own.
        weights: safetensors file, or a PyTorch state dict (read with weights_only=True); required
            except for shipped networks.
        num_classes: passed to the factory where given.

    Raises:
        FileNotFoundError: no weights file.
        ValueError: unknown spec, a factory that fails, or weights that do not fit.
    """
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if spec in SHIPPED:
        if weights is None:
            factory, file = SHIPPED[spec]
            return _with_weights(_call(spec, factory, arguments), WEIGHTS_DIR / file)
        return _with_weights(_call(spec, SHIPPED[spec][0], arguments), Path(weights))
    factory = _user_factory(spec) if ":" in spec else _torchvision_factory(spec)
    if weights is None:
        raise ValueError(f"model {spec!r} needs a weights file; only {sorted(SHIPPED)} ship theirs")
    return _with_weights(_call(spec, factory, arguments), Path(weights))


def _torchvision_factory(name: str):
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"unknown model {name!r}: neither shipped ({sorted(SHIPPED)}), nor a torchvision "
            "classification model, nor 'module:factory'"
        )
    return lambda **arguments: torchvision.models.get_model(name, weights=None, **arguments)


def _user_factory(spec: str):
    module_name, _, attribute = spec.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import the model factory {spec!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"model factory {spec!r} is not callable")
    return factory


def _call(spec: str, factory, arguments: dict) -> nn.Module:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"model factory {spec!r} does not take {arguments}: {error}") from error
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"model factory {spec!r} failed: {error!r}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model factory {spec!r} returned {type(model).__name__}, not a Module")
    return model.eval()


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    state = load_tensors(path)[0] if path.suffix == ".safetensors" else _read_state_dict(path)
    try:
        model.load_state_dict(_unwrapped(state, model))
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the model: {error}") from error
    return model


def _unwrapped(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Without what DataParallel puts before every name, unless the model's own begin so."""
    wrapped = all(name.startswith(_WRAPPER) for name in state)
    if not wrapped or all(name.startswith(_WRAPPER) for name in model.state_dict()):
        return state
    return {name.removeprefix(_WRAPPER): tensor for name, tensor in state.items()}


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for foreign files
        raise ValueError(f"{path}: not a PyTorch weights file ({error})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: does not hold a state dict of tensors")
    return state
