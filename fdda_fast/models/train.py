"""Trains the shipped teachers: `python -m fdda_fast.models.train MODEL [--out FILE]`.

The same torch release, CPU kind and thread count give the same weights bit for bit; elsewhere the
accuracy agrees to some images of the test set. The digits' shipped weights come from two threads;
Fashion-MNIST's ResNet-20 had 94.53 % where it was trained with one, the shipped one has 94.67.
`glyphs-resnet20` learns from what `python bench/glyphs.py` writes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..data import ImageSource, open_source, random_shift
from .loading import SHIPPED, WEIGHTS_DIR


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, one-epoch warm-up, cosine to zero; shifts and flips.

    bf16: products and activations in bfloat16; faster where the processor has instructions for it.
    """

    dataset: str
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    max_shift: int = 2
    seed: int = 0
    bf16: bool = False


RECIPES = {
    "fashion-mnist-resnet20": Recipe("fashion-mnist", epochs=24),
    "fashion-mnist-mobilenetv2": Recipe("fashion-mnist", epochs=18),
    "fashion-mnist-regnetx": Recipe("fashion-mnist", epochs=20, bf16=True),
    "glyphs-resnet20": Recipe("runs/glyphs", epochs=8, bf16=True),
    "digits-resnet8": Recipe("digits", epochs=60, max_shift=1),
}


@torch.no_grad()
def test_accuracy(model: nn.Module, source: ImageSource) -> float:
    model.eval()
    correct = 0
    for start in range(0, len(source), 500):
        rows = range(start, min(start + 500, len(source)))
        correct += int((model(source.images(rows)).argmax(1) == source.labels[rows]).sum())
    return correct / len(source)


def train(factory: Callable[[], nn.Module], recipe: Recipe) -> nn.Module:
    source, test = open_source(recipe.dataset, "train"), open_source(recipe.dataset, "test")
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    model = factory().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, 0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    steps_per_epoch = len(source) // recipe.batch_size
    total, warmup = recipe.epochs * steps_per_epoch, steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    images, start = source.images(range(len(source))), time.monotonic()
    for epoch in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(source), generator=rng)
        for rows in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            batch = random_shift(images[rows], recipe.max_shift, source.flip, rng)
            batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = F.cross_entropy(model(batch), source.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % max(1, recipe.epochs // 12) == 0:
            print(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {loss.item():.4f}, "
                f"test accuracy {100 * test_accuracy(model, test):.2f} %, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()


def main() -> None:
    from ..checkpoint import save_tensors

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    recipe, (factory, file) = RECIPES[args.model], SHIPPED[args.model]
    model = train(factory, recipe)
    accuracy = test_accuracy(model, open_source(recipe.dataset, "test"))
    out = args.out or WEIGHTS_DIR / file
    save_tensors(
        out,
        {k: v.contiguous() for k, v in model.state_dict().items()},
        {"dataset": recipe.dataset, "test_accuracy": f"{accuracy:.4f}"},
    )
    print(f"{out}: {out.stat().st_size} bytes, test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
