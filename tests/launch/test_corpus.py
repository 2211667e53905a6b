"""The corpus is the same each time, and its two halves share no file."""

import sysconfig
from pathlib import Path

import pytest

from launch.make_corpus import belongs_to_eval, library_sources, make_corpus

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def test_two_runs_write_the_same_bytes(tmp_path):
    first, second = (make_corpus(LIBRARY, tmp_path / name, 500_000) for name in ("a", "b"))
    for split in ("train", "eval"):
        content = first[split][0].read_bytes()
        assert content == second[split][0].read_bytes()
        assert content.decode()  # UTF-8 throughout
        assert len(content) == first[split][2] > 0
    assert first["train"][2] <= 500_000 + first["train"][1]


def test_train_and_eval_share_no_file(tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(300):
        (library / f"module_{number}.py").write_text(f"# source {number};\n")
    written = make_corpus(library, tmp_path / "out", 1_000_000)
    sources = {split: set(written[split][0].read_text().split("\n\n")) for split in written}
    assert not sources["train"] & sources["eval"]
    assert written["train"][1] + written["eval"][1] == 300
    assert written["eval"][1] == sum(belongs_to_eval(f"module_{number}.py") for number in range(300)) > 0


def test_tests_and_installed_packages_stay_out():
    names = [file.relative_to(LIBRARY).as_posix() for file in library_sources(LIBRARY)]
    assert "argparse.py" in names
    assert not [name for name in names if name.startswith(("test/", "site-packages/")) or "/tests/" in name]


def test_a_folder_without_sources_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no Python sources"):
        make_corpus(tmp_path, tmp_path / "out", 1000)
