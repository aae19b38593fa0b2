"""Protocols that do anything, at any moment, and keep nothing: a child process of test_random_protocols.py.

    python random_protocols_child.py BASE-ENGINE-KIND [--seed N] [--rounds N | --seconds S] [--verbose]
        [--certificates AUTHORITY CERTIFICATE KEY]

    BASE    asyncio or uvloop
    ENGINE  uring, epoll, sqpoll; or stock: a loop that is not patched, to see that this program asks for no more
            than asyncio gives
    KIND    tcp, unix, tls, starttls, or wild: TCP, where TLS is started at any moment and nobody knows

A seed is a round: a loop, servers, clients and peers, which are plain sockets that the same thread moves. All that
they do is drawn from the seed, so that a round can be had again, as far as the kernel plays along. Every stream of
bytes begins with its number and goes on with bytes that tell their position: who receives them knows what must come.

Each round prints its seed before it begins. The first one in which something is wrong ends the process with status 1,
after it has said what, with the trace of the round.
"""

import argparse
import collections
import faulthandler
import gc
import logging
import os
import ssl
import sys
import time
import warnings

from random_protocols.rounds import PATIENCE_S, Round

HUNG_S = 5 * PATIENCE_S
LEAST_ROUNDS = 8  # even where time is short: some are over before anything has happened


def contexts(files):
    """For clients and for servers: contexts[server_side]."""
    if files is None:
        import tls

        files = tls.authority().cafile, *tls.authority().pair()
    authority, certificate, key = files
    client = ssl.create_default_context(cafile=authority)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return client, server


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", metavar="BASE-ENGINE-KIND")
    parser.add_argument("--seed", type=int, default=0, help="the first round's")
    parser.add_argument("--rounds", type=int, default=1 << 60)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--verbose", action="store_true", help="print the trace as it comes")
    parser.add_argument("--certificates", nargs=3, metavar="FILE", help="authority's, server's, its key")
    return parser.parse_args()


def main():
    settings = arguments()
    settings.contexts = contexts(settings.certificates)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # What a loop opens once and keeps.
    Round(settings, None).run()
    gc.collect()
    gc.freeze()
    deadline = time.monotonic() + settings.seconds
    seen = collections.Counter()
    for seed in range(settings.seed, settings.seed + settings.rounds):
        if time.monotonic() > deadline and seen["rounds"] >= LEAST_ROUNDS:
            break
        os.write(1, f"seed {seed}\n".encode())
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        round = Round(settings, seed)
        round.run()
        faulthandler.cancel_dump_traceback_later()
        if round.complaints:
            if not settings.verbose:
                for words in round.trace:
                    print(*words)
            print(f"in round {seed} of {settings.configuration}:", *round.complaints, sep="\n    ")
            sys.exit(1)
        seen += round.count()
    print("nothing wrong:", *(f"{number} {what}," for what, number in sorted(seen.items())))


if __name__ == "__main__":
    main()
