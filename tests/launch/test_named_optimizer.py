"""The optimizer of the command line: its name, its options, and how Hugging Face's flags join them."""

from types import SimpleNamespace

import pytest
import torch

from ds_mofa import GaLore
from ds_mofa.optimizers import registry
from launch.errors import UserError
from launch.named_optimizer import named_optimizer, trainer_s_optimizer

FLAGS = dict(learning_rate=5e-4, weight_decay=0.25, adam_beta1=0.125, adam_beta2=0.75, adam_epsilon=1e-6)


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_each_of_the_registry_takes_the_flags(name):
    named = named_optimizer(["--optimizer", name.upper(), "--rank", "4"])
    assert named.defaults()["learning_rate"] == registry.OPTIMIZERS[name].learning_rate
    options, _ = registry.OPTIMIZERS[name].options.from_config(named.options(SimpleNamespace(**FLAGS)))
    assert (options.rank, options.lr, options.weight_decay) == (4, 5e-4, 0.25)
    assert (list(options.adamw_betas), options.adamw_eps) == ([0.125, 0.75], 1e-6)
    for moments in ("betas", "eps"):  # a rule that has its own has the flags'
        assert getattr(options, moments, getattr(options, f"adamw_{moments}")) == getattr(options, f"adamw_{moments}")


def test_what_the_optimizer_fixes_is_the_flags_default():
    words = ["--optimizer", "MoFaSGD", "--optimizer_args", '{"betas": [0.5, 0.6], "lr": 1.25e-3, "adamw_lr": 1e-3}']
    named = named_optimizer(words)
    assert named.defaults() == {
        "learning_rate": 1.25e-3, "weight_decay": 0.0, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-8,
    }  # fmt: skip
    with pytest.raises(UserError, match='"adamw_betas" is .0.5, 0.6. there, and --adam_beta1 --adam_beta2 says'):
        named.options(SimpleNamespace(**FLAGS | {"learning_rate": 1.25e-3}))


def test_options_may_stand_in_a_file(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"rank": 4, "explore": 2}')
    assert named_optimizer(["--optimizer", "MoFaSGD", "--optimizer_args", str(file)]).given == {"rank": 4, "explore": 2}


@pytest.mark.parametrize("words", [["--optimizer", "adamw"], ["--optim", "sgd"]])
def test_hugging_face_makes_the_others(words):
    named = named_optimizer(words)
    assert named.options(SimpleNamespace(**FLAGS)) is None
    assert trainer_s_optimizer(SimpleNamespace(optimizer_options=None)) is None
    assert named.defaults() == {"learning_rate": 2e-5}


def test_the_trainer_gets_what_makes_the_optimizer():
    args = SimpleNamespace(optimizer="galore", optimizer_options={"lr": 0.5, "rank": 2})
    factory, options = trainer_s_optimizer(args)
    optimizer = factory()(torch.nn.Linear(6, 6), **options)
    assert type(optimizer) is GaLore and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing says which optimizer to train with. Give --optimizer MoFaSGD"),
        (["--rank", "8"], "Nothing says which optimizer"),
        (["--optim", "sgd", "--rank", "8"], "--rank: without --optimizer"),
        (["--optimizer", "MoFaSDG"], "no such optimizer; did you mean MoFaSGD"),
        (["--optimizer", "Lion"], "no such optimizer. There are .*--optim names Hugging Face's"),
        (["--optimizer", "MoFaSGD", "--optim", "sgd"], "both given. Keep one"),
        (["--optimizer", "AdamW", "--rank", "8"], "--rank: AdamW has no such option"),
        (["--optimizer", "MoFaSGD", "--rank", "0"], "--optimizer MoFaSGD: rank=0 must be"),
        (["--optimizer", "MoFaSGD", "--rank", "many"], "--rank many: it must be a whole number"),
        (["--optimizer", "MoFaSGD", "--rank"], "each take one value"),
        (["--optimizer", "MoFaSGD", "--rank", "8", "--optimizer_args", '{"rank": 4}'], '"rank" is 4 there'),
        (["--optimizer", "MoFaSGD", "--optimizer_args", "{explore: 4}"], "--optimizer_args: not valid JSON"),
        (["--optimizer", "MoFaSGD", "--optimizer_args", "explore=4"], "it must be a JSON object"),
        (["--optimizer", "MoFaSGD", "--optimizer_args", "nowhere.json"], "nowhere.json: no such file"),
        (["--optimizer", "MoFaSGD", "--optimizer_args", '{"explor": 4}'], "unknown option 'explor'.*'explore'"),
        (["--optimizer", "MoFaSGD", "--optimizer_args", '{"lr": "auto"}'], 'lr="auto"'),
    ],
)
def test_a_mistake_is_named_with_the_way_out(words, message):
    with pytest.raises(UserError, match=message):
        named_optimizer(words)
