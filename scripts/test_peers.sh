#!/usr/bin/env bash
# Test mteb's own LanguageBind wrappers on this library, CLIP_benchmark with our models, and our ImageBind against its
# authors' code. They have environments of their own on top of ours. CLIP_benchmark 1.6.2 needs NumPy before 2.4, and
# ImageBind's licence, CC-BY-NC-SA, is kept apart from this library.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
PEERS_VENV="${PEERS_VENV:-.venv-peers}"
IMAGEBIND_VENV="${IMAGEBIND_VENV:-.venv-imagebind}"
bash scripts/setup.sh

# Usage: environment FOLDER PIP_OPTIONS..., which are not used again once the environment is whole
environment() {
    local folder="$1" ours theirs
    shift
    if [ -e "$folder/whole" ]; then return; fi
    echo "setting up $folder"
    "$VENV/bin/python" -m venv "$folder"
    ours="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    theirs="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # A .pth file inside that folder would not be read, so the checkout is listed as well.
    printf '%s\n%s\n' "$ours" "$PWD" >"$theirs/ours.pth"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    touch "$folder/whole"
}

environment "$PEERS_VENV" --constraint <(grep -v '^numpy==' constraints.txt) 'mteb==2.26.0' clip-benchmark 'numpy<2.4'
environment "$IMAGEBIND_VENV" --no-deps 'imagebind-unofficial==0.1.1' 'setuptools<81' iopath portalocker \
    'pytorchvideo==0.1.5' fvcore parameterized
"$IMAGEBIND_VENV/bin/python" -m pytest -q tests/test_imagebind_peer.py
"$PEERS_VENV/bin/python" -m pytest -q tests/test_mteb.py tests/test_clip_benchmark.py "$@"
