"""What a program does, in any callback or between them."""

import asyncio
import contextlib
import gc
import itertools
import tempfile

from random_protocols.ends import SIZES, Boom, Interrupt, act
from random_protocols.programs import new_protocol

ACTS = {}


def in_some_form(program, data):
    """Bytes-like objects; what is not bytes is to be copied, and is changed afterwards."""
    form = program.rng.randrange(5)
    if form == 0:
        return memoryview(b"<" + data + b">")[1:-1]
    if form == 1:
        return bytearray(data)
    if form == 2:
        return memoryview(bytearray(data))
    return data


def scribble(program, form):
    if program.round.patched and not isinstance(form, bytes) and not memoryview(form).readonly:
        form[:] = bytes(len(form))


@act(25, ACTS)
def writes(program, transport, protocol, where):
    def call(data):
        form = in_some_form(program, data)
        transport.write(form)
        scribble(program, form)

    if not program.held_up or program.rng.random() < 0.2:
        program.written(transport, program.rng.choice(SIZES), call)


@act(6, ACTS)
def writes_lines(program, transport, protocol, where):
    def call(data):
        cuts = sorted(program.rng.randrange(len(data) + 1) for _ in range(program.rng.choice((0, 1, 3, 80))))
        pieces = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
        if not program.round.patched:
            pieces = list(filter(None, pieces))  # asyncio never gets rid of an empty last one
        forms = [in_some_form(program, piece) for piece in pieces]
        transport.writelines(iter(forms) if program.rng.random() < 0.3 else forms)
        for form in forms:
            scribble(program, form)

    if program.round.patched or not transport.is_closing():  # asyncio's AttributeError before 3.13.6
        program.written(transport, program.rng.choice(SIZES), call)


@act(1, ACTS)
def writes_eof(program, transport, protocol, where):
    if program.secure:
        if not program.round.wild:
            with contextlib.suppress(NotImplementedError):
                transport.write_eof()
                program.wrong("write_eof() over TLS")
    elif not transport.is_closing():
        program.eof_sent = True
        with contextlib.suppress(() if program.round.patched else OSError):  # where the peer has reset
            transport.write_eof()


@act(1.5, ACTS)
def closes(program, transport, protocol, where):
    program.asked = program.closed = True
    transport.close()


@act(0.7, ACTS)
def aborts(program, transport, protocol, where):
    program.break_off()
    program.closed = True
    transport.abort()


@act(5, ACTS)
def pauses(program, transport, protocol, where):
    if not transport.is_closing():
        program.paused = True
        transport.pause_reading()


@act(8, ACTS)
def resumes(program, transport, protocol, where):
    if program.paused:
        program.resume(transport)


@act(3, ACTS)
def changes_the_protocol(program, transport, protocol, where):
    if not program.lost:
        transport.set_protocol(new_protocol(program))


@act(3, ACTS, harmless=True)
def sets_limits(program, transport, protocol, where):
    high = program.rng.choice((None, 0, 1, 1000, 100_000, 1_000_000))
    low = None if not high else program.rng.choice((None, 0, high // 2, high))
    if program.round.patched or not transport.is_closing():  # asyncio's TLS tells a protocol that it no longer has
        program.sets_limits = True
        try:
            transport.set_write_buffer_limits(high, low)
        finally:
            program.sets_limits = False


@act(4, ACTS, harmless=True)
def looks(program, transport, protocol, where):
    transport.get_write_buffer_size()
    transport.get_write_buffer_limits()
    transport.is_closing(), transport.is_reading(), transport.can_write_eof(), transport.get_protocol(), repr(transport)
    for name in ("socket", "sockname", "peername", "uring", "ssl_object", "peercert", "cipher", "nothing"):
        transport.get_extra_info(name)


@act(5, ACTS, harmless=True)
def forgets(program, transport, protocol, where):
    program.keeps = False
    if protocol is not None:
        protocol.transport = None


@act(2, ACTS)
def remembers(program, transport, protocol, where):
    if protocol is not None:
        protocol.transport = transport


@act(0.7, ACTS)
def raises(program, transport, protocol, where):
    if where in ("data", "updated", "get_buffer", "eof") or program.secure:
        program.break_off()
        program.closed = True
    program.round.booms += where not in ("neighbour", "outside")
    raise Boom(program.name)


@act(0.7, ACTS)
def interrupts(program, transport, protocol, where):
    if program.round.interrupts:
        raise Interrupt(program.name)


@act(3, ACTS)
def acts_soon(program, transport, protocol, where):
    program.round.loop.call_soon(program.act, "soon", program.rng.choice((None, protocol)))


@act(2, ACTS)
def acts_later(program, transport, protocol, where):
    delay_s = program.rng.choice((0, 0.0001, 0.002))
    program.round.loop.call_later(delay_s, program.act, "later", program.rng.choice((None, protocol)))


@act(2, ACTS)
def acts_in_a_task(program, transport, protocol, where):
    async def task(kept):
        for _ in range(program.rng.randrange(3)):
            await asyncio.sleep(0)
            program.act("task", protocol)

    program.round.start(task(program.rng.choice((None, transport))))


@act(4, ACTS, harmless=True)
def calls_a_neighbour(program, transport, protocol, where):
    if program.round.depth < 3:
        program.round.depth += 1
        program.rng.choice(program.round.programs).safe_act("neighbour")
        program.round.depth -= 1


@act(10, ACTS, harmless=True)
def lets_a_peer_move(program, transport, protocol, where):
    program.round.move_peer(program.rng)


@act(1.5, ACTS, harmless=True)
def collects_garbage(program, transport, protocol, where):
    gc.collect(program.rng.randrange(3))


@act(0.7, ACTS)
def sends_a_file(program, transport, protocol, where):
    async def send(transport, size):
        loop, program.filing = program.round.loop, True
        try:
            with tempfile.TemporaryFile() as file:
                skipped = program.rng.choice((0, 0, 1000))
                file.write(bytes(skipped) + program.out.piece(size))
                file.seek(0)  # which is where asyncio begins when sendfile(2) fails
                count = program.rng.choice((None, size))
                program.note("sendfile()", size, "bytes", repr(transport))
                sent = await loop.sendfile(transport, file, skipped, count)
                program.note("sendfile() is done")
                if sent == size:
                    program.owed = program.out.sent
                elif not transport.is_closing():
                    program.wrong(f"sendfile() has sent {sent} of {size} bytes")
        except (OSError, RuntimeError, asyncio.CancelledError) as exc:
            program.note("sendfile() fails", repr(exc))
            program.break_off()  # who knows how much was sent
            transport.abort()
        finally:
            program.filing = False

    async def send_when_possible():
        transport = program.ref()
        if transport is not None and not transport.is_closing() and not program.busy and not program.eof_sent:
            await send(transport, program.rng.choice(SIZES))

    if program.round.can_send_files and (program.file_task is None or program.file_task.done()):
        program.file_task = program.round.start(send_when_possible())
        if program.rng.random() < 0.1:
            program.round.loop.call_later(0.001, program.file_task.cancel)


@act(0, ACTS)
def starts_tls_wildly(program, transport, protocol, where):
    async def upgrade(transport):
        round = program.round
        server_side = program.rng.random() < 0.5
        options = {} if server_side else {"server_hostname": "localhost"}
        program.break_off()
        try:
            new = await round.loop.start_tls(
                transport, protocol or transport.get_protocol(), round.contexts[server_side], server_side=server_side,
                ssl_handshake_timeout=program.rng.choice((0.001, 0.02)), **options,
            )  # fmt: skip
        except (OSError, RuntimeError, asyncio.CancelledError, asyncio.TimeoutError, AttributeError) as exc:
            program.note("start_tls() fails", repr(exc))
        else:
            program.held_up = None
            if new is not None:  # asyncio's, when the connection is gone
                program.remember(new)

    program.upgrade_failed = program.secure = True
    program.held_up = None  # who has been told what, while protocols change hands, is nobody's knowledge
    program.round.doomed.add(program.round.start(upgrade(transport)))
