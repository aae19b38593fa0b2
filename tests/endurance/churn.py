"""A million connections that come and go in waves: what a process holds must be the same after each.

    python tests/endurance/churn.py [--connections 1000000] [--wave 20000] [--clients plain|ours] [--tls]

Each connection says 16 bytes and gets them back; then, in turns, the client ends it, the server does, or the client
resets it. `--at-once` of them are there at a time. After each wave a sample is taken, of the server's process and,
with `--clients ours`, of the clients', too: resident memory, allocations, objects, descriptors, tasks, the engine's
operations in flight and streams. measures.py says what drift is; descriptors and the like must be the same each time
from the second wave on. Time is the bound where it is reached first. Clients are divided among 64 addresses of
loopback, so that ports do not run out.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import measures
import tls

ROLES = Path(__file__).with_name("crowd_roles.py")


def ask(child, what, timeout_s=600, **arguments):
    return child.ask(json.dumps({"do": what, **arguments}), timeout_s)


def churn(settings):
    files = tls.authority().pair() if settings.tls else ()
    trusted = [tls.authority().cafile] if settings.tls else []
    server = measures.Answering(ROLES, "server", settings.configuration, *files, log=None)
    role = ["clients", settings.configuration, *trusted] if settings.clients == "ours" else ["crowd"]
    clients = measures.Answering(ROLES, *role, log=None)
    sampled = {"server": server} | ({"clients": clients} if settings.clients == "ours" else {})
    samples = {name: [{"time": 0.0, **ask(child, "sample")}] for name, child in sampled.items()}
    port = ask(server, "serve")["ports"]["echo-tls" if settings.tls else "echo"]
    wrong, done, busy_s = [], 0, 0.0
    begin = time.monotonic()
    while done < settings.connections and time.monotonic() - begin < settings.seconds:
        count = min(settings.wave, settings.connections - done)
        found = ask(clients, "visit", port=port, count=count, at_once=settings.at_once, tls=settings.tls)
        done += found["served"]
        busy_s += found["seconds"]
        if found["served"] != count:
            wrong.append(f"only {found['served']} of {count} were served: {found}")
            break
        for name, child in sampled.items():
            samples[name].append({"time": time.monotonic() - begin, **ask(child, "sample")})
    for child in (clients, server):
        child.end()
    print(f"{settings.configuration}, {settings.clients} clients{', TLS' * settings.tls}: {done:,} connections")
    print(f"  {done / busy_s:,.0f} a second, {settings.at_once} at once")
    for name, (before, *of_waves) in samples.items():
        mib = [sample["resident bytes"] / 2**20 for sample in (before, of_waves[0], of_waves[-1])]
        print(f"  {name}: {mib[0]:.2f} MiB before, {mib[1]:.2f} after the first wave, {mib[2]:.2f} after the last")
        said, drifting = measures.drifts(of_waves)
        print("    ", end="")
        print(*said, sep="\n    ")
        wrong += [f"{name}: {what}" for what in drifting]
        wrong += [f"{name}: {what}: {n} times" for what, n in of_waves[-1]["problems"].items()]
        for constant in measures.CONSTANT:
            values = sorted({sample[constant] for sample in of_waves[1:]})
            if len(values) > 1:
                wrong.append(f"{name}: {constant} differ from wave to wave: {values}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_time(parser, minutes=20)
    measures.add_configuration(parser)
    parser.add_argument("--connections", type=int, default=1_000_000, help="in all (%(default)s)")
    parser.add_argument("--wave", type=int, default=20_000, help="between two samples (%(default)s)")
    parser.add_argument("--at-once", type=int, default=500, help="there at a time (%(default)s)")
    parser.add_argument("--clients", choices=("plain", "ours"), default="plain", help="who connects (%(default)s)")
    parser.add_argument("--tls", action="store_true", help="over TLS; with our clients")
    settings = parser.parse_args()
    if settings.tls and settings.clients != "ours":
        parser.error("--tls needs --clients ours")
    return measures.verdict(churn(settings))


if __name__ == "__main__":
    sys.exit(main())
