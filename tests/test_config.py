from dataclasses import dataclass, field
from pathlib import Path

import pytest

from languagebind import configs
from languagebind.config import UserError, expand_config, from_dict, parse, take_flag, to_dict, yaml_to_argv


@dataclass(frozen=True)
class Inner:
    lr: float = 1.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    fast: bool = False
    path: Path | None = None
    steps: int = 3


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("inner:\n  lr: 5e-4\n  names: [a, 'on']\nfast: true\nsteps: 3_000\n")
    return path


def test_a_file_is_a_saved_command_line(config_file):
    assert yaml_to_argv(config_file) == ["--lr=5e-4", "--names", "a", "on", "--fast", "--steps=3_000"]


def test_values_are_typed_by_the_dataclass_and_the_last_flag_wins(config_file):
    config = parse(Outer, expand_config(["--config", str(config_file), "--lr", "0.25", "--no-fast"]))
    assert config == Outer(Inner(0.25, ("a", "on")), fast=False, steps=3000)


def test_an_unknown_key_ends_with_the_nearest_name(tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text("stepss: 4\n")
    with pytest.raises(SystemExit) as ended:
        parse(Outer, expand_config([f"--config={tmp_path / 'typo.yaml'}"]))
    assert ended.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), ("a: [", "not valid YAML"), ("- a", "key: value")]
)
def test_an_unusable_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        yaml_to_argv(path)
    assert "bad.yaml" in str(raised.value)


def test_take_flag():
    assert take_flag(["--a", "1", "--b=2", "--a=3"], "--a") == (["1", "3"], ["--b=2"])
    with pytest.raises(UserError, match="--a needs a value"):
        take_flag(["--a"], "--a")


def test_a_config_survives_being_written_down():
    config = Outer(Inner(0.5, ("x",)), path=Path("a/b"))
    values = to_dict(config)
    assert values == {"inner": {"lr": 0.5, "names": ["x"]}, "fast": False, "path": "a/b", "steps": 3}
    assert from_dict(Inner, values["inner"]) == Inner(0.5, ("x",))
    with pytest.raises(UserError, match="lrr"):
        from_dict(Inner, {"lrr": 1})


def test_a_flag_that_is_not_known_gets_the_nearest_names_and_its_file(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("inner:\n  learning_rate: 1e-3\n")
    for argv, expected in {
        (f"--config={tmp_path / 'my.yaml'}",): "my.yaml: no option 'learning_rate'; the nearest are --lr",
        ("--qqqq=1",): "error: no option 'qqqq'; the nearest are --",
        ("--no-fas",): "the nearest are --fast",
        ("--step", "4"): "error: no option 'step'; the nearest are --steps",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            parse(Outer, expand_config(argv))
        assert expected in capsys.readouterr().err
    assert parse(Outer, ["--no-fast", "--steps", "7"]).steps == 7


def test_a_config_of_another_kind_is_named():
    with pytest.raises(UserError, match=r"no dataset 'depth'.* depth is a recipe: .*training.main --config depth"):
        configs.find("depth", "dataset")
