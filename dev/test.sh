#!/usr/bin/env bash
# Sets up and runs the tests: `bash dev/test.sh [pytest arguments]`. `-m slow` runs the long ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/setup.sh
exec .venv/bin/python -m pytest "$@"
