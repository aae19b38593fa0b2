"""Hours of mixed traffic with peers that come and go: what a process holds must not grow.

    python tests/endurance/soak.py [--minutes N | --hours N] [--configuration uvloop-uring] [--samples FILE]

The subject (soak_roles.py) is one process on a patched loop. It serves with uvicorn, aiohttp, websockets and a plain
protocol, in the clear and over TLS, and is a client of redis-server, PostgreSQL, and of the peer, an unpatched process
that serves and asks the same. Half of the connections last, the others are replaced after 30 messages; all that comes
back is compared. Once in each interval one of redis-server, PostgreSQL and the peer is restarted: in good order and by
SIGKILL in turns. What breaks then of it may break, within ten seconds; anything else is a fault.

At the end of each interval all clients end their connections, and a sample is taken when nothing but the listeners
should be left: resident memory, what malloc and Python have given out, objects that the collector knows, descriptors,
tasks, the engine's operations in flight and streams. measures.py says what drift is and when it counts (over 1 %).
Descriptors, tasks, operations and streams must be the same in each sample of the later part, to the last one. What
cannot be started here is left out, and said.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measures
import tls
from measures import helpers

ROLES = Path(__file__).with_name("soak_roles.py")
GRACE_S = 10  # after a peer is back, until nothing more of it may break, on a machine that is busy
SERVED = ("http", "websocket", "uvicorn", "echo")  # by the subject; by its peer the first two
EACH = 4  # clients of each service


# --------------------------------------------------------------------------
# Peers


class Redis:
    name = "redis"
    orderly = signal.SIGTERM
    abrupt = signal.SIGKILL

    def __init__(self, folder):
        if not shutil.which("redis-server"):
            raise LookupError("redis-server is not installed")
        self.ports = {"redis": helpers.free_port()}
        certificate, key = tls.authority().pair()
        settings = {"--bind": "127.0.0.1", "--port": self.ports["redis"], "--dir": folder, "--save": ""}
        said = subprocess.run(["redis-server", "--tls-port", "-1"], capture_output=True, text=True)
        if "Bad directive" not in said.stdout + said.stderr:
            self.ports["redis-tls"] = helpers.free_port()
            settings |= {"--tls-port": self.ports["redis-tls"], "--tls-cert-file": certificate, "--tls-key-file": key}
            settings |= {"--tls-ca-cert-file": tls.authority().cafile, "--tls-auth-clients": "no"}
        self.args = ["redis-server"] + [part for setting in settings.items() for part in setting]
        self.ready = helpers.accepts(("127.0.0.1", self.ports["redis"]))
        self.options = {}

    def start(self):
        self.service = helpers.Service(self.args, self.ready, **self.options)
        self.service.__enter__()

    def stop(self, signum=None):
        self.service.stop(signum or self.orderly)


class Postgres(Redis):
    name = "postgres"
    orderly = signal.SIGINT
    abrupt = signal.SIGQUIT  # its processes end at once; SIGKILL would leave some of them behind

    def __init__(self, folder):
        import test_real_postgres as real

        if why := real.why_no_postgres():
            raise LookupError(why)
        programs, data, port = real.postgres_programs(), folder / "data", helpers.free_port()
        self.ports = {"postgres": port, "postgres-tls": port}
        certificate, key = real.certificate_in(folder)
        if os.getuid() == 0:
            for path in (folder, certificate, key):
                shutil.chown(path, "postgres", "postgres")
        self.options = {"cwd": folder, **real.as_postgres()}
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
            **{"check": True, "capture_output": True, "stdin": subprocess.DEVNULL, **self.options},
        )
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        settings |= {"log_min_messages": "fatal", "ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key}
        self.args = [programs / "postgres", "-D", data]
        for name, value in settings.items():
            self.args += ["-c", f"{name}={value}"]

        def ready(_):
            asked = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            return subprocess.run(asked, stdin=subprocess.DEVNULL).returncode == 0

        self.ready = ready


class Peer:
    name = "peer"
    orderly = signal.SIGTERM
    abrupt = signal.SIGKILL

    def __init__(self, addresses, log):
        self.addresses, self.log = addresses, log

    def start(self):
        self.child = measures.Answering(ROLES, "peer", "asyncio-stock", json.dumps(self.addresses), log=self.log)
        self.child.answer()

    def stop(self, signum=None):
        self.child.end(signum)


# --------------------------------------------------------------------------
# The run


class Soak:
    def __init__(self, settings, folder):
        self.settings, self.folder = settings, folder
        self.samples, self.wrong, self.restarts = [], [], []
        self.counts = collections.Counter()
        self.excused = 0
        self.log_path = folder / "log"
        self.log = self.log_path.open("w")
        self.outside = []
        for kind in (Redis, Postgres):
            if kind.name in settings.without:
                continue
            own = folder / kind.name
            own.mkdir()
            try:
                self.outside.append(kind(own))
            except LookupError as why:
                print(f"without {kind.name}: {why}", flush=True)
        kinds = SERVED[:2]
        of_peer, of_subject = ({} for _ in range(2))
        for ports, served in ((of_peer, kinds), (of_subject, SERVED)):
            for kind in served:
                for name in (kind, f"{kind}-tls"):
                    ports[name] = helpers.free_port()
        asked = dict(of_peer)
        for peer in self.outside:
            asked |= peer.ports
        files = {"pair": tls.authority().pair(), "cafile": tls.authority().cafile}
        common = {"files": files, "each": settings.each}
        self.peer = Peer({"serve": of_peer, "ask": of_subject, **common}, self.log)
        self.addresses = {"serve": of_subject, "ask": asked, **common}
        self.peers = [self.peer, *self.outside]

    def run(self):
        with contextlib.ExitStack() as stack:
            for peer in self.outside:
                peer.start()
                stack.callback(peer.stop)
            subject = json.dumps(self.addresses)
            self.subject = measures.Answering(ROLES, "subject", self.settings.configuration, subject, log=self.log)
            stack.callback(self.subject.end)
            self.subject.answer()
            self.peer.start()
            stack.callback(self.peer.stop)
            self.go_on()
        self.judge()
        return self.wrong

    def go_on(self):
        begin = time.monotonic()
        number = 0
        while time.monotonic() - begin < self.settings.seconds:
            for child in (self.subject, self.peer.child):
                child.ask("go")
            self.rest(self.settings.interval / 2)
            self.restart(self.peers[number % len(self.peers)], abrupt=number // len(self.peers) % 2 == 1)
            self.rest(self.settings.interval / 2)
            self.take_sample(begin)
            number += 1

    def rest(self, seconds):
        time.sleep(seconds)
        if self.subject.process.poll() is not None:
            raise RuntimeError(f"the subject ended with {self.subject.process.returncode}")

    def restart(self, peer, abrupt):
        since = time.time()
        if peer is self.peer and not abrupt:
            self.collect(self.peer.child, "peer")
        peer.stop(peer.abrupt if abrupt else peer.orderly)
        peer.start()
        if peer is self.peer:
            peer.child.ask("go")
        self.restarts.append((peer.name, since, time.time()))

    def take_sample(self, begin):
        for child in (self.subject, self.peer.child):
            child.say("pause")
        for child in (self.subject, self.peer.child):
            child.answer(120)
        self.collect(self.peer.child, "peer")
        found = self.collect(self.subject, "subject")
        found["time"] = round(time.monotonic() - begin, 1)
        self.samples.append(found)
        self.counts = collections.Counter(found["counts"])
        if self.settings.samples:
            with open(self.settings.samples, "a") as file:
                file.write(json.dumps(found) + "\n")
        if self.settings.verbose:
            print(found["time"], {name: found[name] for name in measures.DRIFTING}, flush=True)

    def collect(self, child, who):
        """A sample; what went wrong, unless a restart is why."""
        found = child.ask("sample")
        self.wrong += [f"{who}: {what}" for what in found.pop("wrong")]
        for when, where, what in found.pop("errors") + found.pop("problems"):
            # Whose connection that was; what the loop reports may be anybody's.
            kind = where.partition("-")[0]
            peer = kind if kind in ("redis", "postgres") else "peer" if kind in SERVED else None
            if any(since <= when <= until + GRACE_S for name, since, until in self.restarts if peer in (name, None)):
                self.excused += 1
            else:
                before = [f"{when - until:.1f} s after {name} was back" for name, _, until in self.restarts[-1:]]
                self.wrong.append(f"{who}: {where}: {what} {' '.join(before)}")
        return found

    def judge(self):
        said, wrong = measures.drifts(self.samples)
        self.wrong += wrong
        later = measures.later_part(self.samples)
        for name in measures.CONSTANT:
            values = sorted({sample[name] for sample in later})
            if len(values) > 1:
                self.wrong.append(f"{name} differ from pause to pause: {values}")
        print(self.settings.configuration, *said, sep="\n  ")
        print(f"  asked: {', '.join(f'{n:,} {what}' for what, n in sorted(self.counts.items()))}")
        restarted = collections.Counter(name for name, _, _ in self.restarts)
        print(f"  restarts: {dict(restarted)}; {self.excused} errors of clients because of them")
        print(f"  engine: {later[-1]['stats']}")
        self.log.close()
        if found := re.findall("^Traceback.*", text := self.log_path.read_text(), re.MULTILINE):
            print(f"  the processes' log has {len(found)} tracebacks; its end:\n{text[-2000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_time(parser, minutes=15)
    measures.add_configuration(parser)
    parser.add_argument("--interval", type=float, default=10, metavar="SECONDS", help="between samples (%(default)s)")
    parser.add_argument("--each", type=int, default=EACH, help="clients of each service (%(default)s)")
    parser.add_argument("--without", nargs="*", default=[], choices=("redis", "postgres"), help="leave these out")
    parser.add_argument("--samples", metavar="FILE", help="append each sample to a file, a line of JSON each")
    parser.add_argument("--verbose", action="store_true", help="print samples as they come")
    settings = parser.parse_args()
    # Where PostgreSQL's user may enter.
    with tempfile.TemporaryDirectory(prefix="aiouringnet-") as folder:
        os.chmod(folder, 0o755)
        soak = Soak(settings, Path(folder))
        try:
            return measures.verdict(soak.run())
        except RuntimeError:
            print(f"the processes' log:\n{soak.log_path.read_text()[-2000:]}")
            raise


if __name__ == "__main__":
    sys.exit(main())
