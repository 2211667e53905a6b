"""Which engine a command line asks for, in the environment that a launcher has made."""

import pytest

from launch.distributed import check_one_gpu
from launch.engines import Engine, chosen_engine
from launch.errors import UserError

LAUNCHED = {"RANK": "0"}
FSDP_CONFIG, DEEPSPEED_CONFIG = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCHED, *FSDP_CONFIG, *DEEPSPEED_CONFIG):
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(*pair) for pair in values.items()]


@pytest.mark.parametrize(
    ("words", "values", "engine"),
    [
        ([], {}, Engine.ONE),
        ([], LAUNCHED, Engine.DDP),
        (["--deepspeed", "a.json"], LAUNCHED, Engine.DEEPSPEED),
        (["--deepspeed=a.json"], LAUNCHED, Engine.DEEPSPEED),
        ([], LAUNCHED | DEEPSPEED_CONFIG, Engine.DEEPSPEED),
        (["--deepspeed", "a.json"], LAUNCHED | DEEPSPEED_CONFIG, Engine.DEEPSPEED),
        (["--fsdp"], LAUNCHED, Engine.FSDP2),
        (["--fsdp", "--rank", "8"], LAUNCHED, Engine.FSDP2),
        (["--fsdp", "full_shard auto_wrap"], LAUNCHED, Engine.FSDP2),
        ([], LAUNCHED | FSDP_CONFIG, Engine.FSDP2),
        (["--fsdp_config", "{}"], LAUNCHED, Engine.DDP),
    ],
)
def test_the_engine(environment, words, values, engine):
    environment(values)
    assert chosen_engine(words) is engine


@pytest.mark.parametrize(
    ("words", "values", "message"),
    [
        (["--deepspeed", "a.json"], {}, "Use `deepspeed launch/train.py"),
        (["--fsdp"], {}, "Use `torchrun --nproc_per_node N launch/train.py --fsdp"),
        (["--fsdp", "--deepspeed", "a.json"], LAUNCHED, "--deepspeed and --fsdp are both given. Keep one"),
        (["--fsdp"], LAUNCHED | DEEPSPEED_CONFIG, "--fsdp and the DeepSpeed config of accelerate launch are both"),
        (["--fsdp"], LAUNCHED | FSDP_CONFIG, "--fsdp and the FSDP config of accelerate launch are both given"),
    ],
)
def test_what_cannot_be_says_what_can(environment, words, values, message):
    environment(values)
    with pytest.raises(UserError, match=message):
        chosen_engine(words)


def test_one_process_takes_one_gpu():
    check_one_gpu(0), check_one_gpu(1)
    with pytest.raises(UserError, match="One process, and 4 GPUs. `torchrun --nproc_per_node 4"):
        check_one_gpu(4)
