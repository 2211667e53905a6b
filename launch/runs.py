"""Which checkpoints of an output folder belong to the run that goes on there; the folder may hold those of several.

Every start of the command has an id. A *lineage* is the list of the starts that have led to a state, oldest first, each
with the step that the next one went on from: ``[["3f2a...", 20], ["9b0c...", None]]``, None for the last, which has no
end yet. It is written into the output folder at the start (``run.json``) and into every checkpoint's seal. So neither a
fresh run in an old folder nor one that was resumed from an earlier checkpoint takes for its own what it did not write.
"""

import json
import uuid
from pathlib import Path

from ds_mofa.backends.deepspeed.checkpoints import write_atomically

RUN = "run.json"

Lineage = list[list]  # of [id, last step]


def new_lineage(before: Lineage | None = None, step: int | None = None) -> Lineage:
    """The lineage of a start.

    Args:
        before: that of the checkpoint which it resumes, ``step`` that checkpoint's; None for a run from the beginning.
    """
    this = [uuid.uuid4().hex[:16], None]
    if step is None:
        return [this]
    *earlier, last = before or [[None, None]]  # a checkpoint of a version that wrote no ids
    return [*earlier, [last[0], step], this]


def belongs(writer: Lineage | None, step: int, lineage: Lineage) -> bool:
    """Whether the checkpoint of ``step``, in whose seal stands ``writer``, is part of a lineage."""
    wanted = writer[-1][0] if writer else None
    return any(run == wanted and (last is None or step <= last) for run, last in lineage)


def begin_run(output_dir: str, lineage: Lineage, resumed_from: str | None) -> None:
    """Declare that from now on the folder is this run's. One rank calls it, once no other reads any more."""
    source = str(Path(resumed_from).resolve()) if resumed_from is not None else None
    content = {"lineage": lineage, "resumed_from": source}
    write_atomically(Path(output_dir) / RUN, json.dumps(content, indent=1).encode())


def read_run(output_dir: str) -> dict | None:
    """``lineage`` and ``resumed_from`` of the run that was started last; None in a folder that nothing says it of."""
    try:
        content = json.loads((Path(output_dir) / RUN).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and content.get("lineage") else None
