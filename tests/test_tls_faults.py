"""TLS under what peers, programs and interrupts do to it: nothing is lost, nothing hangs, the loop goes on."""

import asyncio
import contextlib
import gc
import ssl
import sys
import weakref

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import ANY_BASE, BOTH_LAYERS, TLSPeer, client_with, connect_to_echo, end, meet, place, role, secure  # noqa: F401
from wire import Boom, recorder

pytestmark = [
    tls.needs_openssl,
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

INTERRUPTS = (KeyboardInterrupt, SystemExit)


# --------------------------------------------------------------------------
# Records without data


@ANY_BASE
@BOTH_LAYERS
@pytest.mark.parametrize("kind", ["keys", "tickets"])
async def test_a_peer_that_sends_records_without_data_only_is_sent_away_and_holds_up_nobody(loop, secure, kind):
    w = await secure(version=tls.TLS_1_3, ktls=False)
    if kind == "tickets" and ssl.OPENSSL_VERSION_INFO < (3,):
        pytest.skip("SSL_new_session_ticket() came with OpenSSL 3.0")
    for _ in range(1000):
        w.tls.update_key() if kind == "keys" else w.tls.send_ticket()
    iterations = 0

    def count():
        nonlocal iterations
        iterations += 1
        if not w.protocol.lost.done():
            loop.call_soon(count)

    count()
    with contextlib.suppress(ConnectionError):
        await w.tls.flush()
    lost = await w.protocol.lost
    assert isinstance(lost, ssl.SSLError) and "carry no data" in str(lost)
    assert iterations >= 256 // 16  # a few at a time


@BOTH_LAYERS
@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_data_between_many_records_without_data_arrives(loop, secure, role, base):
    w = await secure(base, role, version=tls.TLS_1_3, ktls=False)
    for _ in range(8):
        for _ in range(100):
            w.tls.update_key()
        w.tls.sslobj.write(b"data")
    sending = loop.create_task(w.tls.flush())
    assert await w.protocol.received(8 * 4) == 8 * b"data"
    await sending
    w.transport.write(b"and back")
    assert await w.receive(8) == b"and back"


@BOTH_LAYERS
async def test_a_goodbye_behind_many_records_without_data_ends_the_connection(loop, secure, role):
    w = await secure(role=role, version=tls.TLS_1_3, ktls=False)
    for _ in range(100):
        w.tls.update_key()
    w.transport.close()
    await w.send_raw(w.tls.outgoing.read() + w.tls.close_notify())
    assert await w.receive_to_end() == (b"", "close_notify")
    assert await w.protocol.lost is None


async def test_answers_that_a_peer_does_not_read_are_bounded(loop, secure, role, case):
    """As those to requests for renegotiation, of which a peer may send any number."""

    answers = 0

    class Answering(ssl.SSLObject):
        def read(self, *args):
            nonlocal answers
            data = super().read(*args)
            answers += super().write(bytes(1000))
            return data

    mine = tls.authority().context_client() if role == "client" else tls.authority().context_server()
    mine.sslobject_class = Answering
    w = await secure(role=role, **{role: mine}, ktls=False)
    w.shrink_buffers(1 << 17)  # smaller ones, full both ways, go on at the pace of TCP's timers

    async def ask():
        for _ in range(100):
            await w.send_raw(b"".join(w.tls.sealed(b"?") for _ in range(100)))
            await asyncio.sleep(0.002)

    asking = loop.create_task(ask())
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() > 100_000)
    size = -1
    while size != (size := w.transport.get_write_buffer_size()):
        await asyncio.sleep(0.05)
    assert 100_000 < size < 2_000_000
    # As many as the reads that took 10,000 records: OpenSSL 3.5 gives several of them at once.
    received = 0
    while len(w.protocol.data) < 10_000 or received < answers:
        missing = answers - received
        assert await w.receive(missing) == bytes(missing)
        received += missing
        await asyncio.sleep(0)
    await asking
    assert w.protocol.data == 10_000 * b"?"


@BOTH_LAYERS
@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_an_error_behind_the_data_whose_protocol_closes_is_told(loop, secure, role, base, errors):
    class Closing(base):
        def data_received(self, data):
            super().data_received(data)
            self.transport.close()

        def buffer_updated(self, size):
            super().buffer_updated(size)
            self.transport.close()

    w = await secure(Closing, role, ktls=False)
    w.tls.sslobj.write(b"data")
    await w.send_raw(w.tls.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
    assert isinstance(await w.protocol.lost, ssl.SSLError)
    for context in errors.take():
        assert isinstance(context["exception"], ssl.SSLError)


# --------------------------------------------------------------------------
# What was written goes out, whatever ends the connection


class Below:
    """TLS over a transport that one has in hand."""

    async def begin(self, loop, place, within_tls):
        self.server = await place.serve(loop, Recorder, ssl=tls.authority().context_server() if within_tls else None)
        client = tls.authority().context_client()
        options = {"ssl": client, "server_hostname": "localhost"} if within_tls else {}
        self.below, self.protocol = await place.connect(loop, Recorder, **options)
        self.other = place.accepted[0]
        self.transport, self.other_transport = await asyncio.gather(
            loop.start_tls(self.below, self.protocol, client, server_hostname="localhost"),
            loop.start_tls(await self.other.made, self.other, tls.authority().context_server(), server_side=True),
        )
        return self


ENDINGS = {
    "close below": lambda b: b.below.close(),
    "abort below": lambda b: b.below.abort(),
    "write_eof below": lambda b: b.below.write_eof(),
    "another protocol below": lambda b: b.below.set_protocol(asyncio.Protocol()) or b.below.close(),
    "abort": lambda b: b.transport.abort(),
    "close": lambda b: b.transport.close(),
}


@ANY_BASE
@BOTH_LAYERS
@pytest.mark.parametrize(
    "within_tls",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="the TLS of 3.10 does not nest")
        ),
    ],
    ids=["tcp", "tls"],
)
@pytest.mark.parametrize("ending", ENDINGS)
async def test_what_was_written_arrives_whatever_ends_the_connection(loop, place, ending, within_tls):
    if within_tls and ending == "write_eof below":
        pytest.skip("TLS has no half-close")
    both = await Below().begin(loop, place, within_tls)
    both.transport.write(b"goodbye")
    ENDINGS[ending](both)
    assert await both.other.received(7) == b"goodbye"
    await both.other.lost
    both.transport.abort()
    if "another" not in ending:
        await both.protocol.lost
    both.server.close()


@BOTH_LAYERS
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the TLS of 3.10 does not nest")
async def test_tls_within_tls_ends_without_a_warning(loop, place, caplog):
    both = await Below().begin(loop, place, True)
    both.transport.close()
    await both.protocol.lost
    await both.other.lost
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    both.server.close()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Server.close_clients() came with 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
@BOTH_LAYERS
async def test_what_was_written_arrives_when_a_server_closes_its_clients(loop, place, how):
    server, _, protocol = await connect_to_echo(loop, place, tls.authority().context_client())
    (await place.accepted[0].made).write(b"goodbye")
    getattr(server, how)()
    assert await protocol.received(7) == b"goodbye"
    await protocol.lost
    await place.accepted[0].lost
    server.close()


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
@BOTH_LAYERS
async def test_what_was_written_before_a_callback_failed_arrives(loop, secure, role, errors, base):
    def say_why(protocol, _):
        protocol.transport.write(b"sorry")
        raise Boom

    w = await secure(recorder(base, **{"data_received" if base is Recorder else "buffer_updated": say_why}), role)
    await w.send(b"data")
    assert await w.receive_to_end() == (b"sorry", "eof")
    assert isinstance(await w.protocol.lost, Boom)
    errors.take()


@BOTH_LAYERS
async def test_a_peer_that_says_goodbye_and_does_not_read_is_waited_for_no_longer_than_told(loop, secure, role):
    w = await secure(role=role, ssl_shutdown_timeout=0.1, ktls=False)
    await w.block_writing()
    await w.say_goodbye()
    lost = await helpers.within(w.protocol.lost)
    assert isinstance(lost, TimeoutError if sys.version_info >= (3, 11) else asyncio.TimeoutError)


async def test_the_size_of_the_output_is_told_after_the_socket_was_asked(loop, secure):
    """So who waits for 0 by asking, or goes on with blocking work, has sent it."""
    w = await secure(ktls=False)
    w.transport.write(b"little")
    assert w.transport.get_write_buffer_size() == 0
    w.peer.setblocking(True)
    assert await w.receive(6) == b"little"


# --------------------------------------------------------------------------
# Failures and interrupts in the middle


def run_until_lost(run, protocol, exception, begin=None):
    """Begins something and runs until connection_lost(); an interrupt comes out once, on the way."""

    async def until_lost():
        if begin is not None:
            await begin()
        await helpers.within(asyncio.shield(protocol.lost))
        await asyncio.sleep(0.02)

    if issubclass(exception, INTERRUPTS):
        with pytest.raises(exception):
            run(until_lost())
    else:
        run(until_lost())
    return run(helpers.within(protocol.lost))


ANY_FAILURE = pytest.mark.parametrize("exception", [Boom, *INTERRUPTS, asyncio.CancelledError])


@ANY_BASE
@ANY_FAILURE
@pytest.mark.parametrize("method", ["read", "write", "unwrap", "pending"])
def test_whatever_a_tls_object_raises_ends_the_connection(loop, place, run, errors, method, exception):
    armed = []

    class Failing(ssl.SSLObject):
        pass

    def fail(self, *args):
        if armed:
            raise armed.pop()
        return getattr(ssl.SSLObject, method)(self, *args)

    setattr(Failing, method, fail)
    base = BufferedRecorder if method == "pending" else Recorder
    server, transport, protocol = run(connect_to_echo(loop, place, client_with(Failing), base))
    armed.append(exception)
    transport.write(b"data")
    if method == "unwrap":
        transport.close()
    lost = run_until_lost(run, protocol, exception)
    assert not armed
    assert isinstance(lost, ConnectionAbortedError if issubclass(exception, INTERRUPTS) else exception)
    assert protocol.log.count("lost") == 1 and protocol.log[-1] == "lost"
    assert [type(each) for each in errors.exceptions()] == [Boom] * (exception is Boom)
    errors.take()
    run(end(server, place))


def _name_of(callback):
    return type(getattr(callback, "__self__", None)).__name__, getattr(callback, "__name__", None)


@pytest.fixture
def fail_at(loop, monkeypatch):
    """fail_at(step, exception): the loop fails once when it is asked to call a transport's method of that name."""
    armed = []

    def wrapped(name):
        real = getattr(loop, name)

        def method(*args, **kwargs):
            callback = args[name == "call_later"]
            if armed and _name_of(callback) == armed[0][0]:
                raise armed.pop()[1]
            return real(*args, **kwargs)

        monkeypatch.setattr(loop, name, method)

    wrapped("call_soon")
    wrapped("call_later")

    def fail_at(step, exception):
        owner = "StreamTransport" if step == "close" else "SSLStreamTransport"
        armed[:] = [((owner, step), exception)]

    yield fail_at
    assert not armed


@ANY_FAILURE
def test_what_fails_before_the_handshake_fails_the_connection(loop, place, run, errors, fail_at, exception):
    fail_at("_check_handshake_timeout", exception())

    async def connect():
        place.listener()
        options = {"ssl": tls.authority().context_client(), "server_hostname": "localhost"}
        connectings.append(loop.create_task(place.connect(loop, Recorder, **options)))
        await asyncio.wait(connectings)

    connectings = []
    interrupts = issubclass(exception, INTERRUPTS)
    with pytest.raises(exception) if interrupts else contextlib.nullcontext():
        run(connect())
        run(asyncio.sleep(0.02))

    async def outcome():
        with pytest.raises(ConnectionAbortedError if interrupts else exception):
            await connectings[0]

    run(outcome())
    assert [type(each) for each in errors.exceptions()] == [Boom] * (exception is Boom)
    errors.take()


@ANY_FAILURE
@pytest.mark.parametrize("step", ["_resume", "_check_shutdown_timeout", "close"])
def test_whatever_fails_in_a_change_of_state_ends_the_connection(
    loop, secure, role, run, errors, fail_at, step, exception
):
    """Here: what the loop is asked for. Where a signal arrives is nobody's choice."""
    interrupts = issubclass(exception, INTERRUPTS)
    w = run(secure(role=role))
    fail_at(step, exception())
    if step == "_resume":
        w.transport.pause_reading()
        w.transport.resume_reading()
    elif step == "_check_shutdown_timeout":
        w.transport.close()
    lost = run_until_lost(run, w.protocol, exception, w.say_goodbye if step == "close" else None)
    assert isinstance(lost, ConnectionAbortedError if interrupts else exception)
    assert w.protocol.log.count("lost") == 1 and w.protocol.log[-1] == "lost"
    assert [type(each) for each in errors.exceptions()] == [Boom] * (exception is Boom)
    errors.take()


# --------------------------------------------------------------------------
# Callbacks that run the loop, as nest_asyncio lets them


@pytest.fixture
def asyncios_refusals(monkeypatch):
    """asyncio does not call a reader whose callback runs the loop, and says so each time; pytest would keep that."""
    monkeypatch.setattr(asyncio.log.logger, "disabled", True)


def run_within(loop, condition, limit_s=3):
    end_at = loop.time() + limit_s
    while not condition():
        assert loop.time() < end_at, "the loop that runs in a callback does not go on"
        loop.call_later(0.01, lambda: None)
        loop._run_once()


@BOTH_LAYERS
@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_a_callback_may_run_the_loop_until_more_has_come(loop, secure, role, base, asyncios_refusals):
    pieces = [pattern(size, seed=size) for size in (10, 40_000, 1000, 300_000)]
    ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]

    def wait_for_more(protocol, _):
        if len(protocol.data) in ends[:-1]:
            number = ends.index(len(protocol.data)) + 1
            loop.call_soon(protocol.transport.write, b"more, please")
            loop.create_task(w.send(pieces[number]))
            run_within(loop, lambda: len(protocol.data) >= ends[number])

    w = await secure(recorder(base, **{"data_received" if base is Recorder else "buffer_updated": wait_for_more}), role)
    await w.send(pieces[0])
    whole = b"".join(pieces)
    assert await w.protocol.received(len(whole)) == whole
    w.transport.write(b"goes on")
    assert await w.receive(3 * 12 + 7) == 3 * b"more, please" + b"goes on"


@BOTH_LAYERS
async def test_a_callback_may_run_the_loop_for_another_connection(loop, place, asyncios_refusals):
    def ask_onward(protocol, data):
        if data == b"onward":

            async def ask():
                transport, onward = await place.connect(
                    loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
                )
                transport.write(b"question")
                answers.append(await onward.received(8))
                transport.abort()
                await onward.lost

            task = loop.create_task(ask())
            run_within(loop, task.done)
        protocol.transport.write(data)

    answers = []
    server = await place.serve(loop, recorder(data_received=ask_onward), ssl=tls.authority().context_server())
    transport, protocol = await place.connect(
        loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
    )
    transport.write(b"onward")
    assert await protocol.received(6) == b"onward"
    assert answers == [b"question"]
    await end(server, place, protocol)


@BOTH_LAYERS
async def test_input_that_comes_while_a_callback_in_the_handshake_runs_the_loop_is_not_lost(
    loop, meet, asyncios_refusals
):
    def wait(*_):
        # Ignored in TLS 1.3, for the sake of what stands between (RFC 8446 appendix D.4).
        sock.send(b"\x14\x03\x03\x00\x01\x01")
        for _ in range(5):
            loop.call_soon(int)
            loop._run_once()
        waited.append(True)

    waited = []
    context = tls.authority().context_server(version=tls.TLS_1_3, ktls=False)
    context.sni_callback = wait
    connecting, sock = await meet(Recorder, "server", context)
    peer = TLSPeer(loop, sock, tls.authority().context_client(), False, "localhost")
    await peer.handshake()
    transport, protocol = await connecting
    assert waited
    await peer.send(b"data")
    assert await protocol.received(4) == b"data"
    transport.abort()
    await protocol.lost


@BOTH_LAYERS
@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_a_protocol_that_is_replaced_in_its_callback_may_be_freed_there(loop, place, base):
    """The layer above, too, in the middle of a delivery to it."""

    def replace(protocol, _):
        transport = protocol.transport
        protocol.transport = protocol.made = None
        place.accepted.remove(protocol)
        transport.set_protocol(later)
        transports.append(transport)

    later, transports = Recorder(), []
    name = "data_received" if base is Recorder else "buffer_updated"
    server = await place.serve(loop, recorder(base, **{name: replace}), ssl=tls.authority().context_server())
    transport, protocol = await place.connect(
        loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
    )
    transport.write(b"first")
    await helpers.eventually(lambda: transports)
    transport.write(b"then")
    assert await later.received(4) == b"then"
    transports.pop().abort()
    await later.lost
    await end(server, place, protocol)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the TLS of 3.10 does not nest")
@pytest.mark.parametrize("within_tls", [False, True], ids=["tcp", "tls"])
@BOTH_LAYERS
async def test_tls_that_another_protocol_replaces_in_a_callback_of_its_own_may_be_freed_there(loop, place, within_tls):
    """The layer is in the middle of a delivery when the transport below lets go of it."""
    both = await Below().begin(loop, place, within_tls)
    layer = weakref.ref(both.transport)

    def replace(data):
        both.below.set_protocol(later)
        both.transport = both.protocol.transport = both.protocol.made = None
        gc.collect()

    later = Recorder()
    both.protocol.data_received = replace
    both.other_transport.write(pattern(300_000))
    await helpers.eventually(lambda: both.transport is None)
    await helpers.eventually(lambda: gc.collect() is not None and layer() is None)
    both.below.abort()
    await later.lost
    await both.other.lost
    both.server.close()


# --------------------------------------------------------------------------
# Calls that no program should make


async def test_a_transport_is_made_once(loop, secure, place):
    w = await secure()
    for thing in (w.transport,):
        kind = type(thing)
        with pytest.raises(TypeError):
            kind.__new__(kind)
        with contextlib.suppress(TypeError):
            thing.__init__(thing._engine, None, Recorder(), None)
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


@pytest.mark.parametrize("call", ["data_received", "feed_early"])
async def test_a_layer_takes_bytes_only(loop, secure, call):
    w = await secure()
    for nonsense in (5, None, "text", [b"list"]):
        with pytest.raises(TypeError):
            getattr(w.transport, call)(nonsense)
    getattr(w.transport, call)(bytearray())
    await w.send(b"behind the tickets, ")
    await w.protocol.received(20)
    w.transport.data_received(bytearray(w.tls.sealed(b"any bytes")))
    assert await w.protocol.received(29) == b"behind the tickets, any bytes"


def test_connections_leave_no_references_in_openssl():
    """A reference count is an int: one that grows with each connection overflows one day."""
    code = """
import ctypes, gc, ssl
made, real = [], ssl.MemoryBIO
ssl.MemoryBIO = lambda: made.append(real()) or made[-1]
from aiouringnet._tls import openssl
ssl.MemoryBIO = real
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

def numbers(bio):
    address = ctypes.c_void_p.from_address(id(bio) + object.__basicsize__).value
    return [ctypes.c_int.from_address(address + offset).value for offset in range(0, 128, 4)]

openssl.make_records(context, False, "localhost")
before = [numbers(bio) for bio in made]
for _ in range(10):
    openssl.make_records(context, False, "localhost")
gc.collect()
assert made and [numbers(bio) for bio in made] == before
"""
    if openssl_why_not():
        pytest.skip("OpenSSL's functions cannot be called here")
    done = helpers.run_python(code)
    assert done.returncode == 0, done.stderr


def openssl_why_not():
    import aiouringnet._tls

    return aiouringnet._tls.why_not_openssl()
