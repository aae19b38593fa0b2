"""Hostile peers over TLS: what comes in is changed again and again, guided by what became of it.

    python tests/endurance/fuzz_tls.py [--minutes N | --hours N] [--seed N] [--corpus FILE] [--replay CASE ...]

A case is a seed, from which version, sizes and protocol are drawn, the side under test, and a list of changes: which
record of the good peer is changed, how (the spoilers of test_tls_fuzz.py, or the flight is cut in two) and from what
seed. A case is kept if it ends as none before: established or not, with what error, after which callbacks, with how
many bytes (roughly), and what the loop was told. New cases are kept ones with a change more, fewer or another. That is
no coverage: the code under test is Cython and OpenSSL, compiled without the instrumentation that libFuzzer or atheris
want. --corpus is a file of such cases, one a line, which are run first, and to which new ones are added; fuzz_tls.jsonl
is one. Without it cases are forgotten.

In each case test_tls_fuzz.py's rules hold: what protocols get is the beginning of what was sent, the connection ends,
callbacks come in order. A case in which one does not is printed, and is something for --replay. Where a case ends the
process, it is the last one in the file --trace.
"""

import argparse
import asyncio
import collections
import faulthandler
import json
import os
import random
import ssl
import sys
import time
from pathlib import Path

import measures
import test_tls_fuzz as fuzz
from measures import helpers

SPOILERS = {spoiler.__name__: spoiler for spoiler in fuzz.SPOILERS}
KINDS = (*SPOILERS, "split")
ROLES = ("client", "server")
MOST_CHANGES = 6
MOST_FAULTS = 10
RECORDS = 14  # of which one may be changed


class Changing(fuzz.Middle):
    changes = ()

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 0

    async def deliver(self, flight):
        passed, split_at = b"", None
        for record in fuzz.records_of(flight):
            for number, kind, seed in self.changes:
                if number == self.number and record:
                    chance = random.Random(seed)
                    if kind == "split":
                        split_at = len(passed) + chance.randrange(len(record))
                    else:
                        record = SPOILERS[kind](chance, record)
            self.number += 1
            passed += record
        for piece in (passed,) if split_at is None else (passed[:split_at], passed[split_at:]):
            if piece:
                await self.loop.sock_sendall(self.sock, piece)
                await asyncio.sleep(0)


def new_change(chance):
    return [chance.randrange(RECORDS), chance.choice(KINDS), chance.randrange(1 << 30)]


def new_case(chance, kept):
    if not kept or chance.random() < 0.1:
        return {"role": chance.choice(ROLES), "seed": chance.randrange(1 << 30), "changes": [new_change(chance)]}
    case = json.loads(json.dumps(chance.choice(kept)))
    for _ in range(chance.choice([1, 1, 2, 3])):
        changes, what = case["changes"], chance.randrange(5)
        if (what == 0 and len(changes) < MOST_CHANGES) or not changes:
            changes.append(new_change(chance))
        elif what == 1:
            changes.pop(chance.randrange(len(changes)))
        elif what == 2:
            changes[chance.randrange(len(changes))] = new_change(chance)
        elif what == 3:
            chance.choice(changes)[2] = chance.randrange(1 << 30)
        else:
            case["seed"] = chance.randrange(1 << 30)
    return case


async def meet(factory, role, context, **options):
    """As the fixture of tls_wire.py does: (awaitable of transport and protocol, the other end's plain socket)."""
    loop = asyncio.get_running_loop()
    with helpers.Endpoint("tcp") as place:
        if role == "client":
            listener = place.listener()
            listener.setblocking(False)
            task = loop.create_task(place.connect(loop, factory, ssl=context, server_hostname="localhost", **options))
            sock, _ = await loop.sock_accept(listener)
        else:
            server = await place.serve(loop, factory, ssl=context, **options)
            sock = fuzz.socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, place.address)
            await helpers.eventually(lambda: place.accepted)
            server.close()
            task = None  # which fuzz_round() asks of clients only
        return task, sock


def words_of(exc):
    return getattr(exc, "reason", None) or type(exc).__name__ if exc else ""


async def ending_of(case, told):
    """What became of it, as a tuple; raises if a rule is broken."""
    told.clear()
    chance = random.Random(case["seed"])
    middle_of = type("Changing", (Changing,), {"changes": case["changes"]})
    loop = asyncio.get_running_loop()
    round_ = fuzz.fuzz_round(loop, meet, case["role"], chance, middle_of)
    middle, protocol, lost = await asyncio.wait_for(round_, 30)
    reported = sorted({words_of(context.get("exception")) for context in told})
    sizes = len(protocol.data).bit_length(), len(middle.received).bit_length()
    whole = protocol.data == middle.sent == middle.received
    return case["role"], middle.established, words_of(lost), tuple(protocol.log), sizes, whole, tuple(reported)


def cases_in(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def run(settings):
    told, seen, wrong, counts = [], {}, [], collections.Counter()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    chance = random.Random(settings.seed)
    waiting = [json.loads(case) for case in settings.replay] or cases_in(settings.corpus)[::-1]
    stored, kept = len(waiting), []
    begin = time.monotonic()
    with open(settings.corpus, "a") as corpus, open(settings.trace, "w") as trace:
        while waiting or (time.monotonic() < begin + settings.seconds and not settings.replay):
            case = waiting.pop() if waiting else new_case(chance, kept)
            trace.write(json.dumps(case) + "\n")
            trace.flush()
            faulthandler.dump_traceback_later(90, exit=True)
            counts["cases"] += 1
            try:
                ending = await ending_of(case, told)
            except (AssertionError, asyncio.TimeoutError, OSError, ssl.SSLError) as exc:
                wrong.append(f"--replay '{json.dumps(case)}': {exc!r}")
                if len(wrong) >= MOST_FAULTS:
                    break
                continue
            if settings.replay:
                print(ending)
            if ending not in seen:
                seen[ending] = case
                kept.append(case)
                if counts["cases"] > stored:
                    corpus.write(json.dumps(case) + "\n")
    faulthandler.cancel_dump_traceback_later()
    print(f"{counts['cases']:,} cases, {stored} of them stored before, {len(kept)} with an ending of their own")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_time(parser, minutes=5)
    measures.add_configuration(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", default=os.devnull, metavar="FILE", help="where cases are kept")
    parser.add_argument("--trace", default=os.devnull, metavar="FILE", help="where each case is written before it runs")
    parser.add_argument("--replay", nargs="+", default=[], metavar="CASE", help="these cases only; says how they end")
    settings = parser.parse_args()
    faulthandler.enable()
    loop = measures.new_loop(settings.configuration)
    asyncio.set_event_loop(loop)
    return measures.verdict(loop.run_until_complete(run(settings)))


if __name__ == "__main__":
    sys.exit(main())
