"""What cannot work ends before the first step, with a message that says what is wrong, where, and what to do.

One table: each row does what a user might do, for real (DeepSpeed's ``initialize``, the optimizer's constructor, or the
whole training command), and has a regular expression for the message.
"""

# ruff: noqa: E501  rows of a table

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from launching import on_ranks
from torch import nn
from toys import Toy
from training import config, toy

import ds_mofa

NVME = {"device": "nvme", "nvme_path": "."}


class AllMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(16, 16, bias=False)


class NoMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.norm = nn.LayerNorm(16)


class Experts(Toy):
    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.experts = MoE(35, nn.Linear(35, 35), num_experts=1)


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.up.weight = nn.Parameter(torch.randn(16, 16).T)


def pipeline() -> PipelineModule:
    return PipelineModule(layers=[nn.Linear(35, 35), nn.Linear(35, 35)], num_stages=1, loss_fn=nn.MSELoss())


# ------------------------------------------------------------------ the three ways in; each returns what to do


def engine(settings: dict, model: Callable[[], nn.Module] = toy, **section) -> Callable[[], Any]:
    """``deepspeed.initialize``; ``section`` is merged into the JSON's "optimizer"."""
    settings = {**settings, "optimizer": {**settings["optimizer"], **section}}

    def do():
        built = model()
        deepspeed.initialize(model=built, model_parameters=built.parameters(), config=settings)

    return do


def options(**params) -> Callable[[], Any]:
    return engine(config(2, options=params))


def eight_bit(stage: int, **rest) -> Callable[[], Any]:
    settings = config(stage, options={"adamw_states": "8bit"}, **rest)
    del settings["optimizer"]["params"]["torch_adam"]
    return engine(settings)


def optimizer(params: Callable[[nn.Module], Any] = lambda model: model, model=toy, **settings) -> Callable[[], Any]:
    """``ds_mofa.MoFaSGD`` in a plain PyTorch loop."""

    def do():
        built = model()
        ds_mofa.MoFaSGD(params(built), **settings)

    return do


SHAPE = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
JSON = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "MoFaSGD", "params": {"lr": "auto", "rank": 4, "torch_adam": True}},
}
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


def command(
    *words: str,
    ds: Any = None,
    optimizer: Any = None,
    params: Any = None,
    shape: dict | None = None,
    data: str | bytes | None = None,
    name: str = "train.txt",
    before: Callable[[], None] = lambda: None,
) -> Callable[[], Any]:
    """``deepspeed launch/train.py``, in a folder with what it needs, of which something is wrong.

    Args:
        words: of the command line.
        ds: merged into the DeepSpeed JSON, or the text of the file.
        optimizer: merged into its "optimizer"; or in its place, if it is no object.
        params: likewise for its "params".
        shape: merged into the model's shape.
        data: of the training file.
        name: of the training file.
        before: what else to do.
    """

    def do():
        from launch.train import main

        section = merged(JSON["optimizer"], {"params": merged(JSON["optimizer"]["params"], params)})
        section = merged(section, optimizer)
        text = ds if isinstance(ds, str) else json.dumps({**JSON, "optimizer": section, **(ds or {})})
        Path("ds.json").write_text(text)
        Path("shape.json").write_text(json.dumps({**SHAPE, **(shape or {})}))
        content = "the quick brown fox " * 40 if data is None else data
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        before()
        given = list(words)
        for option, value in (("--deepspeed", "ds.json"), ("--model_config", "shape.json"), ("--train_file", name)):
            if option not in given and not (option == "--model_config" and "--model_name_or_path" in given):
                given += [option, value]
        given += ["--max_length", "16", "--max_steps", "2", "--use_cpu", "--disable_tqdm", "true"]
        if "--output_dir" not in given:
            given += ["--output_dir", "out"]
        main(given)

    return do


def merged(ours: dict, theirs: Any) -> Any:
    """``theirs`` over ``ours``; alone, if it is no object."""
    return {**ours, **(theirs or {})} if isinstance(theirs or {}, dict) else theirs


def tokenizer_folder(**special_tokens) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "</s>": 2}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges=[])), **special_tokens)
    made.save_pretrained("tokenizer")


def nearly_full() -> None:
    """The device says so; the test's folder goes with the case."""
    import shutil

    usage = shutil.disk_usage(".")
    patch = mock.patch("shutil.disk_usage", lambda path: usage._replace(free=100))
    patch.start()
    PATCHES.append(patch)


PATCHES: list = []  # undone after the case

# id: (what is done, a regular expression for the message), by subject
CASES: dict[str, dict[str, tuple[Callable[[], Any], str]]] = {
    "options": {
        "unknown option": (options(rnak=4), "unknown option 'rnak' of MoFaSGD; did you mean 'rank'.*The options are"),
        "unknown option without a likeness": (options(zzz=4), "unknown option 'zzz' of MoFaSGD The options are .*rank"),
        "option of another optimizer": (options(momentum=0.9), "unknown option 'momentum'.*The options are"),
        "option given twice": (
            options(betas=[0.9, 0.95], adamw_betas=[0.9, 0.95]),
            "'adamw_betas' are the same option.*give one",
        ),
        "auto outside of the Trainer": (options(lr="auto"), 'lr="auto" was not filled in.*Write a value'),
        "lr is a string": (options(lr="6e-3"), "lr='6e-3' must be a number > 0"),
        "lr is zero": (options(lr=0), "lr=0 must be > 0"),
        "lr is NaN": (options(lr=float("nan")), "lr=nan must be > 0"),
        "lr of an earlier version": (
            options(lr=6e-3),
            "lr=0.006 is far above AdamW's rates.*write lr=0.0012, adamw_lr=0.0006",
        ),
        "lr of 400 digits": (options(lr=10**400), "lr has 401 digits and must be a number > 0"),
        "rank 0": (options(rank=0), "rank=0 must be a whole number >= 1"),
        "rank is a float": (options(rank=8.0), "rank=8.0 must be a whole number >= 1"),
        "rank larger than every matrix": (
            options(rank=64),
            "no matrix to train.*at least 64 x 64.*Set rank to at most 35",
        ),
        "beta is 1": (options(beta=1), "beta=1 must be >= 0 and < 1"),
        "betas is one number": (options(betas=0.9), "adamw_betas=0.9 must be two numbers, such as"),
        "a flag in quotes": (options(master_weights="false"), "master_weights='false' must be true or false"),
        "a flag of DeepSpeed's in quotes": (options(torch_adam="false"), "torch_adam='false' must be true or false"),
        "misspelt choice": (
            options(rounding="stochstic"),
            "rounding='stochstic' must be one of 'stochastic', 'nearest'",
        ),
        "a pattern that is not in a list": (
            options(exclude="lm_head"),
            r"exclude='lm_head' must be a list.*\[\"lm_head\"\]",
        ),
        "a pattern that is none": (options(exclude=["(head"]), r"exclude: '\(head' is not a regular expression"),
        "a pattern that overflows": (
            options(include=["a{99999999999999999999}"]),
            "include: 'a{9+}' is not a regular expression",
        ),
        "exclude matches nothing": (
            options(exclude=["lm_head"]),
            "exclude: the pattern 'lm_head' matches no.*Names look like 'blend'",
        ),
        "include matches nothing": (options(include=["wte"]), "include: the pattern 'wte' matches no.*Names look like"),
        "include of what is no matrix": (
            options(include=["norm"]),
            "include: 'norm' names 'norm.weight'.*neither a matrix nor a stack.*Narrow the pattern",
        ),
        "max_grad_norm": (options(max_grad_norm=1.0), 'write "gradient_clipping" beside "optimizer"'),
        "params misspelt": (engine(config(2), parms={"lr": 1e-3}), "unknown key 'parms'; did you mean 'params'"),
        "options beside params": (engine(config(2), rank=4), "unknown key 'rank'.*belong into \"params\""),
    },
    "model": {
        "nothing for AdamW": (
            engine(config(2), lambda: toy(AllMatrices)),
            'at least one for AdamW: leave one to it with "exclude"',
        ),
        "no matrix": (engine(config(2), lambda: toy(NoMatrix)), "found no matrix to train.*Use AdamW for this model"),
        "a matrix that is not contiguous": (
            optimizer(model=Strided, rank=8),
            r"'up.weight' is not contiguous.*\.contiguous\(\)",
        ),
        "parameters without their model": (
            optimizer(lambda m: m.parameters()),
            r"MoFaSGD needs the model.*MoFaSGD\(model",
        ),
    },
    "combinations": {
        "pipeline": (engine(config(1), pipeline), "does not work with pipeline modules: use ZeRO"),
        "offloaded parameters on NVMe": (
            engine(config(3, zero_optimization={"offload_param": NVME})),
            'offload_param to NVMe: use "device": "cpu"',
        ),
        "offloaded optimizer on NVMe": (
            engine(config(3, zero_optimization={"offload_optimizer": NVME})),
            'offload_optimizer to NVMe: use "device": "cpu"',
        ),
        "offloaded optimizer with 8-bit moments": (
            eight_bit(2, zero_optimization={"offload_optimizer": {"device": "cpu"}}),
            "adamw_states='8bit' does not work with offload_optimizer.*: remove offload_optimizer, or set adamw_states='full'",
        ),
        "universal checkpoint with 8-bit moments": (
            eight_bit(2, checkpoint={"load_universal": True}),
            "adamw_states='8bit' does not work with universal checkpoints.*remove \"load_universal\"",
        ),
        "elastic checkpoint with 8-bit moments": (
            eight_bit(1, zero_optimization={"elastic_checkpoint": True}),
            "adamw_states='8bit' does not work with \"elastic_checkpoint\".*remove it",
        ),
        "DeepSpeed's choice of AdamWs with 8-bit moments": (
            options(adamw_states="8bit"),
            "torch_adam chooses between DeepSpeed's AdamWs.*'8bit' is none of them: remove",
        ),
        "offloaded optimizer without ZeRO": (
            engine(config(0, zero_optimization={"offload_optimizer": {"device": "cpu"}})),
            'offload_optimizer at ZeRO stage 0.*"stage": 1.*or remove offload_optimizer',
        ),
        "offloaded parameters that are whole": (
            engine(config(2, zero_optimization={"offload_param": {"device": "cpu"}})),
            'offload_param at ZeRO stages 0 to 2.*set "stage": 3, or remove offload_param',
        ),
        "an optimizer offloaded in part": (
            engine(config(3, zero_optimization={"offload_optimizer": {"device": "cpu", "ratio": 0.5}})),
            'a "ratio" below 1 in offload_optimizer.*remove "ratio"',
        ),
        "fp16 without ZeRO": (engine(config(0, dtype="fp16")), 'fp16 at ZeRO stage 0.*"stage": 1.*or bf16'),
        "experts": (engine(config(2), lambda: toy(Experts)), "DeepSpeed's MoE layers.*use AdamW"),
        "SuperOffload": (
            engine(config(3, zero_optimization={"offload_optimizer": {"device": "cpu", "super_offload": True}})),
            "SuperOffload: use plain offload_optimizer",
        ),
        "ZenFlow": (
            engine(
                config(
                    2,
                    zero_optimization={
                        "offload_optimizer": {"device": "cpu"},
                        "zenflow": {
                            "topk_ratio": 0.1,
                            "update_interval": 2,
                            "full_warm_up_rounds": 0,
                            "overlap_step": False,
                        },
                    },
                )
            ),
            "ZenFlow: remove zenflow",
        ),
        "DeepCompile": (engine(config(3, compile={"deepcompile": True})), 'DeepCompile.*set "deepcompile": false'),
        "universal checkpoints without ZeRO": (
            engine(config(0, checkpoint={"load_universal": True})),
            "universal checkpoints at ZeRO stage 0.*use stage 1",
        ),
    },
    "JSON of the command": {
        "no such JSON": (command("--deepspeed", "nowhere.json"), "nowhere.json: no such file.*Pass a path that exists"),
        "broken JSON": (command(ds='{\n "a": 1,\n "b" 2}'), "ds.json:3: .*not valid JSON.*Correct that line"),
        "empty JSON": (command(ds=""), "ds.json:1: .*not valid JSON"),
        "JSON that is a list": (command(ds="[]"), "ds.json: .*must be a JSON object"),
        "a key twice": (command(ds='{"fp16": {}, "fp16": {}}'), "ds.json: the key 'fp16' stands twice.*Keep one"),
        "misspelt section": (
            command(ds={"zero_optimisation": {"stage": 2}}),
            "ds.json: unknown key 'zero_optimisation'.*did you mean 'zero_optimization'",
        ),
        "misspelt clipping": (
            command(ds={"gradient_cliping": 1.0}),
            "ds.json: unknown key .*did you mean 'gradient_clipping'",
        ),
        "a section that is a number": (
            command(ds={"zero_optimization": 2}),
            "ds.json: 'zero_optimization' must be an object",
        ),
        "stage 7": (command(ds={"zero_optimization": {"stage": 7}}), 'ds.json: "stage": 7 .* must be 0, 1, 2 or 3'),
        "stage 3 that cannot save": (
            command(ds={"zero_optimization": {"stage": 3}}),
            "ds.json: stage 3 without .*Add it",
        ),
        "optimizer is a name": (command(optimizer="MoFaSGD"), "ds.json: 'optimizer' must be an object"),
        "misspelt optimizer": (
            command(optimizer={"type": "MoFASDG"}),
            "ds.json: .*\"MoFASDG\".* is no optimizer.*did you mean 'mofasgd'",
        ),
        "optimizer without a type": (
            command(optimizer={"type": None}),
            'ds.json: .*null.* is no optimizer.*Write "type": "MoFaSGD"',
        ),
        "params is a list": (command(params=[1]), r"ds.json: .*params=\[1\] must be an object of options"),
        "unknown option in the JSON": (
            command(params={"learning_rate": 1}),
            "ds.json: .*unknown option 'learning_rate'",
        ),
        "wrong type in the JSON": (command(params={"rank": "8"}), "ds.json: .*rank='8' must be a whole number"),
        "auto that nobody fills in": (
            command(params={"rank": "auto"}),
            'ds.json: .*rank="auto" was not filled in.*Write a value',
        ),
        "learning rate of an earlier version": (
            command("--learning_rate", "6e-3"),
            'ds.json: "optimizer": lr=0.006 is far above AdamW.*write lr=0.0012',
        ),
        "two learning rates": (
            command("--learning_rate", "1e-3", params={"lr": 2e-3}),
            'ds.json: "optimizer.params.lr" is 0.002 there, and --learning_rate is 0.001.*"auto"',
        ),
        "batch size in words": (
            command(ds={"train_micro_batch_size_per_gpu": "four"}),
            "per_device_train_batch_size.*'four'",
        ),
    },
    "command line": {
        "unknown word": (command("--lerning_rate", "1"), "unknown options: --lerning_rate 1.*--help"),
        "no number": (command("--learning_rate", "fast"), "--learning_rate.*: invalid float value: 'fast'.*--help"),
        "two models": (
            command("--model_config", "shape.json", "--model_name_or_path", "x"),
            "both given. Keep the first",
        ),
        "evaluation of nothing": (command("--eval_on_start"), "nothing to evaluate on. Add --eval_file"),
        "no checkpoint to resume": (
            command("--resume_from_checkpoint", "last", "--output_dir", "new"),
            "new: no checkpoint to resume from",
        ),
        "a checkpoint that is none": (
            command("--resume_from_checkpoint", "."),
            "not a checkpoint of this command.*Give --resume_from_checkpoint",
        ),
    },
    "model of the command": {
        "no such model": (
            command("--model_name_or_path", "nowhere"),
            "nowhere: no tokenizer could be loaded.*Pass --tokenizer_name_or_path",
        ),
        "unknown architecture": (
            command(shape={"model_type": "lama"}),
            "shape.json: not a model that transformers can build",
        ),
        "misspelt shape": (command(shape={"hiden_size": 8}), "shape.json: llama has no setting hiden_size"),
        "vocabulary too small": (command(shape={"vocab_size": 100}), "tokenizer has 262 tokens and the model only 100"),
        "rank larger than the model": (command(params={"rank": 17}), "no matrix to train.*Set rank to at most 16"),
        "tokenizer without an end token": (
            command("--tokenizer_name_or_path", "tokenizer", before=tokenizer_folder),
            "tokenizer: .*no end-of-text token.*Set eos_token",
        ),
        "chat without a template": (
            command(
                "--tokenizer_name_or_path",
                "tokenizer",
                before=lambda: tokenizer_folder(eos_token="</s>"),
                data=CHAT,
                name="a.jsonl",
            ),
            "a.jsonl:1: chat data needs a chat template.*pass --tokenizer_name_or_path",
        ),
    },
    "output": {
        "an output folder that is a file": (
            command("--output_dir", "train.txt"),
            "train.txt: cannot be written.*Give --output_dir another",
        ),
        "an output folder below a file": (
            command("--output_dir", "train.txt/out"),
            "train.txt/out: cannot be written.*Not a directory",
        ),
        "a disk without space for the model": (
            command(before=nearly_full),
            r"0.00 GB free, and the weights alone take.*final model\).*Free some",
        ),
        "a disk without space for a checkpoint": (
            command("--save_strategy", "steps", before=nearly_full),
            "GB free.*final model and one checkpoint.*--output_dir another disk",
        ),
    },
    "data": {
        "no such data": (command("--train_file", "nowhere.txt"), "nowhere.txt: no such file. Check --train_file"),
        "a folder for data": (command("--train_file", "."), r"\.: no such file. Check --train_file"),
        "data of another kind": (command(data="a,b", name="a.tsv"), "a.tsv: a data file must end in .txt.*not '.tsv'"),
        "empty text": (command(data=" \n"), "train.txt: the file is empty"),
        "text that is not UTF-8": (command(data=b"a\nb\xff\n"), "train.txt:2: not UTF-8.*Convert it"),
        "empty records": (command(data="\n\n", name="a.jsonl"), "a.jsonl: the file holds no record"),
        "malformed record": (command(data='{"text": "a"}\n{"text": \n', name="a.jsonl"), "a.jsonl:2: not valid JSON"),
        "record that is a list": (command(data='["a"]', name="a.jsonl"), "a.jsonl:1: a record must be a JSON object"),
        "record of unknown keys": (
            command(data='{"txt": "a"}', name="a.jsonl"),
            "a.jsonl:1: the record has keys .*Rename the keys",
        ),
        "record with a number": (
            command(data='{"text": 5}', name="a.jsonl"),
            "a.jsonl:1: 'text' must be a string, not 5",
        ),
        "record with nothing in it": (
            command(data='{"prompt": "a", "completion": ""}', name="a.jsonl"),
            "a.jsonl:1: 'completion' is empty",
        ),
        "chat without an answer": (
            command(data='{"messages": [{"role": "user", "content": "a"}]}', name="a.jsonl"),
            "a.jsonl:1: no message has the role 'assistant'",
        ),
        "chat with an unknown role": (
            command(data='{"messages": [{"role": "bot", "content": "a"}]}', name="a.jsonl"),
            "a.jsonl:1: message 1 has the role 'bot'",
        ),
        "record nested without end": (command(data="[" * 100_000, name="a.jsonl"), "a.jsonl:1: not valid JSON.*nested"),
    },
}


def refused(subject: str) -> dict:
    """The outcome of each case of a subject, in a folder of its own."""
    outcomes = {}
    for number, (name, (do, _)) in enumerate(CASES[subject].items()):
        folder = Path(f"case{number}").resolve()
        folder.mkdir()
        os.chdir(folder)
        outcomes[name] = outcome(do)
        os.chdir(folder.parent)
    return outcomes


def outcome(do: Callable[[], Any]) -> dict:
    """The error of what is done in a case's folder, and how many steps there were before."""
    import huggingface_hub.constants

    from ds_mofa.step.step import MatrixStep

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # names are not looked up
    steps, reduce = [], MatrixStep.reduce
    MatrixStep.reduce = lambda self, *args: (steps.append(1), reduce(self, *args))[1]
    try:
        do()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error), "steps": len(steps)}
    finally:
        MatrixStep.reduce = reduce
        while PATCHES:
            PATCHES.pop().stop()
        forget_accelerate()
    return {"type": "nothing", "message": "", "steps": len(steps)}


def forget_accelerate() -> None:
    """The Trainer's state is one per process, and another case comes with another config."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# What a run writes, each linked to a device that is always full; and what the message must say.
FULL = {
    "weights of a checkpoint": ("out/checkpoint-1/global_step1/mp_rank_00_model_states.pt", "the checkpoint of step 1"),
    "states of a checkpoint": (
        "out/checkpoint-1/global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt", "the checkpoint of step 1",
    ),
    "trainer's state": ("out/checkpoint-1/trainer_state.json", "the checkpoint of step 1"),
    "final model": ("out/config.json", "the model"),
}  # fmt: skip


def disk_full(what: str) -> dict:
    """A save begins in a folder of its own: the full device is put there then, before the Trainer writes."""
    from transformers import Trainer

    method = "save_model" if what == "final model" else "_save_checkpoint"
    save = getattr(Trainer, method)

    def link_and_save(self, *args, **kwargs):
        path = Path(FULL[what][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to("/dev/full")
        return save(self, *args, **kwargs)

    def patched() -> None:
        patch = mock.patch.object(Trainer, method, link_and_save)
        patch.start()
        PATCHES.append(patch)

    saving = ["--save_strategy", "no" if what == "final model" else "steps", "--save_steps", "1"]
    return outcome(command(*saving, before=patched))


@on_ranks(disk_full, world=[1], what=list(FULL))
def test_a_disk_that_fills_up_in_training_is_named_with_the_way_on(ran):
    (result,) = ran.ranks
    assert result["type"] == "RankError", result
    wanted = f"^out: {FULL[ran.what][1]} could not be written .(.*No space left|a file was cut short).*--resume_from_checkpoint last"
    assert re.search(wanted, result["message"]), result["message"]


@on_ranks(refused, world=[1], subject=list(CASES))
def test_is_refused_before_the_first_step_with_the_way_out(ran):
    (outcomes,) = ran.ranks
    assert outcomes.keys() == CASES[ran.subject].keys()
    for name, result in outcomes.items():
        assert result["type"] in ("OptionError", "UserError"), (name, result)
        assert re.search(CASES[ran.subject][name][1], result["message"], re.DOTALL), (name, result["message"])
        assert result["steps"] == 0, name


def test_the_table_is_long_enough():
    assert sum(map(len, CASES.values())) >= 60
