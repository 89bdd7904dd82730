#!/usr/bin/env bash
# The larger model: eight H100s for some 40 hours, about 1000 dollars (predicted). It is speedrun.sh with other numbers and
# takes the same variables.
#
#     bash run1000.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Depth 34 at 20 tokens per scaling parameter is 5.3e20 FLOPs, 40 hours at 47% of the bf16 peak (python -m dev.estimate
# --depth 34 --vocab-size 49152 --ratio 20 --mfu 0.47): 950 dollars. The same money would train depth 38 at the
# compute-optimal 10 to 12 tokens; near the optimum the loss hardly depends on the shape (Hoffmann et al.,
# arXiv:2203.15556), and the smaller model fits a batch into 80 GB and is cheaper to run.
export DEPTH=${DEPTH:-34} RATIO=${RATIO:-20}
# The best vocabulary grows slowly with the model: 43 thousand at 3 billion parameters (arXiv:2407.13623). So the
# speedrun's is kept, and its tokenizer is reused if it exists.
export VOCAB_SIZE=${VOCAB_SIZE:-49152}
# The number of rows that fit is determined at the start; the rest of the batch is accumulated
export BASE_FLAGS="--device-batch-size=-1 ${BASE_FLAGS:-}"
exec bash speedrun.sh
