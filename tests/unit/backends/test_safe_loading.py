"""DeepSpeed's files are read without running what they say, whichever Python has written them."""

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_mofa.backends.deepspeed.checkpoints import CheckpointError, load


class Asked:
    """Pickled as ``getattr(kind, name)``."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_stage_as_python_before_3_11_4_pickles_it(tmp_path):
    torch.save({"zero_stage": Asked(ZeroStageEnum, "gradients")}, tmp_path / "old.pt")
    assert load(tmp_path / "old.pt") == {"zero_stage": ZeroStageEnum.gradients}
    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "own.pt")
    assert load(tmp_path / "own.pt") == {"zero_stage": ZeroStageEnum.weights}


@pytest.mark.parametrize(("kind", "name"), [(fragment_address, "__init__"), (ZeroStageEnum, "__init__")])
def test_an_attribute_of_something_else_is_refused(tmp_path, kind, name):
    torch.save({"zero_stage": Asked(kind, name)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="holds objects beside tensors"):
        load(tmp_path / "bad.pt")
