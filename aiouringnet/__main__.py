"""python -m aiouringnet: what is active on this machine, and why not.  Exits 0 only if io_uring is usable."""

import asyncio
import os
import sys

import aiouringnet

LIMIT_S = 5


async def _echo_once():
    """One message through a patched loop, for counters that are real."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\n")
    if await reader.readline() != b"hello\n":
        raise ConnectionError("the echo differs from what was sent")
    found = aiouringnet.status(), aiouringnet.stats()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    return found


async def _echo(reader, writer):
    writer.write(await reader.readline())
    writer.close()


def _print(title, values):
    print(title)
    for name, value in values.items():
        if isinstance(value, dict):
            value = [key if there else f"(no {key})" for key, there in value.items()]
        if isinstance(value, (list, tuple)):
            value = " ".join(map(str, value)) or "none"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        print(f"  {name.replace('_', ' '):24} {'-' if value is None else value}")


def main():
    try:
        loop = aiouringnet.new_event_loop()
    except (ImportError, ValueError) as exc:
        print(exc)
        return 1
    failure = None
    try:
        status, stats = loop.run_until_complete(asyncio.wait_for(_echo_once(), LIMIT_S))
    except (OSError, RuntimeError, asyncio.TimeoutError) as exc:
        # AIOURINGNET_ENGINE=uring where it cannot be had, or no loopback interface: there is still something to say.
        status, stats, failure = aiouringnet.status(loop), aiouringnet.stats(loop), exc
    finally:
        loop.close()
    details, options, ring = status.pop("details"), status.pop("options"), status.pop("io_uring")
    _print(f"aiouringnet {status.pop('version')}", status)
    _print("io_uring", ring)
    _print("options", options)
    _print("this loop's engine", details)
    _print("counters after one echo", stats)
    if failure is not None:
        print(f"the echo failed: {failure!r}")
    return 0 if ring["usable"] and failure is None else 1


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Somebody has read enough: python -m aiouringnet | head -n 3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
