#!/usr/bin/env bash
# Sets everything up and runs the whole suite: both engines, both base loops,
# asyncio's debug mode on and off. Arguments go to pytest:
#
#   bash tests/run.sh                       everything
#   bash tests/run.sh -m 'not slow' -x      what is quick, until the first failure
#   bash tests/run.sh -k uvloop-epoll       one corner of the matrix
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up test 'aiouringnet[test]'
exec "$venv/bin/pytest" "$@" </dev/null
