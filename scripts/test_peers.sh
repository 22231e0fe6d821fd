#!/usr/bin/env bash
# Test mteb's own LanguageBind wrappers on this library, and CLIP_benchmark with our models. They have an environment of
# their own on top of ours, since neither depends on the other. CLIP_benchmark 1.6.2 needs NumPy before 2.4.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
PEERS_VENV="${PEERS_VENV:-.venv-peers}"
bash scripts/setup.sh
if [ ! -e "$PEERS_VENV/whole" ]; then
    echo "setting up $PEERS_VENV"
    "$VENV/bin/python" -m venv "$PEERS_VENV"
    ours="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    theirs="$("$PEERS_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # A .pth file inside that folder would not be read, so the checkout is listed as well.
    printf '%s\n%s\n' "$ours" "$PWD" >"$theirs/ours.pth"
    "$PEERS_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint <(grep -v '^numpy==' constraints.txt) 'mteb==2.26.0' clip-benchmark 'numpy<2.4'
    touch "$PEERS_VENV/whole"
fi
"$PEERS_VENV/bin/python" -m pytest -q tests/test_mteb.py tests/test_clip_benchmark.py "$@"
