"""--help fits on a screen, at once, and says what is so; --help_all is the parser's."""

import re
import subprocess
import sys

from ds_mofa.optimizers import registry
from launch.arguments import make_parser
from launch.help import ALL, HELP
from launch.named_optimizer import ADAMW
from tests.launch.commands import ROOT, command_environment

OPTIONS = re.findall(r"--[a-z_0-9]+", HELP)
OF_LAUNCHERS = {"--gpus", "--log_level", ALL}  # of ds-mofa train, of deepspeed, and the page itself


def test_it_fits_on_a_screen():
    lines = HELP.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 119
    assert HELP.count("ds-mofa train --") >= 3  # examples


def test_every_option_in_it_is_one():
    assert len(set(OPTIONS)) > 20
    assert set(OPTIONS) - OF_LAUNCHERS - {"--help"} <= make_parser()._option_string_actions.keys()


def test_every_default_in_it_is_one():
    parser = make_parser()
    found = re.findall(r"^  (--\S+) .*\((\S+)\)$", HELP, flags=re.MULTILINE)
    assert len(found) > 8
    for option, default in found:
        action = parser._option_string_actions[option]
        value = getattr(action.default, "value", action.default)
        assert str(value).removesuffix(".0") == default, option


def test_every_optimizer_is_in_it():
    # Other tests of this process may have registered their own.
    shipped = [name for name, entry in registry.OPTIMIZERS.items() if entry.optimizer.__module__.startswith("ds_mofa.")]
    assert f"MoFaSGD, {', '.join(name for name in shipped if name != 'MoFaSGD')}, {ADAMW}" in HELP and len(shipped) > 1


def test_the_command_prints_it_and_imports_nothing_for_it(tmp_path):
    script = str(ROOT / "launch/train.py")
    words = [sys.executable, "-X", "importtime", script, "--train_file", "a", "--help"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, env=command_environment(tmp_path))
    assert (ran.returncode, ran.stdout) == (0, HELP)
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines()}
    assert "launch.help" in imported and not imported & {"torch", "transformers", "deepspeed"}


def test_the_whole_list_is_the_parser_s(capsys, monkeypatch):
    from launch.train import main

    monkeypatch.delenv("RANK", raising=False)
    main([ALL])
    printed = capsys.readouterr().out
    assert "--gradient_checkpointing_kwargs" in printed and "--optimizer_args" in printed
