"""One training step against the paper's, written plainly: `python bench/step.py`.

ResNet-18 with random weights, 224 px, 1000 classes, batches of 16 + 16. Three steps: `warmup`
trains the generator; `student` fine-tunes the student on 32 images; `finetuning` is the paper's
step after the warm-up, the generator's and the student's together. Baseline: reference_step.py,
as it is and through torch.compile. All in one process, in turn; medians. The peak of the resident
memory, less that after the imports, is of a process of its own for each; not of the compiled step,
where it would be the compiler's. `taskset -c 0` pins it to one core.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torchvision
from reference_step import Draws, PlainActivation, PlainGenerator, ReferenceStep, plain_student
from rich.console import Console
from rich.table import Table
from timing import Run, interleaved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fdda_fast as fdda
from fdda_fast.fingerprints import fingerprint
from fdda_fast.memory import resident_memory
from fdda_fast.quantization.finetune import Finetuner
from fdda_fast.quantization.modules import activation_quantizers
from fdda_fast.quantization.prepare import prepare
from fdda_fast.quantization.stages import JointTraining
from fdda_fast.synthesis import GeneratorTrainer

CLASSES, SHAPE = 1000, (3, 224, 224)
STEPS = ("warmup", "student", "finetuning")
PLAIN = ("reference", "compiled")
PROVIDERS = (*PLAIN, "float32", "bfloat16")
RANGE = 6.0  # of every activation


class Bench:
    """Teacher, centers and draws that all providers share."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.batch = batch
        self.teacher = torchvision.models.resnet18()
        for module in self.teacher.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        channels = [m.num_features for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.centers = fdda.BNSCenters(
            [torch.randn(1, c).expand(CLASSES, c) for c in channels],
            [torch.rand(1, c).expand(CLASSES, c) for c in channels],
            torch.ones(CLASSES, dtype=torch.int64),
            torch.zeros(CLASSES, CLASSES),
            torch.ones(CLASSES, dtype=torch.bool),
            SHAPE,
            fingerprint({}, self.teacher),
        )
        self.images = torch.randn(batch, *SHAPE), torch.randint(CLASSES, (batch,))

    def run(self, step: str, provider: str) -> Run:
        """Calls the step once and again, each with draws of its own."""
        make = self._reference if provider in PLAIN else self._library
        call, index = make(step, provider), iter(range(1 << 30))
        return lambda: call(next(index))

    def _reference(self, step: str, provider: str):
        student = nn.Linear(1, 1) if step == "warmup" else plain_student(self.teacher, 4, 4)
        for module in student.modules():
            if isinstance(module, PlainActivation):
                module.x_max.fill_(RANGE)
        pairs = zip(self.centers.mean, self.centers.var, strict=True)
        centers = [[(mean[0], var[0]) for mean, var in pairs]]
        generator = PlainGenerator(CLASSES, SHAPE)
        plain = ReferenceStep(copy.deepcopy(self.teacher), generator, student, centers)
        noise = [(torch.randn_like(mean), torch.randn_like(var)) for mean, var in centers[0]]
        z_a, z_b = torch.randn(2, self.batch, 100)
        real, labels = self.images
        draws = Draws(z_a, labels, z_b, 0, noise)
        generator_step, student_step = plain.generator_step, plain.student_step
        if provider == "compiled":
            generator_step, student_step = map(torch.compile, (generator_step, student_step))

        def call(_: int) -> None:
            synthetic = real if step == "student" else generator_step(draws)[0]
            if step != "warmup":
                student_step(torch.cat([real, synthetic]), torch.cat([labels, labels]))

        return call

    def _library(self, step: str, dtype: str):
        synthesis = fdda.SynthesisConfig.reference().replace(
            batch_size=self.batch, images_per_class=self.batch, dtype=dtype
        )
        if step == "warmup":
            return GeneratorTrainer(self.teacher, self.centers, synthesis).step
        config = fdda.QuantizeConfig.reference().replace(
            warmup_steps=0, range_steps=1, real_batch=self.batch, synthetic_batch=self.batch,
            dtype=dtype,
        )  # fmt: skip
        student = prepare(self.teacher, fdda.Bits(4, 4), placement="paper", from_zero=True)
        for quantizer in activation_quantizers(student):
            quantizer.x_max.fill_(RANGE)
        tuner = Finetuner(student, self.teacher, self.images, config)
        if step == "student":
            return lambda index: tuner.step(index, self.images)
        trainer = GeneratorTrainer(self.teacher, self.centers, synthesis)
        return JointTraining(tuner, trainer).step


def memory_peak(step: str, provider: str, batch: int) -> float:
    """GiB, see above."""
    command = [sys.executable, __file__, "--batch", str(batch), "--peak-of", step, provider]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(step: str, provider: str, batch: int) -> None:
    def kibibytes(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(field + ":")[1].split()[0])

    before = kibibytes("VmRSS")
    run = Bench(batch).run(step, provider)
    run()
    plain = provider == "reference"
    with nullcontext() if plain else resident_memory():
        for _ in range(1 if plain else 7):  # what stays with the process grows at first
            run()
    print((kibibytes("VmHWM") - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--peak-of", nargs=2, metavar=("STEP", "PROVIDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(*args.peak_of, args.batch)
        return
    bench = Bench(args.batch)
    table = Table(title=f"training steps, batch {args.batch} + {args.batch}, {args.threads} thread")
    for column in ("step", "provider", "seconds", "x", "GMAC/s of the reference's", "peak GiB"):
        table.add_column(column, justify="left" if column in ("step", "provider") else "right")
    for step in args.steps:
        runs = {provider: bench.run(step, provider) for provider in PROVIDERS}
        with FlopCounterMode(display=False) as counter:
            runs["reference"]()
        for _ in range(2):  # compiles, once more after the optimisers have their state
            runs["compiled"]()
        runs["float32"](), runs["bfloat16"]()  # with the memory that stays, see resident_memory
        seconds = interleaved(runs, args.rounds, plain_memory=PLAIN)
        for provider, value in seconds.items():
            table.add_row(
                step,
                provider,
                f"{value:.2f}",
                f"{seconds['reference'] / value:.2f}",
                f"{counter.get_total_flops() / 2e9 / value:.1f}",
                "" if provider == "compiled" else f"{memory_peak(step, provider, args.batch):.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
