#!/usr/bin/env bash
# Set up the environment, lint, check the types, run the tests. Arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
# One test opens the results page in a real browser; it is skipped without one.
if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing Chromium"
    { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } >/dev/null || echo "Chromium could not be installed: the browser test will be skipped" >&2
fi
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# Two processes. Each starts with half of the tests, in order, so that neighbours share fixtures, and takes the other's
# last tests when its own are done.
"$VENV/bin/python" -m pytest -q -n 2 --dist worksteal --durations 10 "$@"
