"""The fused student computes what the student does, and shares its tensors."""

import functools

import pytest
import torch
import torchvision
from norms import randomize_norms
from torch import fx, nn

from fdda_fast.layers import LAYERS, use_layers
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.fusion import FusedNormQuantizer, cast_convolutions, fuse_norms
from fdda_fast.quantization.modules import activation_quantizers, quantizer_mode
from fdda_fast.quantization.prepare import prepare


class Net(nn.Module):
    """Every form of the chain, and forms that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8, 8, 8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        a = torch.relu(self.norms[0](self.convs[0](x)))
        b = self.relu6(a + self.norms[1](self.convs[1](a)))  # residual first
        c = self.norms[2](self.convs[2](b))  # no ReLU
        d = self.norms[3](self.convs[3](c))
        d += c
        e = torch.relu(self.plain(self.convs[4](d)))  # no weight: stays
        f = self.norms[4](self.convs[5](e))  # read twice: stays
        return self.fc((torch.relu(f) + f).mean((2, 3)))


def students(model, size, **options):
    torch.manual_seed(0)
    randomize_norms(model)
    student = prepare(model.eval(), Bits(4, 4), **options)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad(), quantizer_mode(student, "observe"):
        student(images)
    return student, fuse_norms(student, images.shape[1:]), images


def round_norms_as_fused(model):
    """Scale and shift rounded once, so that no value lands on another code."""

    def forward(norm, x):
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale * norm.weight if norm.affine else scale
        shift = -norm.running_mean * scale
        shift = shift + norm.bias if norm.affine else shift
        return x * scale.float().view(-1, 1, 1) + shift.float().view(-1, 1, 1)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = functools.partial(forward, module)


def fused_modules(model):
    return [m for m in model.modules() if isinstance(m, FusedNormQuantizer)]


@pytest.mark.parametrize("placement", ["full_integer", "paper"])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [Net, torchvision.models.resnet18])
def test_same_output_and_gradients(make, placement, learn, memory_format):
    student, fused, images = students(make(), 32, placement=placement)
    round_norms_as_fused(student)
    for quantizer in activation_quantizers(student):
        quantizer.log_range.requires_grad_(learn)
    images = images.contiguous(memory_format=memory_format).requires_grad_()
    parameters = [p for p in student.parameters() if p.requires_grad]
    results = []
    for model in (student, fused):
        y = model(images)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        gradients = torch.autograd.grad(loss, [images, *parameters], allow_unused=True)
        results.append((y.detach(), gradients))
    (expected, gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected)
    names = ["images", *(n for n, p in student.named_parameters() if p.requires_grad)]
    largest = max(g.norm() for g in gradients if g is not None)
    for name, got, want in zip(names, found_gradients, gradients, strict=True):
        assert (got is None) == (want is None), name
        if want is not None:
            assert (got - want).norm() < 1e-4 * want.norm() + 1e-6 * largest, name


def test_same_output_up_to_single_codes():
    """Batch norm as PyTorch rounds it: a value in a million lands on the next code."""
    student, fused, images = students(Net(), 32)
    with torch.no_grad():
        found, expected = fused(images), student(images)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_is_fused():
    student, fused, _ = students(Net(), 8)
    assert [m.relu for m in fused_modules(fused)] == [True, 6.0, False, False]
    norms = {id(m.norm) for m in fused_modules(fused)}
    assert norms == {id(student.get_submodule(f"norms.{i}")) for i in range(4)}
    resnet, fused, _ = students(torchvision.models.resnet18(), 32)
    assert len(fused_modules(fused)) == 17
    left = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == sum(isinstance(m, nn.BatchNorm2d) for m in resnet.modules()) == 20


def test_additions_in_place():
    """Fused, whichever operand is overwritten."""

    class InPlace(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.swap, self.norm = swap, nn.BatchNorm2d(3)
            self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            a = torch.relu(x)
            b = self.norm(self.conv(a))
            return self.last(a.add_(b) if self.swap else b.add_(a))

    for swap in (False, True):
        student, fused, images = students(InPlace(swap), 8)
        assert len(fused_modules(fused)) == 1
        with torch.no_grad():
            assert fused(images).shape == student(images).shape


def test_tensors_are_shared_and_the_student_is_not_changed():
    student, fused, images = students(torchvision.models.resnet18(), 32)
    code, names = student.code, list(student.state_dict())
    again = fuse_norms(student, images.shape[1:])
    assert isinstance(again, fx.GraphModule)
    assert (student.code, list(student.state_dict())) == (code, names)
    mine = {id(t) for t in (*student.parameters(), *student.buffers())}
    assert {id(t) for t in (*fused.parameters(), *fused.buffers())} == mine
    with torch.no_grad():
        before = fused(images)
        student.get_submodule("bn1").weight.mul_(1.5)
        activation_quantizers(student)[1].x_max.mul_(0.5)
        assert not torch.equal(fused(images), before)
        torch.testing.assert_close(fused(images), student(images), rtol=0.05, atol=0.05)


def test_the_fused_student_traces_under_compile():
    _, fused, images = students(Net(), 8)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images).detach(), fused(images).detach())


@pytest.mark.parametrize("layers", [LAYERS, ()], ids=["own layers", "plain"])
def test_convolutions_in_bfloat16(layers):
    """Activations are bfloat16, logits and gradients float32 and near those of float32."""
    student, fused, images = students(Net(), 16)
    cast = fuse_norms(student, images.shape[1:])
    use_layers(cast, layers)
    cast_convolutions(cast, torch.bfloat16)
    assert {id(p) for p in cast.parameters()} == {id(p) for p in student.parameters()}
    seen = []
    for module in fused_modules(cast):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients = []
    for model in (fused, cast):
        y = model(images)
        assert y.dtype == torch.float32
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        gradients.append(torch.autograd.grad(loss, parameters))
    assert seen == [torch.bfloat16] * 4
    assert all(g.dtype == torch.float32 for g in gradients[1])
    one, two = (torch.cat([g.flatten() for g in group]) for group in gradients)
    assert torch.cosine_similarity(one, two, dim=0) > 0.95
    assert not torch.equal(one, two)
    assert all(
        not isinstance(m, nn.Conv2d) or m.weight.dtype == torch.float32 for m in student.modules()
    )
