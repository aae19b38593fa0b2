"""More than a server can take: nobody is lost, quiet connections are served, and timers are on time.

    python tests/endurance/overload.py [descriptors] [flood] [accepts] [--minutes N | --hours N]

descriptors  100,000 connections (--connections) open at once, and the server has 1,000 descriptors (--descriptors) for
             them. Each says 16 bytes, gets them back and ends; each must be served in the end. Whom the kernel does
             not let in for two minutes, or resets after that time, tries again, as programs do; a connection that the
             server has accepted must be served. Meanwhile 100 quiet connections from before go on.
flood        one connection floods the server, which swallows, or echoes, or both over TLS, beside 1,000 quiet ones
             (--quiet) that each say something once a second.
accepts      clients connect, say something and leave, as fast as they can, 500 at a time in two processes, beside the
             same quiet ones.

In each of them the server's loop has a timer of 10 ms; 99 of 100 must be less than 5 ms late, the time aside in which
the thread waited for a CPU (see measures.py); both figures are printed. The time is divided among floods and accepts.
A process may open as many descriptors as its hard limit says: there are as many clients' processes as that takes.
"""

import argparse
import contextlib
import json
import math
import resource
import sys
import time
from pathlib import Path

import measures
import tls

ROLES = Path(__file__).with_name("crowd_roles.py")
SCENARIOS = ("descriptors", "flood", "accepts")
FLOODS = {"swallow": {}, "echo": {"echoed": True}, "swallow-tls": {"tls": True}, "echo-tls": {"tls": True, "echoed": 1}}
LATE_MS = 5
SPARE_FILES = 200


class Children(contextlib.ExitStack):
    def start(self, *args):
        child = measures.Answering(ROLES, *args, log=None)
        self.callback(child.end)
        return child


def say(child, what, **arguments):
    child.say(json.dumps({"do": what, **arguments}))


def ask(child, what, timeout_s=120, **arguments):
    return child.ask(json.dumps({"do": what, **arguments}), timeout_s)


def ended_but_open(port):
    """How many connections to a port have something to read: data, or the peer's end (CLOSE_WAIT)."""
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues = line.split()[:5]
        if int(local.partition(":")[2], 16) == port and (state == "08" or (state == "01" and queues[-8:] != 8 * "0")):
            found += 1
    return found


class Overload:
    def __init__(self, settings, children):
        self.settings, self.children = settings, children
        self.wrong = []
        files = tls.authority().pair()
        self.server = children.start("server", settings.configuration, *files)
        self.ports = ask(self.server, "serve")["ports"]

    def quiet(self, count):
        quiet = self.children.start("quiet")
        ask(quiet, "open", port=self.ports["echo"], count=count)
        return quiet

    def tick(self):
        ask(self.server, "tick")

    def ticked(self, where):
        late = ask(self.server, "ticked")
        print(f"  timers of 10 ms, late by ms: {late['own']}; with what the thread waited for a CPU: {late['seen']}")
        if not 0 <= late["own"]["p99"] < LATE_MS:
            self.wrong.append(f"{where}: timers are late: {late}")

    # --- scenarios ------------------------------------------------------------

    def descriptors(self, _):
        count = self.settings.connections
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES
        shares = math.ceil(count / most)
        crowds = [self.children.start("crowd") for _ in range(shares)]
        quiet = self.quiet(100)
        before = ask(self.server, "sample", wait_s=0)
        print(f"descriptors: {count:,} connections at once, {self.settings.descriptors} descriptors", flush=True)
        ask(self.server, "limit", descriptors=self.settings.descriptors)
        sizes = [count // shares + (n < count % shares) for n in range(shares)]
        for crowd, size in zip(crowds, sizes):
            ask(crowd, "prepare", count=size)
        self.tick()
        begin = time.monotonic()
        for crowd, size in zip(crowds, sizes):
            say(crowd, "visit", port=self.ports["echo"], count=size, at_once=size, limit_s=self.settings.limit)
        echoes = []
        while not all(crowd.has_answered() for crowd in crowds):
            echoes.append(ask(quiet, "talk", seconds=1)["echo"])
        took = time.monotonic() - begin
        found = [crowd.answer() for crowd in crowds]
        served, reasons = sum(part["served"] for part in found), {}
        for part in found:
            for reason, n in part["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + n
        opened_s = max(part["opened_s"] for part in found)
        print(
            f"  all connecting within {opened_s:.1f} s; {served:,} served in {took:.0f} s; {reasons or 'none failed'}"
        )
        slowest = {name: max(echo[name] for echo in echoes) for name in ("p50", "p99", "max")}
        print(f"  echoes of the quiet ones took ms, in the worst second: {slowest}")
        self.ticked("descriptors")
        if served != count:
            waiting = sum(part["waiting"] for part in found)
            self.wrong.append(f"descriptors: {served} of {count} were served, {waiting} still wait, {reasons}")
        # Where a queue overflows, the kernel may keep half-open connections, whose client it has reset. Nothing tells
        # the server so: what it has open is then more, by the connections that have not been lost.
        deadline = time.monotonic() + 10
        while ended_unseen := ended_but_open(self.ports["echo"]):
            if time.monotonic() > deadline:
                self.wrong.append(f"descriptors: {ended_unseen} connections have ended or have data, and nobody reads")
                break
            time.sleep(0.1)
        after = ask(self.server, "sample", wait_s=0)
        accepted = after["counts"]["made"] - before["counts"]["made"]
        half_open = accepted - after["counts"].get("lost", 0) + before["counts"].get("lost", 0)
        print(f"  accepted: {accepted:,}; half-open ones left by the kernel: {half_open}")
        if after["descriptors"] - before["descriptors"] != half_open:
            self.wrong.append(f"descriptors: {before['descriptors']} before, {after['descriptors']} after")
        self.compare(before, after)
        ask(self.server, "limit", descriptors=1 << 20)
        self.end(quiet, *crowds)

    def flood(self, seconds):
        quiet, flood = self.quiet(self.settings.quiet), self.children.start("flood")
        for name, options in FLOODS.items():
            each_s = seconds / len(FLOODS)
            print(f"flood, {name}: {each_s:.0f} s beside {self.settings.quiet} quiet connections", flush=True)
            self.tick()
            say(flood, "pour", port=self.ports[name], seconds=each_s, **options)
            talked = ask(quiet, "talk", each_s + 120, seconds=each_s)
            poured = flood.answer(120)
            rate = poured["sent"] / 2**20 / each_s
            print(f"  {rate:,.0f} MiB/s; echoes of the quiet ones took ms: {talked['echo']}")
            self.ticked(f"flood, {name}")
        self.end(quiet, flood)

    def accepts(self, seconds):
        quiet, crowds = self.quiet(self.settings.quiet), [self.children.start("crowd") for _ in range(2)]
        before = ask(self.server, "sample", wait_s=0)
        print(f"accepts: {seconds:.0f} s beside {self.settings.quiet} quiet connections", flush=True)
        self.tick()
        begin, served = time.monotonic(), 0
        for crowd in crowds:
            say(crowd, "visit", port=self.ports["echo"], count=self.settings.batch, at_once=250)
        say(quiet, "talk", seconds=seconds)
        under_way = list(crowds)
        while under_way:
            for crowd in list(under_way):
                found = crowd.answer(120)
                served += found["served"]
                if found["failed"] or found["waiting"]:
                    self.wrong.append(f"accepts: {found}")
                if time.monotonic() - begin < seconds:
                    say(crowd, "visit", port=self.ports["echo"], count=self.settings.batch, at_once=250)
                else:
                    under_way.remove(crowd)
        took = time.monotonic() - begin
        talked = quiet.answer(seconds + 120)
        print(f"  {served:,} accepted and served, {served / took:,.0f} a second; quiet ones, ms: {talked['echo']}")
        self.ticked("accepts")
        self.compare(before, ask(self.server, "sample", wait_s=0.5))
        self.end(quiet, *crowds)

    # --- its ends -------------------------------------------------------------

    def compare(self, before, after):
        mib = [sample["resident bytes"] / 2**20 for sample in (before, after)]
        print(f"  server: {mib[0]:.1f} MiB before, {mib[1]:.1f} after; {after['problems'] or 'nothing'} reported")
        for what in set(after["problems"]) - {"EMFILE"}:
            self.wrong.append(f"the server's loop reports: {what}")

    def end(self, *children):
        for child in children:
            if status := child.end():
                self.wrong.append(f"{child.process.args[2]} ended with {status}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_time(parser, minutes=2)
    measures.add_configuration(parser)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--connections", type=int, default=100_000, help="that open at once (%(default)s)")
    parser.add_argument("--descriptors", type=int, default=1_000, help="that the server may open (%(default)s)")
    parser.add_argument("--quiet", type=int, default=1_000, help="quiet connections (%(default)s)")
    parser.add_argument("--batch", type=int, default=5_000, help="of an accept flood, between answers (%(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds until all must be served (%(default)s)")
    settings = parser.parse_args()
    chosen = settings.scenarios or SCENARIOS
    if unknown := set(chosen) - set(SCENARIOS):
        parser.error(f"unknown: {unknown}")
    timed = [scenario for scenario in chosen if scenario != "descriptors"]
    with Children() as children:
        overload = Overload(settings, children)
        print(settings.configuration, flush=True)
        for scenario in chosen:
            getattr(overload, scenario)(settings.seconds / max(1, len(timed)))
        return measures.verdict(overload.wrong)


if __name__ == "__main__":
    sys.exit(main())
