#!/usr/bin/env bash
# Create the environment for the demo and the tests. Running it again does nothing unless the requirements changed.
# VENV=/some/place creates it there instead of in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version)" >&2; exit 2; }
stamp="$VENV/.requirements.sha256"
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

# torchcodec needs FFmpeg's libraries to read video; without them the other video backends are used.
if ! ldconfig -p 2>/dev/null | grep -q libavcodec && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing FFmpeg"
    { apt-get update -q && apt-get install -y -q --no-install-recommends ffmpeg; } >/dev/null || echo "FFmpeg could not be installed: torchcodec will not be used" >&2
fi

echo "setting up $VENV (PyTorch is large: a few minutes)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
echo "$wanted" >"$stamp"
