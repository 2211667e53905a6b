"""The figures of docs/learning come from the rows that are published."""

from experiments.settings_figures import LOSSES, RATES, TASKS, main


def test_the_figures_are_drawn_of_every_task(tmp_path, capsys):
    main(["--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"best_rates.png", "losses.png"}
    assert all(said.count(f"{task} {{") >= 1 for task in TASKS)
    assert "'r=32 explore 32': '1.05'" in said and "'r=32 explore 32': '-0.7 %'" in said  # code, as in its summary
    assert "r=32 explore 32" in RATES and "r=32 explore 32" in LOSSES
