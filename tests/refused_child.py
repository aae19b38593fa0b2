"""A process that is refused io_uring, serves an echo all the same and reports.

    python refused_child.py BASE seccomp ERRNO DISABLED
        installs a filter that answers io_uring's calls with ERRNO, and sees DISABLED as the machine's sysctl
        kernel.io_uring_disabled: all that a process sees of the sysctl without setting it for the whole machine
    python refused_child.py BASE told
        waits for a line on stdin, by which time somebody has forbidden it

Prints "ready" when everything is imported, then one line of JSON.
"""

import json
import sys

import helpers
import seccomp

import aiouringnet
from aiouringnet._engine import remedies

IO_URING_CALLS = (425, 426, 427)  # setup, enter, register: the same on every architecture


def refusing(errno_to_give):
    """BPF: compares the number of the call, at offset 0, with each of those."""
    instructions = [(seccomp.LOAD_WORD, 0, 0, 0)]
    for position, number in enumerate(IO_URING_CALLS):
        # To the last instruction if equal, else to the next.
        instructions.append((seccomp.JUMP_IF_EQUAL, len(IO_URING_CALLS) - position, 0, number))
    instructions.append((seccomp.RETURN, 0, 0, seccomp.ALLOW))
    instructions.append((seccomp.RETURN, 0, 0, seccomp.ERRNO | errno_to_give))
    return instructions


def forbid(errno_to_give, disabled):
    seccomp.install(refusing(errno_to_give))
    read = remedies.read
    remedies.read = lambda path: disabled if path == "/proc/sys/kernel/io_uring_disabled" else read(path)


async def echo_some(loop):
    with helpers.Endpoint("tcp") as endpoint:
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            message = helpers.pattern(300_000)
            transport.write(message)
            echoed = await protocol.received(len(message)) == message
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost
    return echoed, aiouringnet.status(loop)


def main(base, how, number=None, disabled=None):
    if how == "seccomp":
        forbid(int(number), disabled)
    print("ready", flush=True)
    if how == "told":
        sys.stdin.readline()
    loop = helpers.new_loop(helpers.Case(base, "epoll"))
    echoed, status = loop.run_until_complete(echo_some(loop))
    engine = helpers.engines.active_engine(loop).kind
    loop.close()
    print(json.dumps({"echoed": echoed, "engine": engine, "status": status}, default=str))


main(*sys.argv[1:])
