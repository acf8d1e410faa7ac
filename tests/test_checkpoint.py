"""Tensor files: round trip, atomic writing, damage."""

import pytest
import torch
from safetensors.torch import save_file

from fdda_fast import checkpoint
from fdda_fast.checkpoint import load_tensors, save_tensors

TENSORS = {
    "float": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(5).bfloat16(),
    "int": torch.arange(6).reshape(2, 3),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}
METADATA = {"format": "test 1", "shape": '{"a": [1, 2]}', "name": "größer"}


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b" / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_views_and_parameters(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    tensors = {"transposed": x.T, "parameter": torch.nn.Parameter(x + 1)}
    save_tensors(tmp_path / "f", tensors, {})
    loaded, metadata = load_tensors(tmp_path / "f")
    assert metadata == {}
    assert torch.equal(loaded["transposed"], x.T)
    assert torch.equal(loaded["parameter"], x + 1)


def test_equal_contents_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_tensors(tmp_path / name, TENSORS, METADATA)
    save_tensors(tmp_path / "c", TENSORS, dict(reversed(METADATA.items())))
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    save_tensors(tmp_path / "d", TENSORS, {**METADATA, "name": "x"})
    assert first != (tmp_path / "d").read_bytes()


def test_replacing_a_file(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, {"x": torch.zeros(2)}, {})
    save_tensors(path, {"x": torch.ones(2)}, {})
    assert load_tensors(path)[0]["x"].tolist() == [1, 1]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    save_tensors(path, {"x": torch.zeros(2)}, {"n": "1"})

    def full(target, data):
        with target.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"x": torch.ones(2)}, {"n": "2"})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert load_tensors(path)[1] == {"n": "1"}


def test_files_of_other_programs(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "plain")
    assert load_tensors(tmp_path / "plain")[1] == {}
    save_file({"x": torch.ones(2)}, tmp_path / "noted", {"format": "pt", "made": "by hand"})
    tensors, metadata = load_tensors(tmp_path / "noted")
    assert tensors["x"].tolist() == [1, 1]
    assert metadata == {"format": "pt", "made": "by hand"}


def test_damage(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, TENSORS, METADATA)
    data = path.read_bytes()
    wrong_header = data[:8] + b"X" + data[9:]
    for damaged in (b"", data[:7], data[:100], data[:-1], data + b"\0", wrong_header, b"text" * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            load_tensors(path)


def test_missing(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_tensors(path)
