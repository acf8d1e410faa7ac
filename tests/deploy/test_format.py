"""Files: what is written comes back, and nothing else is accepted."""

import copy
import json
import random

import pytest
import torch
from networks import NETWORKS, images, packed_network
from safetensors.torch import load_file, save_file

from fdda_fast.checkpoint import load_tensors, save_tensors
from fdda_fast.data.preprocessing import Preprocessing
from fdda_fast.deploy import PackedModel, load_packed
from fdda_fast.deploy import format as packed_format
from fdda_fast.quantization.bits import Bits

PREPROCESSING = Preprocessing(16, 18, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def model():
    _, packed = packed_network("resnet", Bits(4, 4, first_last=8))
    return PackedModel(packed.graph, packed.tensors, PREPROCESSING, NAMES)


@pytest.fixture
def path(model, tmp_path):
    model.save(tmp_path / "model.fdda")
    return tmp_path / "model.fdda"


def tamper(path, change):
    """Rewrites a file with a checksum that fits: what a malicious author would do."""
    tensors, metadata = load_tensors(path)
    parts = {key: json.loads(metadata[key]) for key in ("graph", "preprocessing", "class_names")}
    change(parts, tensors)
    metadata |= {key: json.dumps(value) for key, value in parts.items()}
    metadata["sha256"] = packed_format._checksum(tensors, metadata)
    save_tensors(path, tensors, metadata)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    _, packed = packed_network(name, Bits(3, 5))
    packed.save(tmp_path / "a" / "model.fdda")
    loaded = load_packed(tmp_path / "a" / "model.fdda")
    assert loaded.graph == packed.graph
    assert torch.equal(loaded(images(4)), packed(images(4)))
    assert loaded.preprocessing is None
    assert loaded.class_names is None
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.fdda"]


def test_metadata(model, path):
    loaded = load_packed(path)
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.class_names == NAMES
    assert loaded.bits == model.bits
    assert loaded.summary() == model.summary()


def test_same_model_same_file(path, tmp_path):
    load_packed(path).save(tmp_path / "again")
    tensors, metadata = load_tensors(path)
    again, metadata_again = load_tensors(tmp_path / "again")
    assert metadata == metadata_again
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.fdda")


def test_truncated(path):
    content = path.read_bytes()
    for size in [0, 1, 7, 8, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.fdda"):
            load_packed(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"model\.fdda"):
        load_packed(path)


def test_flipped_bits(path):
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(0)
    spots = list(range(8)) + [chance.randrange(8, header) for _ in range(150)]
    spots += [chance.randrange(header, len(content)) for _ in range(50)]
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_packed(path)
        except ValueError:
            continue
        # JSON has spaces around it that mean nothing.
        assert chr(content[spot]) == " ", f"byte {spot}"


def test_foreign_files(model, path, tmp_path):
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a packed model"):
        load_packed(path)
    path.write_text("hello, world")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_packed(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_packed(path)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", "2", "version '2'"),
        ("format", "other", "not a packed model"),
        ("class_names", '["a"]', "checksum"),
        ("sha256", "0" * 64, "checksum"),
    ],
)
def test_changed_metadata(path, key, value, message):
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | {key: value})
    with pytest.raises(ValueError, match=message):
        load_packed(path)


@pytest.mark.parametrize("key", ["version", "graph", "preprocessing", "class_names", "sha256"])
def test_missing_metadata(path, key):
    tensors, metadata = load_tensors(path)
    del metadata[key]
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"version None|metadata without"):
        load_packed(path)


def test_changed_tensor(path):
    tensors, metadata = load_tensors(path)
    tensors["0.0.bias"][0] += 1
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match="checksum"):
        load_packed(path)


def test_graph_that_is_not_json(path):
    for text in ("{", "[" * 100_000, "nul"):
        tensors, metadata = load_tensors(path)
        metadata["graph"] = text
        metadata["sha256"] = packed_format._checksum(tensors, metadata)
        save_tensors(path, tensors, metadata)
        with pytest.raises(ValueError, match="graph: not JSON"):
            load_packed(path)


def stem(parts):
    return parts["graph"]["nodes"][1]


def attribute(name, value):
    def change(parts, tensors):
        stem(parts)["attributes"][name] = value

    return change


def node(key, value):
    def change(parts, tensors):
        stem(parts)[key] = value

    return change


def requantize(name, value):
    def change(parts, tensors):
        nodes = parts["graph"]["nodes"]
        next(n for n in nodes if n["op"] == "Requantize")["attributes"][name] = value

    return change


def graph(key, value):
    def change(parts, tensors):
        parts["graph"][key] = value

    return change


def tensor(name, make):
    def change(parts, tensors):
        tensors[name] = make(tensors[name])

    return change


def part(key, value):
    def change(parts, tensors):
        parts[key] = value

    return change


def preprocessing(key, value):
    def change(parts, tensors):
        parts["preprocessing"][key] = value

    return change


def rename(parts, tensors):
    tensors["0.0.other"] = tensors.pop("0.0.bias")


def not_finite(t):
    return torch.full_like(t, float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node("op", "eval"), "unknown operation 'eval'"),
        (node("op", "__class__"), "unknown operation"),
        (node("op", ["PackedConv2d"]), "unknown operation"),
        (node("op", "PackedLinear"), "expected the attributes"),
        (node("inputs", [2]), "inputs of '0.0'"),
        (node("inputs", [-1]), "inputs of '0.0'"),
        (node("inputs", [1.0]), "inputs of '0.0'"),
        (node("inputs", [True]), "inputs of '0.0'"),
        (node("inputs", [0]), "reads"),
        (node("inputs", [1, 1]), "reads"),
        (node("inputs", []), "reads"),
        (node("inputs", 1), "must be a list"),
        (node("name", "1.body.0.0"), "two nodes are called"),
        (node("name", "../../x\n"), "bad node name"),
        (node("name", 3), "bad node name"),
        (node("more", 3), "expected the keys"),
        (attribute("weight_bits", 9), "weight_bits"),
        (attribute("weight_bits", 7), "tensor '0.0.weight'"),
        (attribute("weight_bits", "8"), "weight_bits"),
        (attribute("out_channels", 17), "tensor '0.0.weight_offset'|tensor '0.0.weight'"),
        (attribute("in_channels", 2**40), "in_channels"),
        (attribute("in_channels", 65536), "could overflow int32"),
        (attribute("in_channels", 4), "tensor '0.0.weight'"),
        (attribute("kernel_size", [0, 3]), "kernel_size"),
        (attribute("kernel_size", [3]), "kernel_size"),
        (attribute("kernel_size", [3, 3, 3]), "kernel_size"),
        (attribute("kernel_size", 3), "kernel_size"),
        (attribute("stride", [0, 1]), "stride"),
        (attribute("padding", [-1, 0]), "padding"),
        (attribute("padding", [1 << 30, 0]), "padding"),
        (attribute("dilation", [0, 1]), "dilation"),
        (attribute("groups", 0), "groups"),
        (attribute("groups", 2), "does not divide"),
        (attribute("x_zero_point", 256), "x_zero_point"),
        (attribute("x_zero_point", None), "x_zero_point"),
        (attribute("residual_scale", 1.0), "reads"),
        (attribute("residual_scale", "1"), "residual_scale"),
        (attribute("output_range", [0, 256]), "output_range"),
        (attribute("output_range", [5, 4]), "output_range"),
        (attribute("output_range", None), "output_range"),
        (attribute("output_bits", 2), "output_range"),
        (attribute("unknown", 2), "expected the attributes"),
        (requantize("x_scale", 0.0), "x_scale: expected > 0"),
        (requantize("x_zero_point", 300), "x_zero_point"),
        (requantize("bits", 9), "bits"),
        (requantize("scale", 1e39), "Requantize.scale: expected a finite number in the range"),
        (requantize("zero_point", -(10**400)), "Requantize.zero_point: expected a finite number"),
        (graph("in_channels", 0), "in_channels"),
        (graph("image_size", [16]), "image_size"),
        (graph("image_size", "ab"), "image_size"),
        (graph("image_size", [16, -1]), "image_size"),
        (graph("fixed_size", 1), "fixed_size"),
        (graph("output", 1), "expected a float tensor"),
        (graph("output", 99), "output"),
        (graph("nodes", {}), "must be lists"),
        (graph("nodes", [None]), "expected the keys"),
        (graph("nodes", []), "output"),
        (part("graph", []), "expected the keys"),
        (part("graph", None), "expected the keys"),
        (part("preprocessing", {"image_size": 16}), "not a preprocessing record"),
        (part("preprocessing", [1]), "preprocessing"),
        (preprocessing("image_size", float("inf")), "not a preprocessing record"),
        (preprocessing("std", [10**400] * 3), "not a preprocessing record"),
        (preprocessing("mean", [float("nan")] * 3), "mean must be finite"),
        (preprocessing("std", [float("inf")] * 3), "std must be positive and finite"),
        (preprocessing("resize", 10**9), "and <= 16384, got resize=1000000000"),
        (part("class_names", ["a", "b"]), "2 class names for 10 outputs"),
        (part("class_names", list(range(10))), "must be printable strings"),
        (part("class_names", ["\x1b[2J"] * 10), "printable"),
        (part("class_names", {"a": 1}), "expected a list"),
        (rename, "missing"),
        (tensor("0.0.bias", lambda t: t[:-1].clone()), "tensor '0.0.bias'"),
        (tensor("0.0.bias", torch.Tensor.double), "holds torch.float64"),
        (tensor("0.0.bias", lambda t: t[:0].clone()), "tensor '0.0.bias'"),
        (tensor("0.0.bias", not_finite), "infinities or NaN"),
        (tensor("0.0.weight", lambda t: t[:, :-1].clone()), "tensor '0.0.weight'"),
        (tensor("0.0.weight", lambda t: t.to(torch.int8)), "tensor '0.0.weight'"),
        (tensor("0.0.weight_offset", lambda t: t.int() + 2**26), "offsets above"),
        (tensor("0.0.weight_offset", torch.Tensor.long), "holds torch.int64"),
    ],
)
def test_tampered(path, change, message):
    tamper(path, change)
    with pytest.raises(ValueError, match=message):
        load_packed(path)


VALUES = [
    *(-1, 0, 1, 2, 3, 255, 2**20, 2**31, 2**63, 10**400, 0.5, -1e300, True, None, "x"),
    *([], [1, 1], [2**20, 1], [-1], {}, [None, None]),
]


@pytest.mark.parametrize("name", ["resnet", "plain", "shuffle", "vgg"])
def test_random_tampering(name, tmp_path):
    """Whatever stands in the graph: it is refused, or it runs, or it says why it cannot run."""
    _, packed = packed_network(name)
    path = tmp_path / "model.fdda"
    packed.save(path)
    tensors, metadata = load_tensors(path)
    chance = random.Random(1)
    for _ in range(300):
        values = copy.deepcopy(packed.graph.to_dict())
        victim = chance.choice(values["nodes"])
        place = chance.choice([victim["attributes"], victim["attributes"], victim, values])
        if place:
            place[chance.choice(list(place))] = chance.choice(VALUES)
        metadata["graph"] = json.dumps(values)
        metadata["sha256"] = packed_format._checksum(tensors, metadata)
        save_tensors(path, tensors, metadata)
        try:
            output = load_packed(path)(images(2))
        except ValueError:
            continue
        assert output.dtype == torch.float32


def test_no_pickle_in_the_file(path):
    assert set(load_file(path)) == set(load_tensors(path)[0])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pad", {"value": 256.0}, "pads codes of 8 bits with 256.0"),
        ("pad", {"value": 0.5}, "pads codes of 8 bits with 0.5"),
        ("pad", {"before": [0]}, "before and after differ in length"),
        ("getitem", {"end": [1]}, "begin, end and step differ in length"),
        ("getitem", {"step": [1, 0, 1]}, "Slice.step: expected an integer in 1"),
    ],
)
def test_slices_and_padding_that_make_no_sense(name, changes, message, tmp_path):
    path = tmp_path / "model.fdda"
    packed_network("cifar")[1].save(path)

    def change(parts, tensors):
        (node,) = (n for n in parts["graph"]["nodes"] if n["name"] == name)
        node["attributes"] |= changes

    tamper(path, change)
    with pytest.raises(ValueError, match=message):
        load_packed(path)
