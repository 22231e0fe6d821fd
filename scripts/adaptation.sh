#!/usr/bin/env bash
# Measure how to adapt an encoder to a few samples of another sensor; docs/your_own_data.md has the results.
#   bash scripts/demo.sh --modality depth       # the encoder to adapt, 4 minutes on two cores
#   bash scripts/adaptation.sh 1000             # on 1,000 samples, 20 minutes
#   bash scripts/adaptation.sh 3000 --epochs 4  # on 3,000, with other flags of training
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-${VENV:-.venv}/bin/python}
samples=${1:-1000} more=("${@:2}")
encoder=$(ls logs/demo/depth/checkpoints/step_*.pt) original=data/demo/world-2000-512-0-depth/eval
data=data/adaptation-$samples logs=logs/adaptation-$samples
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

if [ ! -d "$data" ]; then
    "$python" -m languagebind.data.world --output "$data.new" --num-train $((samples * 5 / 4)) --num-test 512 --seed 1 \
        --modalities depth
    # Another sensor: it reads 60 % of the distance, with 3 % noise, and 2 % of its pixels are empty.
    "$python" - "$data.new" <<'END'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
for path in sorted(Path(sys.argv[1]).rglob("*.png")):
    depth = np.asarray(Image.open(path)) * 0.6 * rng.normal(1, 0.03, (96, 96)) * (rng.random((96, 96)) > 0.02)
    Image.fromarray(depth.round().astype(np.uint16)).save(path)
END
    "$python" -m languagebind make-shards jsonl --manifest "$data.new/eval/depth_train.jsonl" --root "$data.new/eval" \
        --modality depth --split train=0.8 val=0.2 --samples-per-shard 250 --output "$data.new/shards"
    "$python" -m languagebind embed-text --train-data "$data.new/shards/train" --config demo/depth --config adapt
    for name in test retrieval; do
        sed "s/^name: .*/name: new_$name/" "$data.new/eval/depth_$name.yaml" >"$data.new/eval/new_$name.yaml"
    done
    sed "s|^name: .*|name: val|; s|^data: .*|data: ../shards/val|" "$data.new/eval/depth_test.yaml" >"$data.new/eval/val.yaml"
    mv "$data.new" "$data"
fi

score() { # CHECKPOINT: on the new sensor's test set, and on the demo's
    "$python" -m languagebind eval --config "$data"/eval/new_{test,retrieval}.yaml "$original"/depth_{test,retrieval}.yaml \
        --checkpoint "$1" --output "$logs/results" --skip-existing
}

adapt() { # NAME FLAGS
    name=$1
    shift
    [ -f "$logs/$name/done" ] || "$python" -m training.main --config demo/depth --config adapt --name "$name" \
        --encoder-pretrained "$encoder" --train-data "$data/shards/train" --val-config "$data/eval/val.yaml" \
        --val-every-n-steps $((samples / 64 * 2)) --keep-best val/top1 --keep-last 1 --logs "$logs" "${more[@]}" "$@"
    touch "$logs/$name/done"
    score "$logs/$name/checkpoints/best.pt"
}

halfway() { # NAME: the mean of the weights before and after a run
    mkdir -p "$logs/$1-halfway/checkpoints"
    "$python" - "$encoder" "$logs/$1/checkpoints/best.pt" "$logs/$1-halfway/checkpoints/best.pt" <<'END'
import sys

import torch

start, end = (torch.load(path, weights_only=True) for path in sys.argv[1:3])
for name, value in end["model"].items():
    if "lora_B" in name:
        value.mul_(0.5)
    elif "lora_A" not in name:
        value.lerp_(start["model"][name.replace(".base_layer.", ".")], 0.5)
torch.save(end, sys.argv[3])
END
    score "$logs/$1-halfway/checkpoints/best.pt"
}

score "$encoder"
for lr in 1e-4 5e-4 2e-3; do
    adapt "lora-$lr" --lr "$lr"
    halfway "lora-$lr"
done
for lr in 1e-4 5e-4; do
    adapt "full-$lr" --tuning full --lr "$lr"
    halfway "full-$lr"
done
adapt head --tuning head --lr 2e-3
adapt scratch --tuning full --lr 1e-3 --encoder-pretrained none --init-temperature 0.033 --epochs 20 --warmup 60
"$python" -m languagebind report "$logs/results"
