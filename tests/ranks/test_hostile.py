"""A checkpoint from somebody else: converting it runs nothing of it, reads nothing outside of it, removes nothing."""

import json
import shutil
from pathlib import Path

import pytest
from launching import on_ranks
from scenes.checkpoints import edit
from toys import batches
from training import config, engine_for, train_step

from ds_mofa import to_universal
from ds_mofa.backends.deepspeed import checkpoints
from ds_mofa.backends.deepspeed.checkpoints import MANIFEST, CheckpointError
from ds_mofa.backends.deepspeed.universal import convert


class Runs:
    """Its pickle makes a folder."""

    def __reduce__(self):
        return Path.mkdir, (Path("ran"), 0o777, False, True)


def saved(stage: int) -> dict:
    for tag, client_state in (("plain", {}), ("with", {"mine": Runs()})):
        with engine_for(config(stage)) as engine:
            train_step(engine, batches(1)[0])
            engine.save_checkpoint("saved", tag=tag, client_state=client_state)
    folder, messages = Path("saved"), {}
    mine = folder / "out.partial"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")

    def refused(what: str, tag: str = "plain") -> None:
        with pytest.raises(CheckpointError) as error:
            convert(folder / tag, folder / "out", 1)
        messages[what] = str(error.value)

    refused("with an object", "with")
    left = sorted(path.name for path in folder.iterdir())
    ran = Path("ran").exists()

    files = json.loads((folder / "plain" / MANIFEST).read_text())["files"]
    for name in ("/etc/hostname", "../with/" + MANIFEST, "a/../../b"):
        edit(folder / "plain" / MANIFEST, files={**files, name: {"bytes": 3, "directory": None}})
        refused(name)
    edit(folder / "plain" / MANIFEST, files=files)
    shutil.copy(folder / "plain" / min(files), folder / "plain" / "layer_00-model_states.pt")
    refused("a file that is not listed")
    (folder / "plain" / "layer_00-model_states.pt").unlink()

    convert(folder / "plain", folder / "out", 1)
    convert(folder / "with", folder / "trusted", 1, trusted=True)
    return {
        "messages": messages,
        "left": left,
        "ran": ran,
        "ran when trusted": Path("ran").exists(),
        "mine": (mine / "precious.txt").read_text(),
        "whole": checkpoints.read_manifest(folder / "out")["universal"],
        "beside": sorted(path.name for path in folder.iterdir() if path.name.startswith(".")),
    }


@on_ranks(saved, world=[1], stage=[1, 3])
def test_converting_runs_and_removes_nothing_and_stays_inside(ran):
    (result,) = ran.ranks
    messages = result["messages"]
    assert "pathlib.Path.mkdir" in messages["with an object"] or "pathlib" in messages["with an object"]
    assert "--trust" in messages["with an object"]
    assert not result["ran"] and result["ran when trusted"]
    assert "out" not in result["left"]
    for name in ("/etc/hostname", "../with/" + MANIFEST, "a/../../b"):
        assert f"names {name!r}, which is outside of its folder" in messages[name]
    assert "files of another save, such as layer_00-model_states.pt" in messages["a file that is not listed"]
    assert result["mine"] == "mine" and result["whole"] and result["beside"] == []


def test_the_command_says_what_it_trusts(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["to_universal", "--help"])
    with pytest.raises(SystemExit):
        to_universal.main()
    assert "--trust" in capsys.readouterr().out
