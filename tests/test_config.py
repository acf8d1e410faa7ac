"""Settings: presets, checks, conversion, TOML files."""

import dataclasses

import pytest

from fdda_fast.config import (
    QuantizeConfig,
    SynthesisConfig,
    from_dict,
    preset,
    read_toml,
    to_dict,
    write_toml,
)
from fdda_fast.quantization.bits import Bits


def test_reference_is_the_paper_to_the_letter():
    config = preset("reference")
    assert config == QuantizeConfig.reference()
    epoch = 200
    synthesis = config.synthesis
    assert synthesis.steps == 400 * epoch == config.warmup_steps + config.steps
    assert config.warmup_steps == 50 * epoch
    assert synthesis.lr_milestones == (100 * epoch, 200 * epoch, 300 * epoch)
    assert (synthesis.lr, synthesis.lr_decay, synthesis.betas) == (1e-3, 0.1, (0.5, 0.999))
    assert synthesis.ce_weight == 0.5
    assert synthesis.bns_weight == 0.2
    assert synthesis.class_ce_weight == 0.5
    assert synthesis.distorted_weight == 0.9
    assert synthesis.centralized_weight == 0.01
    assert synthesis.distortion_std == (0.5, 1.0)
    assert synthesis.any_class_steps == 5 * epoch
    assert synthesis.batch_size == 16
    assert (synthesis.classes_per_step, synthesis.images_per_class) == (1, 16)
    assert not synthesis.joint_pass
    assert not synthesis.whiten
    assert not synthesis.clamp_variance
    assert (config.lr, config.momentum, config.weight_decay) == (1e-6, 0.9, 1e-4)
    assert config.cosine_steps == 20_000
    assert (config.temperature, config.distillation_weight) == (20, 20)
    assert (config.ranges, config.range_steps) == ("reference", 4 * epoch)
    assert config.range_lr == 0
    assert config.placement == "paper"
    assert (config.real_batch, config.synthetic_batch) == (16, 16)
    assert config.real_crop == (0.08, 1.0)
    assert config.synthetic_crop == (0.5, 1.0)
    assert config.flip
    assert config.max_grad_norm == float("inf")
    assert not config.correct_batch_norms
    assert config.keep_float == ()


def test_presets():
    assert preset("fast") == QuantizeConfig()
    assert (preset("fast").method, preset("reference").method) == ("fdda+reconstruct", "fdda")
    assert preset("fast") != preset("reference")
    assert QuantizeConfig().placement == "full_integer"
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'quick'"):
        preset("quick")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SynthesisConfig, {"batch_size": 0}, r"batch_size must be >= 1, got 0"),
        (SynthesisConfig, {"classes_per_step": 0}, "classes_per_step must be >= 1"),
        (SynthesisConfig, {"images_per_class": -1}, "images_per_class must be >= 1"),
        (SynthesisConfig, {"steps": -1}, "steps must be >= 0"),
        (SynthesisConfig, {"seed": -1}, "seed must be >= 0"),
        (SynthesisConfig, {"any_class_steps": -1}, "any_class_steps must be >= 0"),
        (SynthesisConfig, {"lr": 0.0}, "lr must be > 0"),
        (SynthesisConfig, {"betas": (0.5,)}, "betas must be two numbers"),
        (QuantizeConfig, {"steps": -1}, "steps must be >= 0"),
        (QuantizeConfig, {"warmup_steps": -1}, "warmup_steps must be >= 0"),
        (QuantizeConfig, {"seed": -1}, "seed must be >= 0"),
        (QuantizeConfig, {"real_batch": 0, "synthetic_batch": 0}, "real_batch must be > 0 where"),
        (QuantizeConfig, {"ranges": "max"}, "ranges must be one of"),
        (QuantizeConfig, {"weight_ranges": "max"}, "weight_ranges must be one of"),
        (QuantizeConfig, {"range_images": "both"}, "range_images must be one of"),
        (QuantizeConfig, {"range_images": "real", "real_batch": 0}, "range_images must be of"),
        (QuantizeConfig, {"percentile": 50.0}, r"percentile must be in \(50, 100\]"),
        (QuantizeConfig, {"range_steps": 0}, "range_steps must be >= 1"),
        (QuantizeConfig, {"real_crop": (0.0, 1.0)}, "real_crop must be"),
        (QuantizeConfig, {"synthetic_crop": (0.9, 0.5)}, "synthetic_crop must be"),
        (QuantizeConfig, {"synthetic_crop": (0.5, 1.5)}, "synthetic_crop must be"),
        (QuantizeConfig, {"lr": -1.0}, "lr must be > 0"),
        (QuantizeConfig, {"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_values_out_of_range(kind, changes, message):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{message}"):
        kind(**changes)
    with pytest.raises(ValueError, match=message):
        kind().replace(**changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        from_dict(kind(), changes)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizeConfig().steps = 3


@pytest.mark.parametrize("name", ["fast", "reference"])
def test_to_dict_and_back_through_toml(tmp_path, name):
    config = preset(name).replace(keep_float=("a", "b"), seed=7)
    write_toml(tmp_path / "config.toml", to_dict(config))
    values = read_toml(tmp_path / "config.toml")
    assert from_dict(preset(name), values) == config
    assert from_dict(QuantizeConfig(), values) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_bits_through_toml(tmp_path):
    for bits in (Bits(3, 5, 8, {"layer.0": (2, 4)}), Bits(2, 2)):
        write_toml(tmp_path / "bits.toml", to_dict(bits))
        assert from_dict(Bits(), read_toml(tmp_path / "bits.toml")) == bits


def test_to_dict_is_plain():
    values = to_dict(QuantizeConfig())
    assert "cosine_steps" not in values  # None
    assert values["synthesis"]["betas"] == [0.5, 0.999]
    assert values["keep_float"] == []
    assert to_dict({"path": read_toml.__globals__["Path"]("a/b"), "n": (1, 2)}) == {
        "path": "a/b",
        "n": [1, 2],
    }


def test_from_dict_changes_only_what_is_named():
    config = from_dict(preset("reference"), {"lr": 1, "synthesis": {"steps": 5}})
    assert config.lr == 1.0
    assert isinstance(config.lr, float)
    expected = preset("reference").replace(
        lr=1.0, synthesis=SynthesisConfig.reference().replace(steps=5)
    )
    assert config == expected
    assert from_dict(QuantizeConfig(), {"cosine_steps": 9}).cosine_steps == 9
    assert from_dict(preset("reference"), {"max_grad_norm": 5.0}).max_grad_norm == 5.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 3}, "config: unknown setting 'stepps'"),
        ({"synthesis": {"rate": 3}}, r"config\.synthesis: unknown setting 'rate'"),
        ({"steps": 3.5}, r"config\.steps must be int"),
        ({"steps": True}, r"config\.steps must be"),
        ({"lr": "fast"}, r"config\.lr must be"),
        ({"lr": False}, r"config\.lr must be"),
        ({"flip": 1}, r"config\.flip must be bool"),
        ({"placement": 3}, r"config\.placement must be str"),
        ({"real_crop": 0.5}, r"config\.real_crop must be"),
        ({"cosine_steps": 1.5}, r"config\.cosine_steps must be int"),
        ({"synthesis": 3}, r"config\.synthesis must be"),
        ({"synthesis": {"lr_milestones": ["x"]}}, r"config\.synthesis\.lr_milestones"),
    ],
)
def test_from_dict_is_strict(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(QuantizeConfig(), values)


def test_toml_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_toml(tmp_path / "absent.toml")
    path = tmp_path / "bad.toml"
    for data in (b"a = ", b"\xff\xfe", b"[x\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML"):
            read_toml(path)
