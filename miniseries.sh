#!/usr/bin/env bash
# A sweep over depth at a fixed number of tokens per scaling parameter: how loss and CORE fall and rise with compute.
# A change of the model or the recipe is worth having when it moves this whole line, not one point of it.
#
#     bash miniseries.sh                        # depths 10 to 20 on eight H100s, some three hours
#     DEPTHS="8 10 12 14" NPROC=1 bash miniseries.sh
#     TINY=1 bash miniseries.sh                 # four useless models on a CPU, without a data hub
#
# Each model is tagged mini_dDEPTH and adds one line to miniseries.jsonl in the base folder, which dev/plot.py draws and
# fits. Run it again after an interruption: finished models are passed over. Everything printed is also in log/miniseries.
#
# Variables, with their defaults: NANOCHAT_BASE_DIR, NPROC, SOURCE, BASE_FLAGS and DOLLARS as in speedrun.sh, and
#     DEPTHS       "10 12 14 16 18 20": each step about doubles the FLOPs, so that a power law shows over a factor of 36
#     RATIO        12: tokens per scaling parameter, of the 10 to 12 that are compute-optimal the one base_train's rates are for
#     VOCAB_SIZE   32768
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stages.sh

DEPTHS=${DEPTHS:-10 12 14 16 18 20} RATIO=${RATIO:-12} VOCAB_SIZE=${VOCAB_SIZE:-32768}
# CORE is measured at the end only, and on all questions, which is less noise. Checkpoints are for going on after an accident.
base=(--target-param-data-ratio="$RATIO" --source="$SOURCE" --eval-every=500 --save-every=1000 --keep-last=1
    --core-metric-every=1000000 --core-metric-max-per-task=-1 --sample-every=-1)
read -ra more <<<"${BASE_FLAGS:-}"
base+=("${more[@]}")
estimate=(--check)

if [[ -n $TINY ]]; then
    DEPTHS="1 2 3 4" VOCAB_SIZE=600
    base+=("${tiny[@]}" --core-metric-max-per-task=2)
    estimate=()
fi
read -ra depths <<<"$DEPTHS"
prepare "$NANOCHAT_BASE_DIR/log/miniseries"

# Half of the bf16 peak is for larger models: 46% have been reached at depth 18, smaller ones reach less.
estimate+=("${base[@]}" --vocab-size="$VOCAB_SIZE" --gpus="$NPROC" --mfu=0.45 --dollars-per-gpu-hour="${DOLLARS:-3}" --depth "${depths[@]}")
logged estimate python -m dev.estimate "${estimate[@]}"
shards=$(python -m dev.estimate "${estimate[@]}" --shards)
fetch_and_tokenize "$SOURCE" "$shards" "$VOCAB_SIZE"

tags=()
for depth in "${depths[@]}"; do
    tag=mini_d$depth
    train "base_train_d$depth" "base_checkpoints/$tag" launch scripts.base_train --depth="$depth" --model-tag="$tag" "${base[@]}"
    python -m dev.plot --add "$tag"
    tags+=("$tag")
done
logged plot python -m dev.plot "${tags[@]}"
