"""The file of all runs, one line of JSON each: what an interrupted comparison goes on from."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.plan import Plan
from launch.errors import UserError

__all__ = ["Results", "check_control", "differing_environments"]

Row = dict[str, Any]


class Results:
    """Rows by the key of their run, in a file that only grows.

    A row counts once its line has ended: what an interrupted write has left is cut off, and its run is run again.

    Raises:
        UserError: another comparison is writing to the file, or a line in it is no row.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path}: another comparison is writing to it. Wait for it, or give another --output_dir."
            ) from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        self.rows: dict[str, Row] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            row = self._parse(line, number)
            self.rows[row["key"]] = row

    def append(self, row: Row) -> None:
        """Add a row, safe on the disk when this returns."""
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[row["key"]] = row

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _parse(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
            row["key"], row["seed"], row["evaluations"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}, line {number}: not the result of a run ({error!r}). Remove the line and its run will be "
                "made again, or give another --output_dir."
            ) from None
        return row


def check_control(plan: Plan, rows: Mapping[str, Row]) -> None:
    """That all runs of a seed had the same initial weights, the same batches and the same evaluation.

    Raises:
        UserError: two of them had not, so they cannot be compared.
    """
    for seed in plan.seeds:
        of_seed = [run for run in plan.runs if run.seed == seed and run.key in rows]
        for run in of_seed:
            first, own = rows[of_seed[0].key]["control"], rows[run.key]["control"]
            for what in first:
                # A run that has diverged stops early, and has seen fewer batches.
                stopped = any(rows[r.key]["diverged_at"] for r in (run, of_seed[0]))
                if own[what] != first[what] and not (what == "batches" and stopped):
                    raise UserError(
                        f"{run} and {of_seed[0]} have other {what}, so they cannot be compared. The data or the "
                        "model's files have changed between them: give another --output_dir."
                    )


def differing_environments(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What of hardware and versions is not the same for all rows, with the values it has."""
    names = dict.fromkeys(name for row in rows for name in row["environment"])
    values = {name: list(dict.fromkeys(row["environment"].get(name, "none") for row in rows)) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}
