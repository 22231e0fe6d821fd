#!/usr/bin/env bash
# Measure what a partner in training does, on the sample world; docs/partners.md has the results.
#   bash scripts/partners.sh infrared depth               # infrared with partner depth: 15 minutes on two cores
#   SEEDS="0 1 2" bash scripts/partners.sh infrared depth
#   bash scripts/partners.sh audio video depth            # also against depth, which audio never met
# WEIGHTS are those of the partner's loss. Every encoder takes 300 steps of 128; there are 512 test scenes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: $0 MODALITY PARTNER [OTHER...]" >&2; exit 2; }
python=${PYTHON:-${VENV:-.venv}/bin/python}
trained=$1 partner=$2 others=("${@:3}")
world=data/partners-$(IFS=-; echo "$*") logs=logs/partners-$(IFS=-; echo "$*")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

if [ ! -d "$world" ]; then
    # Without --own-sounds, a scene's sound tells nothing about its pictures
    "$python" -m languagebind.data.world --output "$world.new" --num-train 2000 --num-test 512 --own-sounds --modalities "$@"
    "$python" -m languagebind make-shards vidal --annotation "$world.new/train/vidal.json" --root "$world.new/train" \
        --modality "$@" --samples-per-shard 250 --output "$world.new/shards"
    for name; do
        "$python" -m languagebind embed-text --train-data "$world.new/shards" --config "demo/$name"
    done
    mv "$world.new" "$world"
fi

train() { # NAME RECIPE FLAGS
    [ -f "$logs/$1/done" ] || "$python" -m training.main --config "demo/$2" --name "$1" --logs "$logs" --epochs 20 \
        --train-data "$world/shards" "${@:3}"
    touch "$logs/$1/done"
}

compare() { # QUERY GALLERY, each with =RUN unless it is text
    local query=${1%=*} gallery=${2%=*} models=()
    for side; do [[ $side = text ]] || models+=("${side%=*}=$logs/${side#*=}"); done
    printf '%s\n' "name: ${query}_to_$gallery" "query: $query" "gallery: $gallery" "split: test" \
        "data: {$query: ${query/text/$gallery}_test.jsonl, $gallery: ${gallery}_test.jsonl}" \
        "metric: query_to_gallery/R@10" >"$world/eval/${query}_to_$gallery.yaml"
    "$python" -m languagebind pairs --config "$world/eval/${query}_to_$gallery.yaml" --model "${models[@]}" \
        --output "$logs/results" --overwrite
}

for name in "$partner" "${others[@]}"; do train "$name" "$name"; done
"$python" -m languagebind embed-anchor --train-data "$world/shards" --anchor "$logs/$partner"
for seed in ${SEEDS:-0}; do
    for weight in ${WEIGHTS:-0 0.5 1}; do
        run=$trained-weight$weight-seed$seed
        train "$run" "$trained" --seed "$seed" --anchor "$logs/$partner" --anchor-weight "$weight"
        for other in "$partner" "${others[@]}"; do compare "$trained=$run" "$other=$other"; done
        compare text "$trained=$run"
    done
done
"$python" -m languagebind report "$logs/results"
