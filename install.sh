#!/usr/bin/env bash
# Make a virtual environment with everything that `make train` and `make test` need, at the pinned versions.
#
#   bash install.sh [folder]        default folder: .venv
#
# PYTHON       interpreter to build it from (3.11 to 3.13; default: python3)
# TORCH_INDEX  package index to take torch from, where the default one has not the build you want. Without a GPU,
#              https://download.pytorch.org/whl/cpu spares a download of several GB of CUDA libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=${1:-.venv}
python=${PYTHON:-python3}

step() { # step "what it does" "what to do when it fails" command...
  local what=$1 advice=$2
  shift 2
  echo "[set-up] $what"
  "$@" || {
    echo "[set-up] FAILED: $what" >&2
    echo "[set-up] What to do: $advice. Then run the same command again; it goes on from here." >&2
    exit 1
  }
}

network="see the message above; with a network problem, check that pip reaches a package index (pip config list)"
pip() { "$venv/bin/python" -m pip install --quiet --progress-bar off --constraint constraints.txt "$@"; }

step "checking $python" "install Python 3.11 to 3.13, or name one: make PYTHON=python3.12 ..." \
  "$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(f"found Python {v[0]}.{v[1]}") if not (3, 11) <= v < (3, 14) else None'
step "making the virtual environment $venv" "install the venv module (Debian: apt install python3-venv)" \
  "$python" -m venv "$venv"
step "installing torch (the longest step)" "$network" \
  pip torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
# DeepSpeed's own build imports torch, so it cannot run in pip's isolated environment and needs its tools here.
step "installing build tools" "$network" pip setuptools wheel ninja
step "installing DeepSpeed" "$network" pip --no-build-isolation deepspeed
step "installing ds_mofa, with what training and tests need" "$network" \
  pip --no-build-isolation --editable ".[all]"
step "checking that it imports" "remove $venv (make clean) and run again" \
  env DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" "$venv/bin/python" -c '
import deepspeed, torch, transformers, trl
print(f"[set-up] torch {torch.__version__}, deepspeed {deepspeed.__version__}, "
      f"transformers {transformers.__version__}, trl {trl.__version__}, "
      f"{torch.cuda.device_count()} GPUs")'
