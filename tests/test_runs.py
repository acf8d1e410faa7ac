"""Run folders: what may be written where, resuming, metrics."""

import pytest
import torch

from fdda_fast.config import QuantizeConfig
from fdda_fast.quantization.bits import Bits
from fdda_fast.runs import MetricsFile, RunFolder, display, environment, load_quantized, read_config

SETTINGS = {"seed": 0, "table": {"a": 1}, "absent": None}


def begun(path, **settings):
    run = RunFolder(path, "centers", {**SETTINGS, **settings})
    run.begin()
    return run


def test_nothing_is_written_before_begin(tmp_path):
    RunFolder(tmp_path / "new", "centers", SETTINGS)
    assert not (tmp_path / "new").exists()
    begun(tmp_path / "deep" / "new")
    names = sorted(p.name for p in (tmp_path / "deep" / "new").iterdir())
    assert names == ["config.toml", "environment.toml"]


def test_an_empty_folder_is_taken(tmp_path):
    assert not begun(tmp_path).finished


def test_config_is_read_back(tmp_path):
    begun(tmp_path / "run", names=("x", "y"))
    config = read_config(tmp_path / "run", "centers")
    assert (config["names"], config["seed"]) == (["x", "y"], 0)


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda p: (p / "notes.txt").write_text("mine"), {}, "not a run folder"),
        (lambda p: (p / "config.toml").write_text("a = 1"), {}, "not a run folder"),
        (lambda p: (p / "config.toml").write_text("a ="), {}, "not valid TOML"),
        (lambda p: begun(p), {}, "unfinished run; --resume"),
        (lambda p: begun(p).result.touch(), {}, "finished run"),
        (lambda p: begun(p, seed=1), {"resume": True}, "seed was 1, now 0"),
        (lambda p: begun(p, table={"a": 2}), {"resume": True}, "table.a was 2, now 1"),
        (lambda p: begun(p, extra="x"), {"resume": True}, "extra was 'x', now not set"),
    ],
)
def test_what_else_the_folder_holds_is_left_alone(tmp_path, prepare, arguments, message):
    prepare(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path, "centers", SETTINGS, **arguments)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("arguments", [{}, {"resume": True}, {"overwrite": True}])
def test_another_commands_run_is_never_touched(tmp_path, arguments):
    begun(tmp_path)
    with pytest.raises(ValueError, match="holds a 'centers' run"):
        RunFolder(tmp_path, "demo", SETTINGS, **arguments)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "file", "centers", SETTINGS)


def test_same_settings_are_resumed(tmp_path):
    begun(tmp_path).result.touch()
    assert RunFolder(tmp_path, "centers", SETTINGS, resume=True).finished


def test_resume_in_another_environment_is_told(tmp_path, monkeypatch, capsys):
    begun(tmp_path)
    there = {**environment(), "isa": "another"}
    monkeypatch.setattr("fdda_fast.runs.environment", lambda: there)
    RunFolder(tmp_path, "centers", SETTINGS, resume=True).begin()
    assert "now 'another'" in capsys.readouterr().err


def write_steps(path, steps, names=lambda step: ("loss",)):
    metrics_file = MetricsFile(path)
    for step in steps:
        metrics_file.append(step, {name: step / 4 for name in names(step)})
    metrics_file.close()


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    write_steps(tmp_path / "a.csv", range(1, 11))
    write_steps(tmp_path / "b.csv", range(1, 9))
    with (tmp_path / "b.csv").open("a") as file:
        file.write("9")  # the process was killed while it wrote
    write_steps(tmp_path / "b.csv", range(5, 11))
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize("reached", [2, 4, 7])
def test_a_column_that_comes_later(tmp_path, reached):
    def names(step):
        return ("loss",) if step < 5 else ("loss", "student_loss")

    write_steps(tmp_path / "a.csv", range(1, 9), names)
    write_steps(tmp_path / "b.csv", range(1, reached + 1), names)
    write_steps(tmp_path / "b.csv", range(3, 9), names)
    text = (tmp_path / "a.csv").read_text()
    assert text.splitlines()[:2] == ["step,loss,student_loss", "1,0.25,"]
    assert (tmp_path / "b.csv").read_text() == text


def test_rows_are_on_disk_at_once(tmp_path):
    metrics_file = MetricsFile(tmp_path / "m.csv")
    metrics_file.append(1, {"loss": 1.0})
    assert (tmp_path / "m.csv").read_text() == "step,loss\n1,1\n"
    metrics_file.close()


def test_progress_in_a_log_file(capsys):
    with display("train") as progress:
        for step in range(1, 4):
            progress(step, 3, {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train 3/3")
    assert lines[0].endswith("loss=0.5")


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with display("train") as progress:
        for step in range(7, 11):  # resumed at 7
            progress(step, 10, {"loss": 0.5})
    assert "10/10" in capsys.readouterr().err


def test_load_quantized_speaks_of_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        load_quantized(tmp_path / "none")
    begun(tmp_path / "centers")
    with pytest.raises(ValueError, match="not a 'quantize' run"):
        load_quantized(tmp_path / "centers")
    settings = {
        "teacher": {"model": "digits-resnet8"}, "data": {"source": "digits"},
        "preprocessing": {"resize": 8}, "bits": Bits(), "quantize": QuantizeConfig(),
    }  # fmt: skip
    RunFolder(tmp_path / "unfinished", "quantize", settings).begin()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_quantized(tmp_path / "unfinished")
    RunFolder(tmp_path / "poor", "quantize", {**settings, "teacher": {}}).begin()
    with pytest.raises(ValueError, match=r"without \['teacher.model'\]"):
        load_quantized(tmp_path / "poor")


def test_environment_names_versions_and_threads():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
