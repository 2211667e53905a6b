"""The documents: every relative link and anchor leads somewhere, README stays short, its programs run, its numbers agree."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ds_mofa
from ds_mofa.commands import scripts
from profiling.readme_picture import peaks, speeds
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("out", "build", "dist") for part in path.relative_to(ROOT).parts)
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
# Runs each of README's programs on a model of its own, with as little as will do of what they take for granted.
RUN = """
import json, sys, torch, ds_mofa
from transformers import AutoModelForCausalLM, LlamaConfig

shape = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
ids = torch.arange(32).view(2, 16) % 7
programs, trains, predicts = json.load(open(sys.argv[1]))
for program in programs:
    print(program)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    data = [{"input_ids": ids, "labels": ids}] * 3
    dataset = [{"input_ids": ids[0], "labels": ids[0]}] * 8
    sharded = "fully_shard" in program  # over the process group that the Trainer's program before has made
    exec(program, {"torch": torch, "ds_mofa": ds_mofa, "model": model, "data": data, "dataset": dataset})
    weights = {name: weight.full_tensor() if sharded else weight for name, weight in model.named_parameters()}
    still = [name for name, weight in weights.items() if torch.equal(weight.detach().cpu(), before[name])]
    assert still == []

from launch.arguments import make_parser

known = make_parser()._option_string_actions
assert [option for command in trains for option in command if option.startswith("--") and option not in known] == []

from profiling import predict

for command in predicts:
    predict.make_parser().parse_args(command)
"""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(text), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in LINK.findall(without_code(path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = path if not target else path.parent / target
        if not file.exists() or anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            broken.append(f"{path.relative_to(ROOT)}: {link}")
    return broken


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """What README and the documents pass to ``program``, in shell blocks."""
    texts = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    fenced = [block for text in texts for block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)]
    blocks = [block for language, block in fenced if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if f" {program} " in f" {line}"]
    return [line[line.index(program) + 1 :] for line in words if "..." not in line]


def trainings() -> list[list[str]]:
    """What they pass to launch/train.py, by its path or as ds-mofa train, which takes --gpus and the names of configs."""
    installed = [words[1:] for words in commands("ds-mofa") if words[0] == "train"]
    return [*commands("launch/train.py"), *(scripts._gpus(scripts._with_shipped(words))[0] for words in installed)]


def test_every_link_leads_somewhere():
    assert [link for path in DOCUMENTS for link in broken_links(path)] == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# It's `here`: one-two\n")
    file = tmp_path / "file.md"
    file.write_text(
        "[a](other.md#its-here-one-two) [b](other.md#there) [c](gone.md) [d](#e) [f](https://g)\n```\n[h](i)\n```\n"
    )
    assert broken_links(file) == ["file.md: other.md#there", "file.md: gone.md", "file.md: #e"]


def test_readme_has_at_most_a_thousand_words():
    assert len(README.split()) <= 1000


def test_readme_has_a_program_of_each_kind():
    kinds = ["trainer.train()", "deepspeed.initialize", "fully_shard(model)"]
    assert [kind for kind in kinds if not any(kind in program for program in programs())] == []
    assert len(programs()) == len(kinds)


def test_programs_run_and_train_every_parameter_and_commands_have_such_options(tmp_path):
    """In one process: importing what they need takes longer than running them."""
    shell = trainings(), commands("profiling/predict.py")
    assert all(shell)
    (tmp_path / "programs.json").write_text(json.dumps([programs(), *shell]))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ranks, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", RUN, "programs.json"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


def test_json_of_the_documents_is_what_the_optimizers_take():
    texts = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]
    configs = [json.loads(f"{{{block}}}") for block in blocks]
    optimizers = [config["optimizer"] for config in configs if "optimizer" in config]
    assert optimizers
    for optimizer in optimizers:
        getattr(ds_mofa, optimizer["type"]).options_class.from_config(optimizer["params"])


def test_the_picture_says_what_was_measured():
    said = re.search(r"!\[([^\]]*)\]\(docs/memory_and_speed.png\)", README)[1]
    values = [f"{value:.1f} GB" for value in peaks().values()]
    values += [f"{value:,.0f} tokens/s" for value in speeds().values() if value is not None]
    assert [value for value in values if value not in said] == []


def test_numbers_of_readmes_table_stand_in_the_results():
    results = (ROOT / "docs/results.md").read_text()
    table = README[README.index("## Results") : README.index("## What works")]
    for value, unit in re.findall(r"([\d.]+) (GB|tokens/s)", table):
        found = f"{value} GB" in results if unit == "GB" else re.search(rf"\b{value}\b", results)
        assert found, f"{value} {unit}"
