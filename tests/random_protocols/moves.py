"""What happens in a round: connections come and go, ends move, time passes."""

import asyncio
import contextlib
import gc
import os
import signal
import socket

from random_protocols.ends import act
from random_protocols.peers import Peer, PlainChannel
from random_protocols.programs import Program

MOVES = {}


@act(4, MOVES)
async def a_peer_connects(round):
    with contextlib.suppress(OSError):
        sock, name = round.client_socket(round.address)
        Peer(round, sock, name, True)


@act(0.5, MOVES)
async def a_stranger_connects(round):
    """To a TLS server it speaks no TLS."""
    with contextlib.suppress(OSError):
        sock, name = round.client_socket(round.address)
        Peer(round, sock, name, True, stranger=round.kind == "tls")


@act(3, MOVES)
async def a_program_connects_to_a_peer(round):
    if round.unix and round.rng.random() < 0.7:
        sock, name = round.client_socket(round.listener.getsockname())
        sock.setblocking(False)
        round.start(round.connect(Program(round, True, name), sock=sock))
    else:
        round.start(round.connect(Program(round, True), round.listener.getsockname()))


@act(2, MOVES)
async def a_program_connects_to_a_program(round):
    round.start(round.connect(Program(round, True), round.address))


@act(1, MOVES)
async def a_program_gets_a_socket(round):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wire = next(round.serials)
    Peer(round, theirs, wire, False)
    program = Program(round, True, wire)
    round.start(round.connect(program, sock=ours))


@act(1, MOVES)
async def connecting_is_cancelled(round):
    program = Program(round, True)
    task = round.start(round.connect(program, round.rng.choice((round.address, round.listener.getsockname()))))
    for _ in range(round.rng.randrange(8)):
        await asyncio.sleep(0)
    if not task.done():  # else its exception would not be reported
        program.asked = program.gives_up = True  # it is closed when the task hears of it: until then data may come
        task.cancel()


@act(0.5, MOVES)
async def connecting_is_refused(round):
    if round.unix:
        address = os.path.join(round.folder.name, "nobody")
    else:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            address = sock.getsockname()
    round.start(round.connect(Program(round, True), address))


@act(0.3, MOVES)
async def connecting_takes_for_ever(round):
    """The queue of the listening socket is full."""
    if not round.unix:
        if round.deaf is None:
            round.deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        for _ in range(3):
            round.doomed.add(round.start(round.connect(Program(round, True), round.deaf.getsockname())))


@act(25, MOVES)
async def a_peer_moves(round):
    round.move_peer(round.rng)


@act(10, MOVES)
async def a_program_acts(round):
    if round.programs:
        round.rng.choice(round.programs).safe_act("outside")


@act(0.3, MOVES)
async def the_server_closes(round):
    server = round.servers[-1]
    server.close()
    if round.rng.random() < 0.3 and hasattr(server, "close_clients"):
        for program in round.programs:
            if program.server == len(round.servers) - 1:
                program.break_off()
                program.closed = True
        gc.disable()  # asyncio goes through a WeakSet
        round.rng.choice((server.close_clients, server.abort_clients))()
        gc.enable()
    if round.rng.random() < 0.7:
        await round.open_server()


@act(1, MOVES)
async def the_loop_stops(round):
    round.loop.stop()
    await asyncio.sleep(0)


@act(2, MOVES)
async def a_signal_comes(round):
    if round.alarms:
        signal.setitimer(signal.ITIMER_REAL, round.rng.uniform(1e-5, 1e-3))


@act(1, MOVES)
async def garbage_is_collected(round):
    gc.collect()


@act(1, MOVES)
async def time_passes(round):
    await asyncio.sleep(round.rng.choice((0.0002, 0.001)))


@act(0, MOVES)
async def tls_is_started(round):
    """STARTTLS: when each end has all that the other has sent in the clear."""
    program = round.rng.choice(round.programs) if round.programs else None
    other = program.other() if program is not None and program.alive else None
    if other is not None and can_upgrade(program) and can_upgrade(other):
        program.frozen = other.frozen = True
        round.start(upgrade(round, *((other, program) if program.is_client else (program, other))))


def can_upgrade(end):
    if isinstance(end, Peer):
        ready = not end.closed and not end.shut and end.saw is None and isinstance(end.channel, PlainChannel)
        return ready and not end.frozen
    transport = end.ref()
    if transport is None or not end.alive or end.busy or end.secure or end.broken or end.eof_sent or end.eof_seen:
        return False
    return not transport.is_closing() and not transport.get_write_buffer_size()


async def upgrade(round, *ends):
    while any(end.inlet.size < end.other().out.sent for end in ends):
        for end in ends:
            if end.broken or (end.closed if isinstance(end, Peer) else not end.alive or end.ref() is None):
                for each in ends:
                    each.frozen = False
                return
            if isinstance(end, Peer):
                end.attempt(end.receive, 1 << 16)
            elif end.paused:
                end.resume(end.ref())
        await asyncio.sleep(0)
    for end in ends:
        if isinstance(end, Program):
            round.start(end.start_tls())
            await asyncio.sleep(0)
        elif not end.closed:
            end.start_tls()
            end.frozen = False
