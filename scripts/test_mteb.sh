#!/usr/bin/env bash
# mteb's own LanguageBind wrappers on this library. mteb lives in an environment of its own, laid over ours:
# neither depends on the other.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
MTEB_VENV="${MTEB_VENV:-.venv-mteb}"
bash scripts/setup.sh
if [ ! -e "$MTEB_VENV/whole" ]; then
    echo "setting up $MTEB_VENV"
    "$VENV/bin/python" -m venv "$MTEB_VENV"
    ours="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    theirs="$("$MTEB_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # A .pth in that folder would not be read from here, so the checkout is named as well.
    printf '%s\n%s\n' "$ours" "$PWD" >"$theirs/ours.pth"
    "$MTEB_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'mteb==2.26.0'
    touch "$MTEB_VENV/whole"
fi
"$MTEB_VENV/bin/python" -m pytest -q tests/test_mteb.py "$@"
