"""What fits a card: the edge is exact, a search asks seldom, and each switch stands on those that gained."""

import json
import math
from pathlib import Path

import pytest

from ds_mofa.profiler.predict import PredictionError, fitting, predict
from ds_mofa.profiler.predict.fitting import STEPS, Fit, bytes_of, fits, largest, needed
from ds_mofa.profiler.setting import RunSetting, SettingError
from profiling import predict as command

ROOT = Path(__file__).resolve().parents[3]
ROOM = 1_590_000_000  # bytes: a context, cuBLAS's workspaces, and little beside them
SMALL = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("shape") / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.fixture(scope="module")
def found(small) -> list[Fit]:
    return list(fits(RunSetting.of(small, seq=512, micro_batch=4, rank=28, fused_head=True), ROOM))


def test_the_edge_is_exact(found):
    """Of every run and everything that is looked for: it fits, and a step more does not, or is not there."""
    assert [fit.switch.partition(" (")[2] for fit in found] == [
        "", "--checkpointing)", "--include embed_tokens lm_head)", "--weights int8)", "--zero 2 --offload optimizer)",
        "--zero 3 --offload param)",
    ]  # fmt: skip
    assert not any(fit.refused for fit in found)
    edges = []
    for fit in found:
        for name, most in fit.most.items():
            assert most % STEPS[name] == 0 and most <= fit.limits[name]
            if most:
                assert needed(predict(fit.setting.but(**{name: most}))) <= ROOM, (fit.switch, name)
            if most + STEPS[name] <= fit.limits[name]:
                assert needed(predict(fit.setting.but(**{name: most + STEPS[name]}))) > ROOM, (fit.switch, name)
                edges += [name] if most else []
    assert {"seq", "micro_batch"} <= set(edges), "or the card was too large or too small to say anything"
    given, checkpointed, *_, last = found
    assert given.limits == {"seq": 4096, "micro_batch": 1 << 22, "rank": 32}
    assert checkpointed.most["micro_batch"] > given.most["micro_batch"] > 0
    assert last.most == {"seq": 0, "micro_batch": 0, "rank": 0}, "DeepSpeed's buckets alone are larger"


def test_a_switch_that_gains_nothing_is_not_kept(found):
    zero2, zero3 = found[-2:]
    assert not zero2.gains_over(found[-3]) and zero2.setting.zero == 2
    assert zero3.setting == found[-3].setting.but(zero=3, offload="param", weights="bf16")
    assert found[1].setting.checkpointing and found[1].gains_over(found[0]) and not found[0].gains_over(found[1])


@pytest.mark.parametrize("weights, small", [("bf16", 1), ("fp32", 0)])
def test_eight_bits_come_before_the_host_and_go_where_it_holds_the_weights(weights, small):
    setting = RunSetting.of(str(ROOT / "configs/models/llama-tiny.json"), backend="fsdp2", gpus=2, weights=weights)
    changes = [change for _, change in fitting._switches(setting)]
    assert [change.get("weights") for change in changes].count("int8") == small
    assert changes[-1] == {"offload": "param", "weights": weights}
    assert (setting.but(weights="int8") if small else setting).but(**changes[-1]).weights == weights


def test_a_baseline_has_fewer_switches_and_what_is_on_is_none(small):
    adamw = list(fits(RunSetting.of(small, "AdamW", seq=128, zero=3, gpus=2, bucket=1000, checkpointing=True), 3 << 30))
    assert [fit.switch.partition(" (")[0] for fit in adamw] == [
        "as given", "optimizer on the host", "weights on the host too",
    ]  # fmt: skip
    assert all(fit.most.keys() == {"seq", "micro_batch"} for fit in adamw) and adamw[-1].host > 0


@pytest.mark.parametrize("start", [1, 7, 50, 400])
def test_a_search_asks_seldom_and_finds_the_edge(start):
    curves = {
        "a line": lambda x: 1000 + 7 * x,
        "a bend": lambda x: max(1000 + x, 20 * x - 3000),
        "steps": lambda x: 1000 + 100 * (x // 13),
        "a wall": lambda x: 1000 if x < 123 else math.inf,
    }
    for name, needs in curves.items():
        asked = []

        def counted(x, needs=needs, asked=asked):
            asked.append(x)
            return needs(x)

        found = largest(counted, 2500, start, 1, 10_000)
        assert needs(found) <= 2500 < needs(found + 1), name
        assert len(asked) == len(set(asked)) <= 20, (name, asked)
    asked = []
    largest(lambda x: asked.append(x) or 1000 + 7 * x, 2500, start, 1, 10_000)
    assert len(asked) <= 5, "a line needs two points, its edge and one step more"
    asked = []
    assert largest(lambda x: asked.append(x) or 1000 + x // 100, 2500, start, 1, 10_000) == 10_000
    assert len(asked) <= 3, "two points say that all fits, and the limit is asked"
    asked = []
    assert largest(lambda x: asked.append(x) or 3000 + 7 * x, 2500, 64, 1, 10_000) == 0
    assert len(asked) <= 3, "or that nothing does"


def test_the_ends_of_a_search():
    assert largest(lambda x: x, 10, 4, 4, 100) == 8
    assert largest(lambda x: x, 3, 40, 4, 100) == 0
    assert largest(lambda x: x, 1000, 40, 8, 100) == 96
    assert largest(lambda x: 0.0, 1, 500, 1, 20) == 20, "where to begin lies beyond the limit"


def test_sizes_of_cards():
    assert [bytes_of(size) for size in ("24GiB", "141 GB", "1.5GiB", "80MB")] == [
        24 << 30, 141 * 10**9, 3 << 29, 80 * 10**6,
    ]  # fmt: skip
    for size in ("24", "24G", "GiB", "0GiB", "-1GB", ""):
        with pytest.raises(ValueError, match="such as 24GiB"):
            bytes_of(size)


def fake(setting: RunSetting) -> dict:
    """A prediction that costs nothing: a line in each of what is looked for, less with each switch."""
    if setting.option("fused_head"):
        raise PredictionError("its logits are changed between head and loss")
    tokens = setting.seq * setting.micro_batch * (1000 if setting.checkpointing else 4000)
    size = 10**9 + tokens + setting.rank * 10**6 - 10**5 * len(setting.option("include"))
    size -= 10**5 if setting.weights == "int8" else 0
    return {
        "total": size + 7,
        "categories": {"weights": size, "allocator slack": 7},
        "host": 0,
        "allocated": size,
        "when": "",
    }


def test_the_command(small, tmp_path, capsys, monkeypatch):
    """Its table, what a model refuses, and what it writes."""
    monkeypatch.setattr(fitting, "predict", fake)
    words = ["--model_config", small, "--seq", "128", "--rank", "4", "--zero", "2", "--adamw_states", "8bit"]
    command.main([*words, "--fit", "1.005GB", "--output", str(tmp_path / "fit.json")])
    printed = capsys.readouterr().out
    assert "MoFaSGD in 1.00 GB, which is 0.936 GiB" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows == [
        "| run | needs at 128 x 1, r = 4 | gains | longest sequence | largest micro-batch | highest rank |",
        "| as given | 1.00 GB |  | 192 | 1 | 4 |",
        "| + activations checkpointed (--checkpointing) | 1.00 GB | 384.0 kB | 960 | 7 | 4 |",
        "| + embedding and head as matrices (--include embed_tokens lm_head) | 1.00 GB | 200.0 kB | 1,152 | 9 | 5 |",
        "| + matrices in eight bits (--weights int8) | 1.00 GB | 100.0 kB | 1,280 | 10 | 5 |",
    ]
    assert "Not possible: fused output head (--fused_head): its logits are changed" in printed and "*" not in printed
    saved = json.loads((tmp_path / "fit.json").read_text())["MoFaSGD"]
    assert [row["most"]["seq"] for row in saved] == [192, 960, 1152, 1280] and saved[0]["setting"]["seq"] == 128
    command.main([*words, "--fit", "2 GB", "--checkpointing", "--include", "lm_head"])
    printed = capsys.readouterr().out
    assert (
        "| as given | 1.00 GB |  | 4,096* | 7,7" in printed
        and "| 32* |" in printed
        and "*: more was not tried" in printed
    )
    assert "(--include lm_head embed_tokens)" in printed


def test_what_cannot_be_asked(small):
    with pytest.raises(SystemExit):
        command.main(["--model_config", small, "--fit", "24"])
    with pytest.raises(SettingError):
        list(fits(RunSetting.of("nowhere.json"), ROOM))
