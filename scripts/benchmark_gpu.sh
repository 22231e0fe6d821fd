#!/usr/bin/env bash
# Measure training on one GPU in less than eight minutes, without a network, and keep what is printed and the figures:
#     bash scripts/benchmark_gpu.sh OUTPUT [--toy]
# Needs PyTorch, torchvision, transformers, timm and PEFT. A run that is cut short leaves the figures until then.
set -euo pipefail
: "${1:?usage: bash scripts/benchmark_gpu.sh OUTPUT [--toy]}"
mkdir -p "$1"
output=$(realpath "$1")
cd "$(dirname "$0")/.."
PYTHONPATH=".:${PYTHONPATH:-}" "${PYTHON:-python3}" -u scripts/benchmark.py gpu --output "$output/figures.json" "${@:2}" 2>&1 | tee "$output/report.txt"
