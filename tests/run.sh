#!/usr/bin/env bash
# Sets everything up and runs the whole suite: both engines, both base loops,
# asyncio's debug mode on and off. Arguments go to pytest:
#
#   bash tests/run.sh                       everything
#   bash tests/run.sh -m 'not slow' -x      what is quick, until the first failure
#   bash tests/run.sh -k uvloop-epoll       one corner of the matrix
#   bash tests/run.sh -n 0                  in one process
#   bash tests/run.sh --kernel-runner 'vng -r v6.12 --'
#       all of it, and what depends on the kernel once more on another one, with
#       kernel TLS: any command will do that executes its arguments there
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up test 'aiouringnet[test]'
# One more than cores, since tests wait for others, too. What takes longest (other
# kernels, builds) is one test, so that more than four would mostly start servers.
cores=$(nproc)
exec "$venv/bin/pytest" -n $((cores < 3 ? cores + 1 : 4)) --dist worksteal "$@" </dev/null
