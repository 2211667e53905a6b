"""Real ranks for pytest: scenes run under the ``deepspeed`` launcher, tests look at what each rank brought back.

A *scene* is a function of a test module that trains something on every rank and returns tensors and numbers. A
test names its scene and the arguments to try:

    def train(stage): ...

    @on_ranks(train, world=[2, 3], stage=[0, 1, 2, 3])
    def test_it_learns(ran):
        for result in ran.ranks: ...

A scene may go on from the files of another, on another number of ranks: with ``after=case`` that case is run first,
the scene gets its folder as the argument ``before``, and the test its results as ``ran.before``.

Starting processes costs seconds, a scene tenths: the scenes that the selected tests need run in a few launches, one
after the other in each (``driver.py``). Two launches run at a time: half of its time a rank waits for another. A rank
that fails ends its launch, since the others may be waiting for it; the scenes after the failed one get a new launch.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import covering
from ports import free_port

__all__ = ["Case", "Launcher", "Ran", "cases", "on_ranks", "remove_shared_buffers"]

_HERE = Path(__file__).parent
_LIBC = ctypes.CDLL(None)  # loaded here: a forked child of a process with threads should do little
LAUNCHES = 2  # at a time
FEW = 20  # cases that one launch runs sooner than two


@dataclasses.dataclass(frozen=True)
class Case:
    """One scene with one set of arguments on one number of ranks."""

    module: str
    scene: str
    world: int
    arguments: str  # JSON: hashable
    after: "Case | None" = None

    @property
    def id(self) -> str:
        values = (f"{key}{value}" for key, value in json.loads(self.arguments).items())
        return "-".join([f"world{self.world}", *values, *([f"after-{self.after.id}"] if self.after else [])])


@dataclasses.dataclass(frozen=True)
class Ran:
    """What the ranks of a case brought back, in the order of the ranks, and the arguments they had."""

    case: Case
    ranks: list[dict[str, Any]]
    before: "Ran | None" = None

    def __getattr__(self, name: str) -> Any:
        try:
            return json.loads(self.case.arguments)[name]
        except KeyError:
            raise AttributeError(name) from None


def cases(
    scene: Callable,
    *some: dict[str, Any],
    world: Iterable[int] = (2,),
    after: Iterable[Case | None] = (None,),
    keeps: Callable[..., bool] = lambda **arguments: True,
    **axes: Iterable[Any],
) -> list[Case]:
    """Every combination of the arguments; see :func:`on_ranks`."""
    module = ".".join(Path(scene.__code__.co_filename).relative_to(_HERE).with_suffix("").parts)
    return [
        Case(module, scene.__name__, size, json.dumps(arguments, sort_keys=True), first)
        for size in world
        for first in after
        for fixed in some or ({},)
        for values in itertools.product(*axes.values())
        if keeps(world=size, **(arguments := {**fixed, **dict(zip(axes, values))}))
    ]


def on_ranks(
    scene: Callable,
    *some: dict[str, Any],
    world: Iterable[int] = (2,),
    after: Iterable[Case | None] = (None,),
    keeps: Callable[..., bool] = lambda **arguments: True,
    pairwise: bool = False,
    **axes: Iterable[Any],
):
    """Parametrise a test, whose argument ``ran`` is a :class:`Ran`, by every combination of the axes.

    Args:
        scene: what to run.
        *some: arguments that do not combine freely, each with every combination of the axes.
        world: numbers of ranks.
        after: cases to run first, whose files the scene goes on from.
        keeps: which of the combinations: called with ``world`` and the arguments by their names.
        pairwise: mark as slow what is not needed for every two values of every two arguments to meet (``pairs.py``).
        **axes: values of each other argument.
    """
    found = cases(scene, *some, world=world, after=after, keeps=keeps, **axes)
    quick = thinned(found) if pairwise else found
    params = [pytest.param(case, id=case.id, marks=() if case in quick else pytest.mark.slow) for case in found]
    parametrised = pytest.mark.parametrize("ran", params, indirect=True)
    patient = pytest.mark.timeout(3600)  # the first test of a world size waits for the scenes of all
    return lambda test: patient(parametrised(test))


def thinned(found: list[Case]) -> list[Case]:
    """Those of ``found`` in which every two values meet that meet in any."""
    axes = [
        {"world": case.world, "after": case.after and case.after.id, **json.loads(case.arguments)} for case in found
    ]
    return [found[i] for i in covering(axes)]


class Launcher:
    """Runs cases, each once a session, and keeps their results."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._places: dict[Case, Path] = {}
        self._running: set[subprocess.Popen] = set()
        self._ended = False
        self._launches = itertools.count()

    def result(self, case: Case, wanted: Iterable[Case]) -> Ran:
        """The result of ``case``; where it must be run, all of ``wanted`` are run with it."""
        if case not in self._places:
            self._run_all([*wanted, case])
        place = self._places[case]
        reports = _reports(place)
        if reports:
            pytest.fail("\n".join(f"{report.name}:\n{report.read_text()}" for report in reports), pytrace=False)
        before = self.result(case.after, wanted) if case.after else None
        results = [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(case.world)]
        return Ran(case, results, before)

    def _run_all(self, wanted: Iterable[Case]) -> None:
        """Run what has not been run of ``wanted``, and of what that goes on from, in its order."""
        fresh = [case for case in dict.fromkeys(c for one in wanted for c in _chain(one)) if case not in self._places]
        for case in fresh:
            self._places[case] = self._directory / f"case{len(self._places)}"
            self._places[case].mkdir()
        left = dict.fromkeys(fresh)
        while left:
            waiting = {case.world for case in left if case.after in left and case.after.world != case.world}
            # A world size waits for the files of another; of two that wait for each other, for what waits for nothing.
            now = [case for case in left if case.world not in waiting] or [c for c in left if c.after not in left]
            left = dict.fromkeys(case for case in left if case not in set(now))
            worlds = sorted({case.world for case in now})
            self._side_by_side([lane for world in worlds for lane in _lanes([c for c in now if c.world == world])])

    def _side_by_side(self, lanes: list[list[Case]]) -> None:
        """Run lists of cases, each one after the other, of one world size; ended by hand, nothing goes on."""
        with ThreadPoolExecutor(LAUNCHES) as pool:
            try:
                for done in [pool.submit(self._run, lane[0].world, lane) for lane in lanes]:
                    done.result()
            except BaseException:
                self._ended = True
                for process in list(self._running):
                    process.terminate()
                raise

    def _run(self, world: int, cases: list[Case]) -> None:
        while cases and not self._ended:
            code, log = self._launch(world, cases)
            left = [case for case in cases if not self._finished(case)]
            if left and len(left) == len(cases):  # not one: blame the first, go on with the others
                report = self._places[left[0]] / "launch.failed"
                report.write_text(f"the launch ended with code {code}. Its last output:\n{log[-4000:]}")
                left = left[1:]
            cases = left

    def _entry(self, case: Case) -> dict[str, Any]:
        before = {"before": str(self._places[case.after])} if case.after else {}
        arguments = {**json.loads(case.arguments), **before}
        place = str(self._places[case])
        return {"module": case.module, "scene": case.scene, "arguments": json.dumps(arguments), "place": place}

    def _finished(self, case: Case) -> bool:
        place = self._places[case]
        return bool(_reports(place)) or len(list(place.glob("rank*.pt"))) == case.world

    def _launch(self, world: int, cases: list[Case]) -> tuple[int, str]:
        name = f"launch{next(self._launches)}-world{world}"
        listing = self._directory / f"{name}.json"
        listing.write_text(json.dumps([self._entry(case) for case in cases]))
        port = free_port()
        paths = [str(_HERE.parent.parent), str(_HERE.parent), str(_HERE), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", world, "--master_port", port]
        command += [_HERE / "driver.py", listing]
        log = self._directory / f"{name}.log"
        try:
            with log.open("w") as file:
                process = subprocess.Popen(
                    list(map(str, command)),
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=self._directory,
                    preexec_fn=_end_with_parent,
                )
                self._running.add(process)
                code = process.wait()
                self._running.discard(process)
        finally:
            remove_shared_buffers(port)
        return code, log.read_text()


def _chain(case: Case) -> list[Case]:
    """``case`` after all that must be run before it."""
    return [case] if case.after is None else [*_chain(case.after), case]


def _lanes(cases: list[Case]) -> list[list[Case]]:
    """Lists that can run at the same time: a case stays with the one it goes on from."""
    families: dict[Case, list[Case]] = {}
    for case in cases:
        families.setdefault(next(c for c in _chain(case) if c.world == case.world), []).append(case)
    count = LAUNCHES if len(cases) > FEW else 1
    lanes = [[case for family in list(families.values())[i::count] for case in family] for i in range(count)]
    return [lane for lane in lanes if lane]


def _reports(place: Path) -> list[Path]:
    """What failed or hung there; the watchdog's file is empty for a rank that did neither."""
    return sorted(path for kind in ("*.failed", "*.stuck") for path in place.glob(kind) if path.stat().st_size)


def remove_shared_buffers(port: int) -> None:
    """DeepSpeed's CPU backend leaves 69 MB a rank in /dev/shm, named by the port of the run."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def _end_with_parent() -> None:
    """Have Linux tell the launcher to stop when pytest is killed, or the thread ends that waits: it stops its ranks."""
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
