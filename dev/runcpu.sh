#!/usr/bin/env bash
# The main job end to end on a CPU, in minutes: tokenizer, base, mid, SFT, evaluations, report, a chat.
#
#     bash dev/runcpu.sh
#
# If a data hub can be reached (HF_ENDPOINT, or the public one), it trains on real text and conversations.
# Otherwise it trains on the built-in sample world, and the model answers questions about that world.
# Artifacts go to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/setup.sh cpu
source .venv/bin/activate

python -m nanochat.report reset
python -m dev.gen_identity
if python -m nanochat.dataset -n 2 --source climbmix; then
    # A vocabulary of 16384 from 50 million characters: at depth 4 a larger one costs more time than it saves
    python -m scripts.tok_train --source climbmix --vocab-size 16384 --max-chars 50000000
    python -m scripts.tok_eval --source climbmix
    python -m scripts.base_train --source climbmix --depth 4 --max-seq-len 512 --device-batch-size 8 \
        --total-batch-size 4096 --num-iterations 200 --eval-every 100 --core-metric-every -1
    python -m scripts.base_loss --split-tokens 65536 --device-batch-size 8
    python -m scripts.base_eval --max-per-task 16
    python -m scripts.mid_train --num-iterations 60 --eval-every 20 --eval-tokens 32768
    python -m scripts.chat_sft --num-iterations 60 --eval-every 20 --eval-tokens 32768
    python -m scripts.chat_eval -i sft -x 20 -m 128
    question="Why is the sky blue?"
else
    echo "No data hub can be reached (see above): training on the built-in sample world instead."
    python -m scripts.tok_train --source sample --vocab-size 4096
    python -m scripts.tok_eval --source sample
    python -m scripts.base_train --source sample --depth 4 --max-seq-len 512 --device-batch-size 8 \
        --total-batch-size 4096 --num-iterations 450 --eval-every 150 --core-metric-every -1
    python -m scripts.base_loss --split-tokens 65536 --device-batch-size 8
    python -m scripts.base_eval --max-per-task 16
    python -m scripts.mid_train --tasks SampleWorld,Identity --num-iterations 60 --eval-every 20 --eval-tokens 32768
    python -m scripts.chat_sft --tasks SampleWorld,Identity --num-iterations 120 --eval-every 40 --eval-tokens 32768
    python -m scripts.chat_eval -i sft -a SampleWorld
    question="What is the capital of France?"
fi
python -m nanochat.report generate
echo "you: $question"
echo -n "nanochat: "
python -m scripts.chat_cli -i sft -t 0 -p "$question"
echo
echo "To chat with it: source .venv/bin/activate && python -m scripts.chat_cli"
