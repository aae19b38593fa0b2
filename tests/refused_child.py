"""A process that is refused io_uring, serves an echo all the same and reports.

    python refused_child.py BASE seccomp ERRNO   installs a filter that answers io_uring's calls with ERRNO
    python refused_child.py BASE told            waits for a line on stdin, by which time somebody has forbidden it

Prints "ready" when everything is imported, then one line of JSON.
"""

import asyncio
import ctypes
import json
import os
import struct
import sys

import helpers

import aiouringnet

IO_URING_CALLS = (425, 426, 427)  # setup, enter, register: the same on every architecture

# <linux/prctl.h>, <linux/seccomp.h>, <linux/bpf_common.h>
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


def filter_program(errno_to_give):
    """BPF: compares seccomp_data.nr, its first field, with each call's number."""
    instructions = [(LOAD_WORD, 0, 0, 0)]
    for position, number in enumerate(IO_URING_CALLS):
        # To the last instruction if equal, else to the next.
        instructions.append((JUMP_IF_EQUAL, len(IO_URING_CALLS) - position, 0, number))
    instructions.append((RETURN, 0, 0, SECCOMP_RET_ALLOW))
    instructions.append((RETURN, 0, 0, SECCOMP_RET_ERRNO | errno_to_give))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions), len(instructions)


def install_filter(errno_to_give):
    libc = ctypes.CDLL(None, use_errno=True)
    code, length = filter_program(errno_to_give)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", length, ctypes.addressof(buffer)))
    zero = ctypes.c_ulong(0)
    calls = (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program, zero, zero),
    )
    for call in calls:
        if libc.prctl(*call) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


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


def main(base, how, number=None):
    if how == "seccomp":
        install_filter(int(number))
    print("ready", flush=True)
    if how == "told":
        sys.stdin.readline()
    loop = helpers.new_loop(helpers.Case(base, "epoll"))
    echoed, status = loop.run_until_complete(echo_some(loop))
    engine = helpers.engines.active_engine(loop).kind
    loop.close()
    print(json.dumps({"echoed": echoed, "engine": engine, "status": status}, default=str))


main(*sys.argv[1:])
