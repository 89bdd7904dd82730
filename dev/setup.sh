#!/usr/bin/env bash
# Creates .venv with all packages of the code and its tests: `bash dev/setup.sh [cpu|gpu]`.
# Safe to run again: it returns at once if pyproject.toml and rustbpe/ have not changed.
# Installs from PyTorch's own index if it can be reached, otherwise from the package index that pip or uv is
# configured for, including wheels in PIP_FIND_LINKS or UV_FIND_LINKS. Our rustbpe is built if there is a Rust
# toolchain; otherwise the published package of that name is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-cpu}
[[ $extra == cpu || $extra == gpu ]] || { echo "usage: bash dev/setup.sh [cpu|gpu]" >&2; exit 2; }
PATH=$PATH:${HOME:-}/.cargo/bin
stamp=.venv/installed-$extra.toml core_stamp=.venv/installed-rustbpe
core=$(cat rustbpe/*.toml rustbpe/setup.py rustbpe/src/*.rs rustbpe/python/rustbpe/*.py | cksum; command -v cargo || echo no cargo)
is_current() { [[ -x .venv/bin/python ]] && cmp -s pyproject.toml "$stamp"; }
core_is_current() { [[ -f $core_stamp && $(<"$core_stamp") == "$core" ]]; }
if is_current && core_is_current; then exit 0; fi

# uv, installed with pip if it is missing, into the home folder if the system's Python is managed
if command -v uv >/dev/null; then uv=(uv); else
    uv=(python3 -m uv)
    "${uv[@]}" --version >/dev/null 2>&1 || python3 -m pip install -q uv \
        || python3 -m pip install -q --user --break-system-packages uv
fi

pip_setting() { python3 -m pip config get "global.$1" 2>/dev/null || true; }
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}
[[ -z $index ]] || export UV_DEFAULT_INDEX=$index

# Python: the version of a local torch wheel, or else the machine's, or else one that uv downloads
python=$(python3 -c 'import sys; print(sys.executable if (3, 10) <= sys.version_info < (3, 14) else 3.12)' 2>/dev/null || echo 3.12)
for folder in $links; do
    for wheel in "$folder"/torch-2.*.whl; do
        if [[ $wheel =~ -cp3(1[0-3])- ]]; then python=3.${BASH_REMATCH[1]}; fi
    done
done
export UV_PYTHON=$python

install() {  # from the configured package index
    local command=("${uv[@]}" pip install -p .venv/bin/python --no-sources "$@")
    for place in $links; do command+=(--find-links "$place"); done
    # Some mirrors have no upload dates; then exclude-newer of pyproject.toml cannot be used
    "${command[@]}" || UV_INDEX=${UV_INDEX:-${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}} \
        "${command[@]}" --no-config
}

if ! is_current; then
    rm -f .venv/installed-*
    # Locking only reads an index, so it fails quickly if PyTorch's cannot be reached
    if UV_HTTP_RETRIES=0 UV_HTTP_CONNECT_TIMEOUT=5 "${uv[@]}" lock -q && "${uv[@]}" sync --extra "$extra"; then
        echo "setup: installed from PyTorch's own index ($extra)"
    else
        echo "setup: that failed (see above); installing from the configured package index instead" >&2
        [[ -x .venv/bin/python ]] || "${uv[@]}" venv -q
        install -r pyproject.toml --extra "$extra" --group dev
    fi
    if [[ $extra == gpu ]]; then
        .venv/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else "setup: this torch has no CUDA")'
    fi
    # Without bytecode files each process would compile these modules again, for 5 s
    .venv/bin/python -m compileall -q -j 0 .venv/lib/python*/site-packages/{torch,functorch,sympy} >/dev/null || true
    cp pyproject.toml "$stamp"
fi

if ! core_is_current; then
    if ! command -v cargo >/dev/null; then
        echo "setup: no Rust toolchain (cargo), so the published rustbpe trains tokenizers and tiktoken encodes:" \
            "the same tokens, several times slower. For ours, install Rust and run this again." >&2
    elif ! install --reinstall-package rustbpe ./rustbpe; then
        echo "setup: rustbpe could not be built (see above); the installed one is kept" >&2
        exit 0
    fi
    echo "$core" >"$core_stamp"
fi
