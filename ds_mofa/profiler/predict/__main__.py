"""A prediction in a process of its own, as JSON into a file: beside a training process it touches neither ranks nor device.

python -m ds_mofa.profiler.predict torch:MoFaSGD:r=8:seq=1024:model=shape.json prediction.json
"""

import json
import sys
from pathlib import Path

from ds_mofa.profiler.predict.prediction import predict
from ds_mofa.profiler.setting import RunSetting, SettingError


def main(run: str, output: str) -> None:
    try:
        found = predict(RunSetting.parse(run))
    except SettingError as error:
        found = {"error": str(error)}
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
