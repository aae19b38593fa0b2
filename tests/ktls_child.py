"""Processes whose kernel refuses a part of kernel TLS; they exchange data over TLS all the same, and report.

    python ktls_child.py ENGINE CALL ERRNO [CALL ERRNO ...]     CALL, "ulp", "send" or "receive", fails with ERRNO

Each refusal has a process of its own, which this one forks: a filter cannot be taken back. Each prints a line of JSON
for each version of TLS, about both ends of a connection.
"""

import json
import logging
import os
import platform
import sys
import traceback

import helpers
import ktls
import tls
from seccomp import ALLOW, ERRNO, JUMP_IF_EQUAL, LOAD_WORD, RETURN, install

SETSOCKOPT = {"x86_64": 54, "aarch64": 208}.get(platform.machine())

# The level and the name that setsockopt() is called with: <linux/tcp.h>, <linux/tls.h>
CALLS = {"ulp": (6, 31), "send": (282, 1), "receive": (282, 2)}

# Where struct seccomp_data has the number of the call, and the low half of an argument
NUMBER, ARGUMENTS, ARGUMENT_BYTES = 0, 16, 8


def refusing(call, errno_to_give):
    """BPF: the number of the call, then its second and third argument."""
    level, name = CALLS[call]
    wanted = [(NUMBER, SETSOCKOPT), (ARGUMENTS + ARGUMENT_BYTES, level), (ARGUMENTS + 2 * ARGUMENT_BYTES, name)]
    program = []
    for position, (offset, value) in enumerate(wanted):
        program.append((LOAD_WORD, 0, 0, offset))
        # On if equal, else to the instruction that allows it.
        program.append((JUMP_IF_EQUAL, 0, 2 * (len(wanted) - position) - 1, value))
    program.append((RETURN, 0, 0, ERRNO | errno_to_give))
    program.append((RETURN, 0, 0, ALLOW))
    return program


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


async def exchange(loop, version, log):
    data = helpers.pattern(300_000)
    with helpers.Endpoint("tcp") as endpoint:
        server_context = tls.authority().context_server(version=version, ktls=True)
        server = await endpoint.serve(loop, helpers.Echo, ssl=server_context)
        transport, protocol = await endpoint.connect(
            loop,
            helpers.Recorder,
            ssl=tls.authority().context_client(version=version, ktls=True),
            server_hostname="localhost",
        )
        transport.write(data)
        echoed = await protocol.received(len(data)) == data
        ends = [transport, endpoint.accepted[0].transport]
        found = {
            "echoed": echoed,
            "active": [ktls.active(end) for end in ends],
            "why_not": [end.get_extra_info("ktls_why_not") for end in ends],
        }
        transport.close()
        found["ended_with"] = repr(await protocol.lost), repr(await endpoint.accepted[0].lost)
        server.close()
        await server.wait_closed()
    return {**found, "log": [line for line in log.lines if "kernel TLS" in line]}


def main(engine, *refusals):
    tls.authority().pair()
    for call, errno_to_give in zip(refusals[::2], refusals[1::2], strict=True):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            # Not by sys.exit(): the certificates' folder is its parent's to remove.
            status = 1
            try:
                report(engine, call, errno_to_give)
                sys.stdout.flush()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"{call} {errno_to_give}: ended with {status}")


def report(engine, call, errno_to_give):
    logger, log = logging.getLogger("aiouringnet"), Lines()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(log)
    install(refusing(call, int(errno_to_give)))
    for version in (tls.TLS_1_2, tls.TLS_1_3):
        log.lines.clear()
        loop = helpers.new_loop(helpers.Case("asyncio", engine))
        print(json.dumps(loop.run_until_complete(exchange(loop, version, log))))
        loop.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
