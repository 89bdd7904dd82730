#!/usr/bin/env bash
# The main job on a new node of eight H100s, in some two hours (predicted): setup, tokenizer, base, mid, SFT, evaluations,
# report, a chat. The base model is meant to reach GPT-2's CORE; this has not been run yet.
#
#     bash speedrun.sh                      # in tmux or screen, so that it outlives your connection
#     NPROC=1 DEPTH=12 bash speedrun.sh     # one GPU, a smaller model
#     TINY=1 bash speedrun.sh               # all stages in minutes on a CPU, without a data hub; the model is useless
#
# After an interruption run it again: finished stages are skipped, and training resumes from its newest checkpoint.
# To start over, remove log/TAG and the checkpoint folders of TAG in the base folder. All output is also in log/TAG.
#
# Variables, with their defaults:
#     NANOCHAT_BASE_DIR  ~/.cache/nanochat: folder of all artifacts
#     NPROC              8: GPUs of this node; the model is the same with fewer
#     DEPTH, VOCAB_SIZE, RATIO    22, 49152, 9.4: the model and its tokens per scaling parameter
#     SOURCE             climbmix: or fineweb-edu, or a folder of parquet files
#     BASE_FLAGS         more flags for scripts.base_train, such as --fp8, or --device-batch-size=-1 on smaller GPUs
#     DOLLARS            3: per GPU and hour, for the estimate
#     RL                 1 adds reinforcement learning on GSM8K
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stages.sh

# The recipe: depth 22, a vocabulary of 49152, 9.4 tokens per scaling parameter. A comparable implementation on 8 H100s
# reached CORE 0.2618 +- 0.0023 with it over six runs, in 81.8 minutes of training; GPT-2 has 0.2565. About 10 to 12
# tokens per scaling parameter are compute-optimal, so the model is slightly large for its training time.
DEPTH=${DEPTH:-22} VOCAB_SIZE=${VOCAB_SIZE:-49152} RATIO=${RATIO:-9.4}
# ClimbMix (arXiv:2504.13161) instead of FineWeb-Edu took 27% off the time to GPT-2's CORE. Its licence, CC BY-NC 4.0,
# is for research; FineWeb-Edu's (ODC-By) also permits commercial use.
# All other flags have base_train's defaults. The batch follows from the horizon, here 2^20 tokens: two micro-batches of
# 32 rows on each of eight GPUs. base_eval measures CORE afterwards, on all questions. Bits per byte every 500 steps take
# 1 or 2% of the time; with checkpoints as often, a failure costs at most ten minutes.
# --fp8 is optional: it made depth 26 17% faster and smaller models less so, according to others.
base=(--depth="$DEPTH" --target-param-data-ratio="$RATIO" --source="$SOURCE" --eval-every=500 --save-every=500 --keep-last=2
    --core-metric-every=-1 --sample-every=-1)
read -ra more <<<"${BASE_FLAGS:-}"
base+=("${more[@]}")
# SFT has 22 thousand conversations, 5 to 10 million tokens: about a hundred steps of 2^16 tokens, four rows on each of
# eight GPUs. The learning rate follows the batch.
sft=(--device-batch-size=4 --total-batch-size=65536)
loss=() core=() mid=() tasks=() rl=() rl_tasks=(-a GSM8K)

if [[ -n $TINY ]]; then
    DEPTH=2 VOCAB_SIZE=600
    base+=(--depth=2 "${tiny[@]}") loss=(--split-tokens=512 --device-batch-size=4) core=(--max-per-task=4)
    mid=(--tasks=SampleWorld,Identity --num-iterations=4 --eval-tokens=1024) sft=("${mid[@]}")
    tasks=(-a SampleWorld -x 4 -m 8) rl_tasks=("${tasks[@]}")
    rl=(--task=SampleArithmetic --num-iterations=2 --examples-per-step=2 --num-samples=2 --max-new-tokens=16 --eval-examples=4)
fi
TAG=d$DEPTH
prepare "$NANOCHAT_BASE_DIR/log/$TAG"

if [[ ! -e $log/begun ]]; then python -m nanochat.report reset; touch "$log/begun"; fi
[[ -e $NANOCHAT_BASE_DIR/identity_conversations.jsonl ]] || python -m dev.gen_identity
# A pass is predicted to reach 50% of an H100's peak (dev/LOG.md, 23); the optimizer and communication take some of it
text_and_tokenizer "$VOCAB_SIZE" "${base[@]}" --mfu=0.47 --chat

train base_train "base_checkpoints/$TAG" launch scripts.base_train --model-tag="$TAG" "${base[@]}"
stage base_loss launch scripts.base_loss --model-tag="$TAG" "${loss[@]}"
stage base_eval launch scripts.base_eval --model-tag="$TAG" "${core[@]}"
train mid_train "mid_checkpoints/$TAG" launch scripts.mid_train --model-tag="$TAG" "${mid[@]}"
train chat_sft "chatsft_checkpoints/$TAG" launch scripts.chat_sft --model-tag="$TAG" "${sft[@]}"
stage chat_eval launch scripts.chat_eval -i sft -g "$TAG" "${tasks[@]}"
newest=sft
if [[ -n ${RL:-} ]]; then
    train chat_rl "chatrl_checkpoints/$TAG" launch scripts.chat_rl --model-tag="$TAG" "${rl[@]}"
    stage chat_eval_rl launch scripts.chat_eval -i rl -g "$TAG" "${rl_tasks[@]}"
    newest=rl
fi

python -m nanochat.report generate
echo "done after $((SECONDS / 60)) minutes"
question="Why is the sky blue?"
echo "you: $question"
echo -n "nanochat: "
python -m scripts.chat_cli -i "$newest" -g "$TAG" -p "$question"
echo
echo "To chat with it: source .venv/bin/activate && python -m scripts.chat_web -i $newest -g $TAG"
