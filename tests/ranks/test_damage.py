"""A checkpoint that is not whole is refused, by the file's name, on every rank, before anything is loaded."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from comparing import equal
from deepspeed import comm as dist
from launching import on_ranks
from scenes.checkpoints import edit, state_of
from toys import batches
from training import config, engine_for, toy, train_step, whole_weights

from ds_mofa import to_universal
from ds_mofa.backends.deepspeed import checkpoints
from ds_mofa.backends.deepspeed.checkpoints import MANIFEST, CheckpointError
from ds_mofa.backends.deepspeed.universal import convert

DATA = batches(3)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, where: float = 0.5) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def model_file(stage: int, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def optim_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def damages(stage: int) -> dict:
    """What happens to which file."""
    last = 1 if stage == 3 else 0
    table = {
        "the model's is missing": (model_file(stage, last), Path.unlink),
        "the model's is truncated": (model_file(stage, last), truncate),
        "the model's has another bit": (model_file(stage, last), flip),
        "the manifest is missing": (MANIFEST, Path.unlink),
        "the manifest is truncated": (MANIFEST, truncate),
        "the manifest has another bit": (MANIFEST, flip),
        "the manifest is of a later format": (MANIFEST, lambda path: edit(path, format=99)),
        "the state is of a later format": (MANIFEST, lambda path: edit(path, state_format=99)),
    }
    for rank in (0, 1) if stage else ():
        table[f"rank {rank}'s state is missing"] = (optim_file(rank), Path.unlink)
        table[f"rank {rank}'s state is truncated"] = (optim_file(rank), truncate)
        for where in (0.0, 0.3, 0.7, 1.0):
            table[f"rank {rank}'s state has another bit at {where}"] = (optim_file(rank), lambda p, w=where: flip(p, w))
    return table


def damaged(stage: int) -> dict:
    """The error for each damage, and whether the engine is still what it was; at the end a whole one is loaded."""
    with engine_for(config(stage)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="earlier")
        train_step(engine, DATA[1])
        engine.save_checkpoint("saved", tag="whole")
        wanted = state_of(engine)
    found = {}
    with engine_for(config(stage), model=toy(seed=1)) as engine:
        before = state_of(engine)
        for what, (name, happens) in damages(stage).items():
            if dist.get_rank() == 0:
                shutil.rmtree("saved/hurt", ignore_errors=True)
                shutil.copytree("saved/whole", "saved/hurt")
                happens(Path("saved/hurt") / name)
            dist.barrier()
            message = ""
            try:
                engine.load_checkpoint("saved", tag="hurt")
            except CheckpointError as error:
                message = str(error)
            found[what] = {"message": message, "untouched": equal(before, state_of(engine))}
            dist.barrier()
        engine.load_checkpoint("saved", tag="whole")
        return {"found": found, "loaded": equal(wanted, state_of(engine))}


@on_ranks(damaged, stage=[0, 2, 3])
def test_a_damaged_file_is_named_and_nothing_is_loaded(ran):
    for what, (name, _) in damages(ran.stage).items():
        messages = {result["found"][what]["message"] for result in ran.ranks}
        assert len(messages) == 1, "the ranks do not agree"
        (message,) = messages
        assert name in message, (what, message)
        if "format" in what:
            assert "format 99, this version reads 1" in message
        else:
            assert "Resume from another one, by its tag; saved has earlier, whole" in message, (what, message)
        assert all(result["found"][what]["untouched"] for result in ran.ranks), what
    assert all(result["loaded"] for result in ran.ranks)


def interrupted(stage: int) -> dict:
    """A save into an old tag that breaks off, and one that cannot be completed on rank 0's disk."""
    with engine_for(config(stage)) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="again")
        write = engine.checkpoint_engine.save
        messages = []

        def breaks_off(*args, **kwargs):
            raise KeyboardInterrupt("as a kill would")

        engine.checkpoint_engine.save = breaks_off
        try:
            engine.save_checkpoint("saved", tag="again")
        except KeyboardInterrupt:
            dist.barrier()
        engine.checkpoint_engine.save = write
        messages.append(error_of(lambda: engine.load_checkpoint("saved", tag="again")))

        sealed = checkpoints.write_atomically
        checkpoints.write_atomically = no_space
        messages.append(error_of(lambda: engine.save_checkpoint("saved", tag="full")))
        checkpoints.write_atomically = sealed
        return {"messages": messages, "latest": Path("saved/latest").read_text()}


def no_space(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device")


def error_of(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


@on_ranks(interrupted, stage=[2, 3])
def test_a_save_that_was_interrupted_is_no_checkpoint(ran):
    for result in ran.ranks:
        unfinished, full = result["messages"]
        assert "saved/again" in unfinished and f"has no {MANIFEST}: its save was interrupted" in unfinished
        assert "saved/full" in full and "No space left on device" in full


def weights_alone(stage: int) -> dict:
    """Those of a checkpoint whose optimizer was another: nothing of ours is in it."""
    adamw = config(stage) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    with engine_for(adamw) as engine:
        train_step(engine, DATA[0])
        engine.save_checkpoint("saved", tag="adamw")
        wanted = whole_weights(engine.module)
    with engine_for(config(stage), model=toy(seed=1)) as engine:
        refused = error_of(lambda: engine.load_checkpoint("saved", tag="adamw"))
        engine.load_checkpoint("saved", tag="adamw", load_optimizer_states=False, load_lr_scheduler_states=False)
        loaded = whole_weights(engine.module)
        train_step(engine, DATA[1])  # with what it has
    return {"wanted": wanted, "loaded": loaded, "refused": refused, "manifest": Path("saved/adamw", MANIFEST).exists()}


@on_ranks(weights_alone, stage=[0, 1, 2, 3])
def test_the_weights_of_another_optimizers_checkpoint_load_alone(ran):
    for result in ran.ranks:
        assert "load_optimizer_states=False" in result["refused"]
        assert equal(result["wanted"], result["loaded"])
        assert not result["manifest"]  # AdamW's engine is left as it is


# ---------------------------------------------------------------------- without ranks


@pytest.fixture
def folder(tmp_path) -> Path:
    """Something like a checkpoint, sealed."""
    folder = tmp_path / "tag"
    folder.mkdir()
    torch.save({"weights": torch.randn(20), "name": "x"}, folder / "some.pt")
    description = {"state_format": 1, "universal": False, "zero_stage": 2, "world_size": 1, "rank": 4, "matrices": {}}
    checkpoints.seal(folder, {**description, "crc32": True}, checkpoints.files_of(folder, ["some.pt"]))
    return folder


def test_every_bit_of_a_file_is_covered_or_means_nothing(folder):
    """Flip each byte in turn: found, or what is loaded is the same."""
    path, manifest = folder / "some.pt", checkpoints.read_manifest(folder)
    content = path.read_bytes()
    whole = torch.load(path, weights_only=True)
    weights = content.index(whole["weights"].numpy().tobytes())
    weights = range(weights, weights + 4 * whole["weights"].numel())
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        try:
            checkpoints.check(folder, manifest)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            # Padding, and what a record's own header repeats of the directory.
            assert i not in weights and equal(torch.load(path, weights_only=True), whole), i


def test_a_file_of_another_save_is_told_even_at_the_same_size(folder):
    torch.save({"weights": torch.randn(20), "name": "x"}, folder / "some.pt")
    with pytest.raises(CheckpointError, match="some.pt is damaged .the directory at its end is not the one"):
        checkpoints.check(folder, checkpoints.read_manifest(folder))


def test_without_checksums_in_the_files_a_truncated_one_is_still_told(folder):
    manifest = checkpoints.read_manifest(folder) | {"crc32": False}
    checkpoints.check(folder, manifest)
    truncate(folder / "some.pt")
    with pytest.raises(CheckpointError, match="some.pt has .* bytes, .* were written"):
        checkpoints.check(folder, manifest)


def test_every_bit_of_a_manifest_is_covered(folder):
    path = folder / MANIFEST
    content, whole = path.read_bytes(), checkpoints.read_manifest(folder)
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        try:
            assert checkpoints.read_manifest(folder) == whole
        except CheckpointError as error:
            assert str(path) in str(error)


def test_what_is_written_atomically_is_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        checkpoints.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_conversion_refuses_what_is_not_whole_and_what_is_there(folder, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        convert(folder, tmp_path / "there")
    with pytest.raises(CheckpointError, match="no such checkpoint.*tag"):
        convert(tmp_path / "missing", tmp_path / "out")
    torch.save({}, folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="files of another save, such as zero_pp_rank_7"):
        convert(folder, tmp_path / "out")
    flip(folder / "some.pt")
    with pytest.raises(CheckpointError, match="some.pt is damaged"):
        convert(folder, tmp_path / "out")
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="its save was interrupted"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_that_converts_ends_with_the_reason(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["to_universal", "--input_folder", str(folder), "--output_folder", str(folder)])
    with pytest.raises(SystemExit) as ended:
        to_universal.main()
    assert ended.value.code == 2
    assert f"error: {folder} exists already" in capsys.readouterr().err
