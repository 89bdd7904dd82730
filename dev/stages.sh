# Functions that speedrun.sh and miniseries.sh share, for a run of several stages. Sourced from the repository's folder.
#
# A stage is done when it has logged its results to the report. Then $log/STAGE.done is written, and the stage is skipped
# when the script is run again. A training that was stopped has logged nothing; next time it resumes from its newest
# checkpoint.

export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR/#\~\//$HOME/}  # as Python does
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}  # seconds that torchrun waits for a last save
TINY=${TINY:-}
if [[ -n $TINY ]]; then
    NPROC=${NPROC:-1} SOURCE=${SOURCE:-sample}
    export CUDA_VISIBLE_DEVICES='' TORCH_COMPILE_DISABLE=1  # compiling would take longer than these few steps
else
    NPROC=${NPROC:-8} SOURCE=${SOURCE:-climbmix}
fi
# Flags of a TINY base model, besides its depth
tiny=(--aspect-ratio=32 --head-dim=32 --max-seq-len=64 --device-batch-size=4 --total-batch-size=512 --num-iterations=8 --eval-tokens=1024)

fail() { echo "error: $*" >&2; exit 1; }

prepare() {  # LOGS: check the GPUs, set up, and keep the output of the stages in that folder
    local gpus kind=gpu
    gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
    if [[ -n $TINY ]]; then kind=cpu; elif ((gpus == 0)); then
        fail "no GPU was found (nvidia-smi -L). On a CPU: bash dev/runcpu.sh, or TINY=1 to check that this script works"
    elif ((gpus < NPROC)); then
        fail "$NPROC GPUs are needed and this machine has $gpus. Use NPROC=$gpus; the same run then takes longer"
    fi
    log=$1
    mkdir -p "$log"
    bash dev/setup.sh "$kind"
    source .venv/bin/activate
}

launch() {  # MODULE FLAGS...: on all ranks; behind -- torchrun does not take --run for an abbreviation of its own flags
    if ((NPROC > 1)); then torchrun --standalone --nproc-per-node="$NPROC" -m "$1" -- "${@:2}"; else python -m "$@"; fi
}

logged() {  # NAME COMMAND...: run it with its output on the terminal and appended to a file
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee -i -a "$log/$name.log"  # -i: output after Ctrl-C is kept
}

report_lines() { { wc -l <"$NANOCHAT_BASE_DIR/report/report.jsonl"; } 2>/dev/null || echo 0; }

stage() {  # NAME COMMAND...: run it unless it is done
    local before
    if [[ -e $log/$1.done ]]; then echo "== $1: already done"; return; fi
    before=$(report_lines)
    logged "$@"
    if (($(report_lines) > before)); then touch "$log/$1.done"; fi
}

train() {  # NAME FOLDER COMMAND...: a stage with checkpoints in FOLDER, resumed from the newest
    local name=$1 folder=$NANOCHAT_BASE_DIR/$2
    shift 2
    if compgen -G "$folder/step_*" >/dev/null; then set -- "$@" --resume-from-step=latest; else rm -f "$log/$name.done"; fi
    stage "$name" "$@"
    [[ -e $log/$name.done ]] || fail "$name was stopped; run this again to resume from its checkpoint in $folder"
}

text_and_tokenizer() {  # VOCAB_SIZE FLAGS...: estimate a run with these flags of dev.estimate, then get its text and tokenizer
    local shards download flags=("${@:2}" --vocab-size="$1" --gpus="$NPROC" --dollars-per-gpu-hour="${DOLLARS:-3}")
    [[ -n $TINY ]] || flags+=(--check)
    logged estimate python -m dev.estimate "${flags[@]}"
    shards=$(python -m dev.estimate "${flags[@]}" --shards)
    # Eight shards have the 2 billion characters that tok_train reads; an unreachable hub is noticed here. Existing
    # text is only checked. The rest is downloaded while the tokenizer is trained.
    logged dataset python -m nanochat.dataset -n 8 --source="$SOURCE"
    python -m nanochat.dataset -n "$shards" -w 8 --source="$SOURCE" >>"$log/dataset.log" 2>&1 &
    download=$!
    trap "kill $download 2>/dev/null || true" EXIT
    if [[ ! -e $NANOCHAT_BASE_DIR/tokenizer/vocabulary.json ]]; then
        logged tok_train python -m scripts.tok_train --source="$SOURCE" --vocab-size="$1"
    fi
    stage tok_eval python -m scripts.tok_eval --source="$SOURCE"
    echo "waiting for $shards shards of text ($log/dataset.log)"
    wait "$download" || fail "the text could not be downloaded: $(tail -n 1 "$log/dataset.log")"
    trap - EXIT
}
