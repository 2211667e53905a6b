"""One rank: run the listed scenes, write what each returns, or the traceback and stop."""

import argparse
import faulthandler
import gc
import importlib
import json
import logging
import os
import random
import sys
import time
import traceback
import unittest.mock
from pathlib import Path

import deepspeed
import numpy
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from launching import remove_shared_buffers

import ds_mofa  # noqa: F401  registers the optimizer's name

SECONDS_PER_SCENE = 120  # a scene that needs more has an attribute "seconds"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("listing", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher's
    listing = parser.parse_args().listing

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed says no on a CPU; PyTorch can
    deepspeed.init_distributed(dist_backend="gloo")
    dist.barrier()
    remove_shared_buffers(int(os.environ["MASTER_PORT"]))  # mapped by now: the names are needed no more
    known = 0
    for entry in json.loads(listing.read_text()):
        if len(sys.modules) > known:
            known = len(sys.modules)
            spare_collector()
        began, worked = time.perf_counter(), time.process_time()
        run(entry, Path(entry["place"]), dist.get_rank())
        dist.barrier()
        if dist.get_rank() == 0:
            took = f"{time.perf_counter() - began:7.2f} s {time.process_time() - worked:7.2f} s of CPU"
            print(f"{took}  {entry['module']} {entry['scene']} {entry['arguments']}", flush=True)


def spare_collector() -> None:
    """Have the garbage collector leave out what is there: a million objects of the imported modules.

    A collection costs half a second otherwise, and there are several in a scene: ZeRO-3 collects with each engine.
    """
    gc.collect()
    gc.freeze()


def run(entry: dict, place: Path, rank: int) -> None:
    """A scene that fails, or that hangs, ends this process."""
    stuck = place / f"rank{rank}.stuck"
    try:
        with stuck.open("w") as file:
            scene = getattr(importlib.import_module(entry["module"]), entry["scene"])
            faulthandler.dump_traceback_later(getattr(scene, "seconds", SECONDS_PER_SCENE), exit=True, file=file)
            random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
            os.chdir(place)  # where a scene may leave files; shared by its ranks
            with unittest.mock.patch.dict(os.environ):  # Accelerate and the Trainer leave their settings there
                result = scene(**json.loads(entry["arguments"]))
            faulthandler.cancel_dump_traceback_later()
        stuck.unlink()
        torch.save(result, place / f"rank{rank}.pt")
    except BaseException:
        (place / f"rank{rank}.failed").write_text(traceback.format_exc())
        sys.exit(1)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's: it outlives its engine, and the next one would use it
    gc.collect()


if __name__ == "__main__":
    main()
