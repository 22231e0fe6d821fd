#!/usr/bin/env bash
# Create an environment with the original's package from PyPI, languagebind 0.1.0, for `benchmark.py compare`.
#   VENV=/some/place bash scripts/setup_original.sh
# VENV names its folder (default: .venv-original). TORCH_FROM=/some/venv/bin/python links that environment's packages
# instead of installing PyTorch again (5 GB); the new environment's own packages come first.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv-original}"
PYTHON="${PYTHON:-python3}"
TORCH=2.11.0

"$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# Before anything is linked: pip would take this repository's package, of the same name, for it.
pip --no-deps languagebind==0.1.0
if [ -n "${TORCH_FROM:-}" ]; then
    found="$("$TORCH_FROM" -c 'import torch; print(torch.__version__.partition("+")[0])')"
    [ "$found" = "$TORCH" ] || { echo "error: $TORCH_FROM has torch $found, not $TORCH" >&2; exit 2; }
    packages="$("$TORCH_FROM" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "$packages" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_from.pth"
else
    pip "torch==$TORCH"
fi
# 0.1.0 needs transformers before 5. Its decoders are not installed: pytorchvideo needs a torchvision from before 2024.
pip 'transformers==4.57.*' 'peft>=0.15' 'einops>=0.8' 2>&1 | { grep -v 'dependency resolver\|requires .* but you have' || true; }
"$VENV/bin/python" - <<'END'
import einops, peft, torch, transformers
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
END
echo "the original's interpreter: $VENV/bin/python"
