#!/usr/bin/env bash
# Makes .venv with all that the code and its tests need: `bash dev/setup.sh [cpu|gpu]`.
# Safe to run again: it returns at once while pyproject.toml and rustbpe/ are what it installed last.
# Installs from PyTorch's own index where that can be reached, else from the package index
# that pip or uv is configured for, wheels in PIP_FIND_LINKS or UV_FIND_LINKS included. Our rustbpe is
# built where there is a Rust toolchain; elsewhere the published package of that name stays in its place.
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

# uv, from pip where it is missing. A system Python may refuse to be changed; then it goes to the home folder.
if command -v uv >/dev/null; then uv=(uv); else
    uv=(python3 -m uv)
    "${uv[@]}" --version >/dev/null 2>&1 || python3 -m pip install -q uv \
        || python3 -m pip install -q --user --break-system-packages uv
fi

pip_setting() { python3 -m pip config get "global.$1" 2>/dev/null || true; }
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}
[[ -z $index ]] || export UV_DEFAULT_INDEX=$index

# Which Python: the one a local torch wheel was built for, else the machine's own, else one that uv fetches.
python=3.12
if python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
    python=$(python3 -c 'import sys; print(sys.executable)')
fi
for folder in $links; do
    for wheel in "$folder"/torch-2.*.whl; do
        if [[ $wheel =~ -cp3(1[0-3])- ]]; then python=3.${BASH_REMATCH[1]}; fi
    done
done
export UV_PYTHON=$python

install() {  # from the configured package index
    local command=("${uv[@]}" pip install -p .venv/bin/python --no-sources "$@")
    for place in $links; do command+=(--find-links "$place"); done
    # A mirror may not tell upload dates; the pinned day (a setting in pyproject.toml) then has to give way.
    "${command[@]}" || UV_INDEX=${UV_INDEX:-${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}} \
        "${command[@]}" --no-config
}

if ! is_current; then
    rm -f .venv/installed-*
    # Locking only reads an index, so it tells quickly whether PyTorch's can be reached.
    if UV_HTTP_RETRIES=0 UV_HTTP_CONNECT_TIMEOUT=5 "${uv[@]}" lock -q && "${uv[@]}" sync --extra "$extra"; then
        echo "setup: installed from PyTorch's own index ($extra)"
    else
        echo "setup: that did not work (see above); taking everything from the configured package index instead" >&2
        [[ -x .venv/bin/python ]] || "${uv[@]}" venv -q
        install -r pyproject.toml --extra "$extra" --group dev
    fi
    if [[ $extra == gpu ]]; then
        .venv/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else "setup: this torch has no CUDA")'
    fi
    # Every process of ours loads these; where Python may not write bytecode, each would compile them anew: 5 s.
    .venv/bin/python -m compileall -q -j 0 .venv/lib/python*/site-packages/{torch,functorch,sympy} >/dev/null || true
    cp pyproject.toml "$stamp"
fi

if ! core_is_current; then
    if ! command -v cargo >/dev/null; then
        echo "setup: no Rust toolchain (cargo), so the published rustbpe learns vocabularies and tiktoken encodes:" \
            "the same tokens, several times slower. To change that, install Rust and run this again." >&2
    elif ! install --reinstall-package rustbpe ./rustbpe; then
        echo "setup: rustbpe did not build (see above); what was installed before stays (at first the published one)" >&2
        exit 0
    fi
    echo "$core" >"$core_stamp"
fi
