"""What happens when ds_mofa meets DeepSpeed, before any engine."""

import warnings
from types import SimpleNamespace

import pytest
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_mofa import OptionError
from ds_mofa.backends.deepspeed import register, versions


@pytest.mark.parametrize("version", ["0.18.6", "0.19.0", "0.19.8", "0.19.8+cpu", "0.19.8.post1"])
def test_tested_versions_pass_in_silence(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested(version)
    assert versions.problem(version) is None


@pytest.mark.parametrize("version", ["0.19.9", "0.20.0", "1.0"])
def test_newer_versions_get_a_warning_that_names_the_range(version):
    with pytest.warns(UserWarning, match=rf"0\.18\.6 to 0\.19\.8, this is {version}"):
        versions.warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.18.5", "0.9.0", "0.18.5+cu12"])
def test_of_older_versions_the_found_and_the_wanted_one_are_said(version):
    assert f"this is DeepSpeed {version}, and ds_mofa works with 0.18.6 to 0.19.8" in versions.problem(version)


def test_what_is_refused_is_refused_where_it_is_used(monkeypatch):
    checked = []
    monkeypatch.setattr(DeepSpeedEngine, "_do_sanity_check", checked.append)
    versions.refuse_when_used("too old")
    ours, other = (SimpleNamespace(optimizer_name=lambda name=name: name) for name in ("mofasgd", "adamw"))
    DeepSpeedEngine._do_sanity_check(other)
    assert checked == [other]
    with pytest.raises(OptionError, match='"type": "MoFaSGD": too old'):
        DeepSpeedEngine._do_sanity_check(ours)
    assert checked == [other]


def test_registering_twice_wraps_once():
    before = DeepSpeedEngine.save_checkpoint
    register()
    assert DeepSpeedEngine.save_checkpoint is before
    assert DEEPSPEED_OPTIMIZERS.count("mofasgd") == DEEPSPEED_OPTIMIZERS.count("galore") == 1
