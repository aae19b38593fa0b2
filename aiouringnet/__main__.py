"""python -m aiouringnet: what is active on this machine, and why not.  Exits 0 only if io_uring is usable."""

import asyncio
import os
import socket
import sys
import time

import aiouringnet

LIMIT_S = 5
MESSAGES = 3
PAUSE_S = 0.01  # long enough for the loop to sleep


async def _echo_some():
    """Messages through a patched loop that sleeps in between, for counters that are real."""
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    await loop.run_in_executor(None, _talk, server.sockets[0].getsockname())
    found = aiouringnet.status(), aiouringnet.stats()
    server.close()
    await server.wait_closed()
    return found


async def _echo(reader, writer):
    while message := await reader.readline():
        writer.write(message)
    writer.close()


def _talk(address):
    """The other end, in a thread of its own."""
    with socket.create_connection(address, LIMIT_S) as sock, sock.makefile("rwb", 0) as stream:
        for _ in range(MESSAGES):
            time.sleep(PAUSE_S)
            stream.write(b"hello\n")
            if stream.readline() != b"hello\n":
                raise ConnectionError("the echo differs from what was sent")


def _verdict(status, failure):
    """What somebody in a hurry wants to know."""
    if failure is not None:
        return f"The echo failed: {failure!r}"
    usable = "io_uring works here" if status["io_uring"]["usable"] else "io_uring is not to be had here"
    if status["engine"] == "uring":
        return f"{usable}: connections run on it."
    served = {"epoll": "are served by the epoll engine", "loop": "are the loop's own"}[status["engine"]]
    remedy = f" {status['remedy']}" if status["remedy"] else ""
    return f"{usable}, and connections {served}: {status['why_not_uring']}.{remedy}"


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
        status, stats = loop.run_until_complete(asyncio.wait_for(_echo_some(), LIMIT_S))
    except (OSError, RuntimeError, asyncio.TimeoutError) as exc:
        # AIOURINGNET_ENGINE=uring where it cannot be had, or no loopback interface: there is still something to say.
        status, stats, failure = aiouringnet.status(loop), aiouringnet.stats(loop), exc
    finally:
        loop.close()
    print(_verdict(status, failure))
    details, options, ring = status.pop("details"), status.pop("options"), status.pop("io_uring")
    _print(f"aiouringnet {status.pop('version')}", status)
    _print("io_uring", ring)
    _print("options", options)
    _print("this loop's engine", details)
    _print(f"counters after {MESSAGES} echoes", stats)
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
