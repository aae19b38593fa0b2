#!/usr/bin/env bash
# The main job in one command: sets everything up, builds the package, runs an
# echo service on the stock loops and on the same loops patched, and shows what
# a request costs on each. Some minutes the first time, then about a minute.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tests/setup.sh"

set_up build 'uvloop>=0.21'
exec "$venv/bin/python" benchmarks/demo.py "$@" </dev/null
