"""What happens when ds_mofa meets DeepSpeed, before any engine."""

import warnings

import pytest
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_mofa.backends.deepspeed import register
from ds_mofa.backends.deepspeed.registration import warn_if_untested


@pytest.mark.parametrize("version", ["0.19.8", "0.19.8+cpu", "0.19.8.post1"])
def test_tested_versions_pass_in_silence(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0"])
def test_other_versions_get_a_warning_that_names_the_range(version):
    with pytest.warns(UserWarning, match=rf"0\.19\.8 to 0\.19\.8, this is {version}"):
        warn_if_untested(version)


def test_registering_twice_wraps_once():
    before = DeepSpeedEngine.save_checkpoint
    register()
    assert DeepSpeedEngine.save_checkpoint is before
    assert DEEPSPEED_OPTIMIZERS.count("mofasgd") == DEEPSPEED_OPTIMIZERS.count("galore") == 1
