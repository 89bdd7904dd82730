#!/usr/bin/env bash
# A sweep over depth at a fixed number of tokens per scaling parameter: loss and CORE as functions of compute.
# A change of the model or the recipe is an improvement if it moves the whole curve, not one point of it.
#
#     bash miniseries.sh                        # depths 10 to 20 on eight H100s, some three hours
#     DEPTHS="8 10 12 14" NPROC=1 bash miniseries.sh
#     TINY=1 bash miniseries.sh                 # four tiny models on a CPU, without a data hub
#
# Each model has the tag mini_dDEPTH; dev/plot.py plots them and fits a power law to their losses. After an interruption
# run it again: finished models are skipped. All output is also in log/miniseries.
#
# Variables, with their defaults: NANOCHAT_BASE_DIR, NPROC, SOURCE, BASE_FLAGS and DOLLARS as in speedrun.sh, and
#     DEPTHS       "10 12 14 16 18 20": each about doubles the FLOPs, a factor of 36 in all
#     RATIO        12: tokens per scaling parameter; 10 to 12 are compute-optimal, and base_train's rates are tuned for 12
#     VOCAB_SIZE   32768
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stages.sh

DEPTHS=${DEPTHS:-10 12 14 16 18 20} RATIO=${RATIO:-12} VOCAB_SIZE=${VOCAB_SIZE:-32768}
# CORE is measured at the end, on all questions, for less noise. Checkpoints only serve to resume.
base=(--target-param-data-ratio="$RATIO" --source="$SOURCE" --eval-every=500 --save-every=1000 --keep-last=1
    --core-metric-every=1000000 --core-metric-max-per-task=-1 --sample-every=-1)
read -ra more <<<"${BASE_FLAGS:-}"
base+=("${more[@]}")

if [[ -n $TINY ]]; then
    DEPTHS="1 2 3 4" VOCAB_SIZE=600
    base+=("${tiny[@]}" --core-metric-max-per-task=2)
fi
read -ra depths <<<"$DEPTHS"
prepare "$NANOCHAT_BASE_DIR/log/miniseries"

# Only larger models reach half of the bf16 peak: others report 46% at depth 18, and less for smaller models
text_and_tokenizer "$VOCAB_SIZE" "${base[@]}" --mfu=0.45 --depth "${depths[@]}"

tags=()
for depth in "${depths[@]}"; do
    tag=mini_d$depth
    train "base_train_d$depth" "base_checkpoints/$tag" launch scripts.base_train --depth="$depth" --model-tag="$tag" "${base[@]}"
    tags+=("$tag")
done
logged plot python -m dev.plot "${tags[@]}"
