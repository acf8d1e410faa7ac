"""Running a packed graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.preprocessing import Preprocessing
from ..ops._library import active_isa, has_cuda_kernels
from .graph import Graph, Node, name_of_module
from .integer import PackedConv2d, PackedLinear, domain, weight_bits
from .program import Program, Step, logical_shape
from .reordered import reordered_runners

_PROGRAMS = 2  # kept for images of as many shapes: those of full and of last batches

Observer = Callable[[Node, dict[str, torch.Tensor], list[Any], Any], None]


@dataclass(frozen=True)
class Row:
    """One node of a packed model, for people to read.

    Args:
        name, op: what it is.
        domain: `integer`; `float`; `convert`, a step from one to the other.
        input_shape, output_shape: of its first input and its output, [N, C, H, W], for one image.
        bits: of the weights where it has some, else of the codes it makes, else None.
        weight_bytes: all tensors that belong to it, in the file.
        macs: multiply-accumulates for one image.
    """

    name: str
    op: str
    domain: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    bits: int | None
    weight_bytes: int
    macs: int


class PackedModel(nn.Module):
    """A network of packed low-bit layers: float32 images [N, C, H, W] -> float32 logits [N, K].

    Made by `pack` and `load_packed`. It does inference only: no gradients, no parameters.

    `to("cuda")` has the integers computed by CUDA kernels, from a second copy of the weights in
    their order. A call starts kernels on the current stream and neither waits for it nor copies to
    or from the device, so that CUDA graphs can capture it; memory is the caching allocator's, in a
    capture the graph's own pool.

    Args:
        graph: what to compute.
        tensors: exactly those that the graph names.
        preprocessing: how an image file becomes an input, where known.
        class_names: one per logit, where known.

    Raises:
        ValueError: graph, tensors, preprocessing and class names do not belong together.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, torch.Tensor],
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        graph.check_tensors(tensors)
        self.graph = graph
        self.tensors = dict(tensors)
        self.preprocessing = preprocessing
        self.class_names = None if class_names is None else list(class_names)
        self._check_metadata()
        self._dead = graph.last_uses()
        self._bind()
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}  # they point into memory of their own

    def _check_metadata(self) -> None:
        if self.preprocessing and self.preprocessing.channels != self.graph.in_channels:
            raise ValueError(
                f"preprocessing is for {self.preprocessing.channels} channels, the model reads "
                f"{self.graph.in_channels}"
            )
        if self.class_names is None:
            return
        # They come from files and go to terminals: no control characters.
        if not all(isinstance(name, str) and name.isprintable() for name in self.class_names):
            raise ValueError("class_names must be printable strings")
        last = self.graph.nodes[self.graph.output - 1].op if self.graph.output else None
        if isinstance(last, PackedLinear) and last.out_features != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class names for {last.out_features} outputs")

    def _bind(self) -> None:
        """Gives every node its tensors, in the dtypes that the operators read."""
        self._programs: dict[tuple, Program] = {}
        self._bound = []
        for node in self.graph.nodes:
            bound = {role: self.tensors[f"{node.name}.{role}"] for role in node.op.tensors()}
            if "weight_offset" in bound:
                bound["weight_offset"] = bound["weight_offset"].long()
            self._bound.append(bound)
        self._runners = [
            partial(node.op.run, bound)
            for node, bound in zip(self.graph.nodes, self._bound, strict=True)
        ]
        if has_cuda_kernels(self._device()):
            self._runners = reordered_runners(self.graph, self._bound)

    def _device(self) -> torch.device:
        return next((t.device for t in self.tensors.values()), torch.device("cpu"))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        tensors = {name: fn(tensor) for name, tensor in self.tensors.items()}
        self.graph.check_tensors(tensors)  # refuses .half() and the like
        self.tensors = tensors
        self._bind()
        return super()._apply(fn, recurse)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 images [N, C, H, W] -> float32 logits [N, K].

        Raises:
            ValueError: wrong dtype, rank or channels, or a size that the network cannot take.
        """
        self._check_images(images)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self.execute(images)
        isa = active_isa()
        if isa is None:
            return self.execute(images)
        return self._run_program(images, (images.shape, images.stride(), isa))

    @torch.no_grad()
    def _run_program(self, images: torch.Tensor, key: tuple) -> torch.Tensor:
        program = self._programs.get(key)
        if program is None:
            program, logits = self._trace(images)
        elif program.lock.acquire(blocking=False):
            try:
                logits = program.run(images)
            finally:
                program.lock.release()
        else:  # another thread runs it
            logits = self.execute(images)
        self._programs.pop(key, None)
        self._programs[key] = program  # the last is the latest
        for stale in list(self._programs)[:-_PROGRAMS]:  # a copy: other threads add to it
            self._programs.pop(stale, None)
        return logits

    @torch.no_grad()
    def profile(self, images: torch.Tensor, repeats: int = 20) -> list[Step]:
        """What each node takes on images [N, C, H, W]: the median of several runs.

        Raises:
            RuntimeError: the compiled operators are not loaded.
            ValueError: as `forward`, or images elsewhere than on the CPU.
        """
        self._check_images(images)
        if images.device.type != "cpu":
            raise ValueError(f"profile: expected images on the CPU, got {images.device}")
        if active_isa() is None:
            raise RuntimeError("profile: the compiled operators are not loaded")
        program = self._trace(images)[0]
        runs = [program.profile(images) for _ in range(repeats)]
        return [
            replace(steps[0], seconds=statistics.median(s.seconds for s in steps))
            for steps in zip(*runs, strict=True)
        ]

    def _trace(self, images: torch.Tensor) -> tuple[Program, torch.Tensor]:
        """A program for such images, and what these give."""
        values: list[Any] = [images]
        logits = self.execute(images, lambda node, tensors, inputs, y: values.append(y))
        return Program(self.graph, self._bound, values), logits

    @torch.no_grad()
    def execute(self, images: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
        """Runs node by node; `observe` sees (node, tensors, inputs, output) of every node."""
        self._check_images(images)
        values: list[Any] = [images] + [None] * len(self.graph.nodes)
        for i, node in enumerate(self.graph.nodes):
            inputs = [values[source] for source in node.inputs]
            try:
                output = self._runners[i](*inputs)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                raise ValueError(
                    f"{node.name} ({type(node.op).__name__}) cannot run on images of shape "
                    f"{tuple(images.shape)}: {error}"
                ) from error
            if observe is not None:
                observe(node, self._bound[i], inputs, output)
            values[i + 1] = output
            for dead in self._dead[i]:
                values[dead] = None
        return values[self.graph.output]

    def _check_images(self, images: torch.Tensor) -> None:
        channels = self.graph.in_channels
        if not isinstance(images, torch.Tensor) or images.dtype != torch.float32:
            got = getattr(images, "dtype", type(images).__name__)
            raise ValueError(f"images must be a float32 tensor, got {got}")
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must have the shape [N, {channels}, H, W], got {tuple(images.shape)}"
            )
        if self.graph.fixed_size and tuple(images.shape[2:]) != self.graph.image_size:
            raise ValueError(
                f"this model reads images of {self.graph.image_size} pixels only, got "
                f"{tuple(images.shape[2:])}"
            )

    @property
    def bits(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (weight bits, input bits), in the form of `Bits.overrides`.

        Of a module that is called several times, the narrowest input: the image always has 8 bits,
        and what another layer reads with more has them from there.
        """
        types, found = self.graph.types(), dict[str, tuple[int, int]]()
        for node in self.graph.nodes:
            if isinstance(node.op, PackedConv2d | PackedLinear):
                name, bits = name_of_module(node.name), types[node.inputs[0]].bits
                found[name] = node.op.weight_bits, min(bits, found.get(name, (0, bits))[1])
        return found

    def summary(self) -> list[Row]:
        """One row per node, in execution order; runs one blank image to see the shapes."""
        types = self.graph.types()
        rows: list[Row] = []

        def add(node: Node, tensors: dict[str, torch.Tensor], inputs: list[Any], y: Any) -> None:
            shape = logical_shape(y)
            rows.append(
                Row(
                    name=node.name,
                    op=type(node.op).__name__,
                    domain=domain(node.op, [types[i] for i in node.inputs]),
                    input_shape=logical_shape(inputs[0]) if inputs else (),
                    output_shape=shape,
                    bits=weight_bits(node.op) or types[len(rows) + 1].bits or None,
                    weight_bytes=self._bytes(node),
                    macs=node.op.macs(shape),
                )
            )

        # Without memory of its own: a file may claim any size, and `execute` says what fails.
        blank = torch.zeros((), device=self._device())
        self.execute(blank.expand(1, self.graph.in_channels, *self.graph.image_size), add)
        return rows

    def _bytes(self, node: Node) -> int:
        stored = (self.tensors[f"{node.name}.{role}"] for role in node.op.tensors())
        return sum(t.numel() * t.element_size() for t in stored)

    def save(self, path: str | Path) -> None:
        """Writes a .fdda file, see `deploy.format`."""
        from .format import save_packed

        save_packed(self, path)
