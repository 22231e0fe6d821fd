#!/usr/bin/env bash
# Create an environment for OpenCLIP's trainer, which needs an older webdataset, for `benchmark.py compare --with open_clip`.
#   VENV=/some/place PYTHON=/some/venv/bin/python bash scripts/setup_open_clip.sh
# VENV names its folder (default: .venv-open-clip). It links the packages of PYTHON (default: python3), which is to have
# this library's: so both sides use the same PyTorch, and it takes 50 MB. Its own packages come first.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv-open-clip}"
PYTHON="${PYTHON:-python3}"

packages="$("$PYTHON" -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))')"
"$PYTHON" -m venv "$VENV"
echo "$packages" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/linked.pth"
# The linked packages ask for the newer webdataset, of which pip warns.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'open_clip_torch[training]==3.3.0' 2>&1 |
    { grep -v 'dependency resolver\|requires .* but you have' || true; }
"$VENV/bin/python" -c 'import open_clip, open_clip_train.main, torch, webdataset
print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, webdataset {webdataset.__version__}")'
echo "OpenCLIP's interpreter: $VENV/bin/python"
