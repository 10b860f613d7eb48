"""Settings from flags and YAML, and what the command line says where they are wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge import __version__, cli, config
from specforge.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMMANDS = {command.name for command in cli.app.registered_commands if command.name} | {
    f"{group} {command.name}" for group, app in cli.GROUPS.items() for command in app.registered_commands
}
SETTINGS = cli.SETTINGS


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def said(found):
    """One error message with where and fix, and nothing else."""
    assert found.exit_code == 2, found.output
    assert found.output.count("error ") == 1
    assert "where:" in found.output
    assert "fix:" in found.output
    assert "Traceback" not in found.output
    return found.output


def yaml_file(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# YAML


def test_an_unknown_key_in_yaml_is_refused_by_name(tmp_path):
    path = yaml_file(tmp_path, "lr: 0.001\nlearning_rate: 0.1\n")
    with pytest.raises(ConfigError) as refused:
        config.load(config.TrainSettings, {}, path)
    assert "'learning_rate'" in refused.value.where
    assert str(path) in refused.value.where
    output = said(run("train", "--config", path))
    assert "learning_rate" in output
    assert str(path) in output


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("lr: -1", "lr"),
        ("lr: fast", "lr"),
        ("steps: 17", "steps"),
        ("steps: 1.5", "steps"),
        ("aux_layers: [1, two, 3]", "aux_layers"),
        ("engine: vllm", "engine"),
        ("online: perhaps", "online"),
    ],
)
def test_a_bad_value_in_yaml_names_the_file_and_the_key(tmp_path, line, key):
    path = yaml_file(tmp_path, line + "\n")
    with pytest.raises(ConfigError) as refused:
        config.load(config.TrainSettings, {}, path)
    assert str(path) in refused.value.where
    assert f"'{key}" in refused.value.where


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"text", b"a: [1\n", b"\xff\xfe\x00binary", b"1: 2\n", b"null: 2\n", b"lr: 1\n\tsteps: 2\n"],
)
def test_a_file_that_is_no_yaml_mapping_of_names(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        config.load(config.TrainSettings, {}, path)
    assert str(path) in refused.value.where


def test_a_file_that_is_not_there(tmp_path):
    assert "none.yaml" in said(run("train", "--config", tmp_path / "none.yaml"))
    assert str(tmp_path) in said(run("train", "--config", tmp_path))


def test_flags_override_yaml_and_yaml_the_defaults(tmp_path):
    path = yaml_file(tmp_path, "lr: 0.5\nsteps: 3\nresume: false\naux_layers: [1, 2, 3]\noutput: from/yaml\n")
    chosen = config.load(config.TrainSettings, {"steps": 5}, path)
    assert (chosen.lr, chosen.steps, chosen.resume, chosen.epochs) == (0.5, 5, False, 10)
    assert chosen.aux_layers == (1, 2, 3)
    assert chosen.output == Path("from/yaml")
    assert config.load(config.TrainSettings, {}, yaml_file(tmp_path, "")) == config.TrainSettings()


def test_flags_override_yaml_on_the_command_line(tmp_path):
    """A flag mends what the file has wrong; without it the file's value is what is refused."""
    path = yaml_file(tmp_path, f"dataset: {tmp_path}/from_yaml.jsonl\ntest_share: 7\n")
    assert "test_share" in said(run("prepare-data", "--config", path))
    output = said(run("prepare-data", "--config", path, "--test-share", "0.1"))
    assert "from_yaml.jsonl" in output
    output = said(run("prepare-data", "--config", path, "--test-share", "0.1", "--dataset", tmp_path / "flag.jsonl"))
    assert "flag.jsonl" in output
    assert "from_yaml" not in output


def test_a_switch_can_be_turned_off_against_yaml(monkeypatch):
    """`--no-resume` and its like: every switch that YAML can turn on must have a flag that turns it off."""
    monkeypatch.setenv("COLUMNS", "400")
    for name, settings in SETTINGS.items():
        for key, field in settings.model_fields.items():
            if field.annotation is bool:
                flag = key.replace("_", "-")
                helped = run(*name.split(), "--help").output
                assert re.search(rf"--no-{flag}\b", helped), f"{name} --no-{flag}"


# Flags


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("train", "--lr", "0"),
        ("train", "--steps", "0"),
        ("train", "--steps", "17"),
        ("train", "--tp-size", "0"),
        ("train", "--mem-frac", "1"),
        ("train", "--warmup-share", "1"),
        ("train", "--warmup-share", "-0.1"),
        ("train", "--step-decay", "1.1"),
        ("train", "--max-length", "7"),
        ("train", "--aux-layers", "1 2 x"),
        ("train", "--lr", "nan"),
        ("train", "--lr", "inf"),
        ("train", "--lr", "2"),
        ("train", "--lr", "fast"),
        ("train", "--adam-lr", "-1e-3"),
        ("train", "--batch-size", "0"),
        ("train", "--row-tokens", "7"),
        ("prepare-data", "--test-share", "1"),
        ("prepare-hidden", "--shard-mb", "0"),
        ("prepare-hidden", "--num-samples", "0"),
        ("prepare-hidden", "--max-disk", "much"),
        ("benchmark", "--num-prompts", "-1"),
        ("regenerate", "--concurrency", "0"),
    ],
)
def test_a_value_out_of_range_is_one_message_that_names_the_flag(tmp_path, monkeypatch, command, flag, value):
    monkeypatch.chdir(tmp_path)
    required = {
        "train": [],
        "prepare-data": ["--dataset", "a.jsonl"],
        "prepare-hidden": ["--model-path", "t"],
        "benchmark": ["--model-path", "t", "--draft", "d"],
        "regenerate": ["--model-path", "t", "--prompts", "p", "--output", "o"],
    }
    output = said(run(command, *required[command], flag, value))
    assert re.search(rf"where: {flag}\b", output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["prepare-data", "prepare-hidden", "regenerate"])
def test_what_is_required_is_asked_for_by_its_flag(command):
    output = said(run(command))
    missing = re.search(r"where: --([a-z-]+)", output)
    assert missing
    assert SETTINGS[command].model_fields[missing.group(1).replace("-", "_")].is_required()


@pytest.mark.parametrize("arguments", [("train", "--lerning-rate", "1"), ("trian",), ("train", "--steps", "many")])
def test_what_cannot_be_parsed_ends_with_code_2(arguments):
    found = run(*arguments)
    assert found.exit_code == 2
    assert "Traceback" not in found.output


# Help


def test_every_command_is_there():
    assert {*SETTINGS, "version"} == COMMANDS | {"version"}
    assert run("version").output.strip() == __version__
    helped = run("--help")
    assert helped.exit_code == 0
    for name in SETTINGS:
        group, *_ = name.split()
        assert group in helped.output
        assert name.split()[-1] in (helped if group == name else run(group, "--help")).output


@pytest.mark.parametrize("name", SETTINGS)
def test_help_names_every_setting_with_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    found = run(*name.split(), "--help")
    assert found.exit_code == 0
    shown = re.sub(r"\s+", " ", found.output)
    for key, field in SETTINGS[name].model_fields.items():
        assert (key.upper() if key in config.POSITIONAL else "--" + key.replace("_", "-")) in shown
        if field.is_required():
            assert "required" in shown
        elif field.default not in (None, True, False):
            assert re.search(rf"default: {re.escape(str(field.default))}[])]", shown), key


def test_help_imports_no_torch():
    """In a process of its own, all helps one after the other."""
    code = """
import sys, runpy
for arguments in [["--help"], ["version"], *([*name.split(), "--help"] for name in NAMES)]:
    sys.argv = ["specforge", *arguments]
    try:
        runpy.run_module("specforge.cli", run_name="__main__")
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    sys.modules.pop("specforge.cli", None)
heavy = {"torch", "transformers", "numpy", "sglang", "deepspeed", "datasets"} & set(sys.modules)
print("HEAVY", sorted(heavy))
""".replace("NAMES", repr(list(SETTINGS)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "HEAVY []"
