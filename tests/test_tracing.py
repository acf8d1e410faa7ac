"""Traced networks against the models, which may work in place."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from fdda_fast.tracing import trace


class Net(nn.Module):
    """Layers for `forward` functions of (network, image) to call."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.relu, self.same, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout()
        self.act, self.flat = nn.Hardswish(inplace=True), nn.Flatten(2)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def preactivation(net, x):
    y = net.a(x)
    return net.b(net.relu(y)) + y


def statement(net, x):
    y = net.a(x)
    z = net.b(y)
    net.relu(y)
    net.act(y)
    return z * y


def other_name(net, x):
    y = F.relu(net.a(x))
    z = y
    z += net.b(y)
    return net.norm(y)


def behind_identities(net, x):
    y = net.a(x)
    z = net.drop(net.same(y))
    z -= 1
    return net.b(y) * net.same(z)


def functions(net, x):
    y = net.a(x)
    F.relu(y, True)
    z = F.hardtanh_(net.b(y), -0.3, 0.4)
    w = F.leaky_relu(z, inplace=True)
    torch.sigmoid_(y)
    y.mul_(2).clamp_(max=1.5)
    return y / z + w


def pieces(net, x):
    p, q = net.a(x).chunk(2, 1)
    p += 1
    q.relu_()
    return torch.cat([p, q], 1)


def views_taken_later(net, x):
    y = net.a(x)
    z = y.flatten(2)
    y *= z.mean()
    return y.view(y.size(0), -1) + torch.flatten(y, 1)


def sizes(net, x):
    y = net.a(x)
    p, q = y.chunk(2, 1)
    p += 1
    n, m = y.shape[0], y.size(1)
    half = m
    half //= 2
    return p.reshape(n, half, -1) + q.reshape(n, m // 2, -1)


def the_image(net, x):
    x += 1
    return net.a(x) + x.mean()


def keywords(net, x):
    x = net.drop(input=net.relu(input=net.norm(input=net.a(input=x))))
    x = F.relu(inplace=True, input=net.same(input=x)) + F.hardtanh(input=x)
    x = torch.where(condition=x > 0, input=x, other=x + 1)
    return net.fc(input=torch.flatten(start_dim=1, input=F.adaptive_avg_pool2d(x, output_size=1)))


def numpy_names(net, x):
    y = net.a(x)
    return (
        torch.cat([y, y.softmax(axis=1)], axis=1) - torch.mean(y, axis=(2, 3), keepdims=True)[:, :1]
    )


WORKING = (
    preactivation, statement, other_name, behind_identities, functions, pieces, views_taken_later,
    sizes, the_image, keywords, numpy_names,
)  # fmt: skip


class Copying(fx.Interpreter):
    """Keeps every tensor, and what it was when it was made."""

    def __init__(self, graph_module):
        super().__init__(graph_module, garbage_collect_values=False)
        self.made = []

    def run_node(self, node):
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.made.append((result, result.clone()))
        return result


@torch.no_grad()
def compare(model, x):
    graph_module = trace(model.eval())
    interpreter = Copying(graph_module)
    found = interpreter.run(x)
    assert all(torch.equal(now, then) for now, then in interpreter.made)
    assert not any(getattr(m, "inplace", False) for m in graph_module.modules())
    assert all(
        node.args and not node.kwargs.keys() & {"input", "axis", "keepdims"}
        for node in graph_module.graph.nodes
        if node.op == "call_module" or node.target is F.relu
    )
    assert torch.equal(found, graph_module(x))
    assert torch.equal(found, model(x))  # at last: it may overwrite x


@pytest.mark.parametrize("forward", WORKING, ids=lambda f: f.__name__)
def test_computes_what_the_model_does(forward):
    torch.manual_seed(0)
    compare(Net(forward), torch.randn(2, 3, 6, 6))


TORCHVISION = (
    "resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "efficientnet_b0", "vgg11_bn", "squeezenet1_1",
    "googlenet", "inception_v3",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(num_classes=5, **options)
    compare(model, torch.randn(1, 3, 80, 80))


def view_overwritten(net, x):
    y = net.a(x)
    y.view(y.shape[0], -1).mul_(-1)
    return net.b(y)


def piece_overwritten(net, x):
    y = net.a(x)
    p, _ = y.chunk(2, 1)
    p += 1
    return net.b(y)


def kept_view(net, x):
    y = net.a(x)
    z = net.flat(y)
    net.relu(y)
    return z


def two_views(net, x):
    y = net.a(x)
    net.same(y).transpose(1, 2).relu_()
    return net.drop(y)[:, 0] + 1


def weight(net, x):
    net.norm.weight.add_(1)
    return net.norm(net.a(x))


def filled(net, x):
    y = net.a(x)
    return y.zero_()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            view_overwritten,
            r"node 'b' \(Conv2d\) reads 'a', .* node 'mul_' \(mul\) has overwritten",
        ),
        (piece_overwritten, r"node 'b' \(Conv2d\) reads 'a', .* node 'add' \(add\)"),
        (kept_view, r"node 'output' \(output\) reads 'flat', .* node 'relu' \(ReLU\)"),
        (two_views, r"reads 'getitem', .* node 'relu_' \(relu\)"),
        (weight, r"node 'add_' \(add\) overwrites a tensor of the model"),
        (filled, r"node 'zero_' \(zero_\) works in place and has no other form"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_refuses(forward, message):
    with pytest.raises(ValueError, match=message):
        trace(Net(forward))


def test_views_of_channels_last():
    """As training has them, where the model was written for the other layout."""
    net = Net(lambda net, x: net.a(x).view(x.shape[0], -1)).eval()
    x = torch.randn(2, 3, 4, 5)
    traced = trace(net)
    y = traced(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, net(x))
    kept = Net(lambda net, x: net.a(x).view(torch.int32).view(dtype=torch.float32))
    assert torch.equal(trace(kept)(x), net.a(x) * 0 + kept.eval()(x))
