"""TLS connections that cannot be, or that somebody spoils: the right error once, nothing left, others are served."""

import asyncio
import contextlib
import random
import re
import socket
import ssl

import helpers
import ktls
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import TLSPeer, echoing, meet, place, role, secure  # noqa: F401
from wire import PEER_IS_GONE, recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]


class Guarded:
    """A server of ours that echoes, for clients that misbehave; in the end it must still serve, and hold nothing."""

    def __init__(self, loop, place, server):
        self.loop, self.place, self.server = loop, place, server
        self.visitors = []

    async def visitor(self):
        """A plain socket, connected, and the protocol that the server has made for it."""
        accepted = len(self.place.accepted)
        sock = socket.socket()
        sock.setblocking(False)
        self.visitors.append(sock)
        await self.loop.sock_connect(sock, self.place.address)
        await helpers.eventually(lambda: len(self.place.accepted) > accepted)
        return sock, self.place.accepted[-1]

    async def check(self):
        # A client that gets on with every server here.
        client = tls.authority().context_client(pair=tls.authority().client_pair())
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        transport, protocol = await self.place.connect(self.loop, Recorder, ssl=client, server_hostname="localhost")
        transport.write(pattern(50_000))
        assert await protocol.received(50_000) == pattern(50_000)
        transport.close()
        assert await protocol.lost is None
        for sock in self.visitors:
            sock.close()
        self.server.close()
        engine = helpers.engines.active_engine(self.loop)
        await helpers.eventually(
            lambda: engine.stats()["streams"] == engine.stats()["in_flight"] == 0, why="connections are left"
        )
        for each in self.place.accepted:
            log = each.log
            assert log == [] or (log[0], log[-1]) == ("made", "lost"), log
            assert log.count("made") == log.count("lost") <= 1 and log.count("eof") <= 1, log


@pytest.fixture
def guard(loop, place):
    """await guard(context, **options) serves at `place` until the test ends, and is checked then."""
    made = []

    async def guard(context=None, **options):
        context = context or tls.authority().context_server()
        made.append(Guarded(loop, place, await place.serve(loop, echoing, ssl=context, **options)))
        return made[-1]

    yield guard
    for guarded in made:
        helpers.run_on(loop, guarded.check(), timeout_s=8)


async def to_end(loop, sock):
    """All that comes until the other side is gone."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := await loop.sock_recv(sock, 1 << 16):
            data += chunk
    return bytes(data)


# --------------------------------------------------------------------------
# Handshakes that cannot succeed: (client's context, server's context, name asked for)


def wrong_name():
    return tls.authority().context_client(), tls.authority().context_server("other.test"), "localhost"


def expired():
    return tls.authority().context_client(), tls.authority().context_server(pair=tls.authority().expired()), "localhost"


def self_signed():
    server = tls.authority().context_server(pair=tls.authority().self_signed())
    return tls.authority().context_client(), server, "localhost"


def unknown_authority():
    return ssl.create_default_context(), tls.authority().context_server(), "localhost"


def no_shared_cipher():
    client = tls.authority().context_client(version=tls.TLS_1_2)
    server = tls.authority().context_server(version=tls.TLS_1_2)
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    server.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
    return client, server, "localhost"


def no_shared_version():
    client = tls.authority().context_client(version=tls.TLS_1_2)
    return client, tls.authority().context_server(version=tls.TLS_1_3), "localhost"


def client_without_certificate():
    client = tls.authority().context_client(version=tls.TLS_1_2)
    return client, tls.authority().context_server(verify_client=True, version=tls.TLS_1_2), "localhost"


# What the client raises, with a word of its text; and a word of the server's error.
FAILURES = {
    wrong_name: (ssl.SSLCertVerificationError, "Hostname mismatch", "ALERT"),
    expired: (ssl.SSLCertVerificationError, "certificate has expired", "ALERT_CERTIFICATE_EXPIRED"),
    self_signed: (ssl.SSLCertVerificationError, "self.signed certificate", "ALERT_UNKNOWN_CA"),
    unknown_authority: (ssl.SSLCertVerificationError, "unable to get local issuer", "ALERT_UNKNOWN_CA"),
    no_shared_cipher: (ssl.SSLError, "ALERT_HANDSHAKE_FAILURE", "NO_SHARED_CIPHER"),
    no_shared_version: (ssl.SSLError, "ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL|VERSION_TOO_LOW"),
    client_without_certificate: (ssl.SSLError, "ALERT_HANDSHAKE_FAILURE", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
}
failures = pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)


@failures
@pytest.mark.matrix(base=("asyncio", "uvloop"))
async def test_a_client_that_cannot_connect_says_why_to_both_sides(loop, meet, failure):
    client, server, name = failure()
    kind, text, servers_text = FAILURES[failure]
    made = []
    remember = recorder(lambda: made.append(Recorder()) or made[-1])
    connecting, sock = await meet(remember, "client", client, server_hostname=name)
    peer = TLSPeer(loop, sock, server, server_side=True)
    with pytest.raises(ssl.SSLError, match=servers_text):
        await peer.handshake()
    with pytest.raises(kind, match=text) as raised:
        await connecting
    assert raised.value.library == "SSL" and raised.value.reason
    assert type(raised.value) is kind
    assert await to_end(loop, sock) == b""
    assert made[0].log == []


@failures
@pytest.mark.matrix(debug=(False, True))
async def test_a_server_refuses_a_handshake_and_serves_others(loop, guard, errors, case, failure):
    client, server, name = failure()
    guarded = await guard(server)
    sock, protocol = await guarded.visitor()
    peer = TLSPeer(loop, sock, client, server_side=False, server_hostname=name)
    with pytest.raises(ssl.SSLError):
        await peer.handshake()
    await to_end(loop, sock)
    await helpers.eventually(lambda: helpers.engines.active_engine(loop).stats()["streams"] == 0)
    assert protocol.log == []
    contexts = errors.take()
    if case.debug:
        # As in asyncio, who would report every scanner's visit?
        [context] = contexts
        assert context["message"] == "Error on transport creation for incoming connection"
        assert isinstance(context["exception"], ssl.SSLError)
        assert any(word in str(context["exception"]) for word in FAILURES[failure][2].split("|"))
    else:
        assert contexts == []


async def test_a_client_learns_after_the_handshake_that_it_must_identify_itself(loop, secure):
    """In TLS 1.3 the client is done before the server has looked."""
    client = tls.authority().context_client(version=tls.TLS_1_3)
    server = tls.authority().context_server(verify_client=True, version=tls.TLS_1_3)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        await secure(client=client, server=server)


async def test_a_connection_is_lost_when_the_server_wants_a_certificate(loop, meet):
    client = tls.authority().context_client(version=tls.TLS_1_3)
    server = tls.authority().context_server(verify_client=True, version=tls.TLS_1_3)
    connecting, sock = await meet(Recorder, "client", client)
    peer = TLSPeer(loop, sock, server, server_side=True)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        await peer.handshake()
    _, protocol = await connecting
    lost = await protocol.lost
    assert isinstance(lost, ssl.SSLError) and lost.reason.endswith("ALERT_CERTIFICATE_REQUIRED")
    assert protocol.log == ["made", "lost"]


# --------------------------------------------------------------------------
# Peers that do not speak TLS, or stop in the middle


class Flights:
    """A good peer's side of the handshake, as the pieces that it sends one after the other."""

    def __init__(self, loop, sock, role):
        client, server = tls.authority().context_client(), tls.authority().context_server()
        self.peer = TLSPeer(
            loop,
            sock,
            server if role == "client" else client,
            server_side=role == "client",
            server_hostname=None if role == "client" else "localhost",
        )

    async def next(self):
        """Reads what it takes, and returns what the peer would send now."""
        while True:
            try:
                self.peer.sslobj.do_handshake()
            except ssl.SSLWantReadError:
                pass
            if self.peer.outgoing.pending:
                return self.peer.outgoing.read()
            await self.peer.fill()


FATAL_ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
CLOSE_NOTIFY = b"\x15\x03\x03\x00\x02\x01\x00"
RUBBISH = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "banner": b"220 mail.example.com ESMTP\r\n",
    "zeros": bytes(1000),
    "noise": random.Random(0).randbytes(5000),
    "endless record": b"\x16\x03\x01\xff\xff" + bytes(70_000),
    "empty records": b"\x16\x03\x01\x00\x00" * 100,
    "data instead of a handshake": b"\x17\x03\x03\x00\x20" + bytes(32),
    "empty handshake message": b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
    "alert": FATAL_ALERT,
    "goodbye": CLOSE_NOTIFY,
    "alert in pieces": b"\x15\x03\x03\x00\x01\x02\x15\x03\x03\x00\x01\x28",
    "many warnings": b"\x15\x03\x01\x00\x02\x01\x5a" * 1000,
}


@pytest.mark.parametrize("rubbish", RUBBISH)
async def test_a_client_is_told_that_its_server_does_not_speak_tls(loop, meet, rubbish):
    connecting, sock = await meet(Recorder, "client", tls.authority().context_client())
    await loop.sock_recv(sock, 1 << 16)
    with contextlib.suppress(OSError):
        await loop.sock_sendall(sock, RUBBISH[rubbish])
        sock.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError) as raised:
        await connecting
    assert isinstance(raised.value, (ssl.SSLError, ConnectionError))
    if rubbish in ("http", "banner", "alert"):
        assert isinstance(raised.value, ssl.SSLError) and raised.value.reason
    await to_end(loop, sock)


@pytest.mark.parametrize("rubbish", RUBBISH)
async def test_a_server_ends_visitors_that_do_not_speak_tls(loop, guard, rubbish):
    guarded = await guard()
    sock, protocol = await guarded.visitor()
    with contextlib.suppress(OSError):
        await loop.sock_sendall(sock, RUBBISH[rubbish])
    if rubbish in ("empty records", "goodbye", "empty handshake message"):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    answer = await to_end(loop, sock)
    # An alert, if anything, and never a word of a handshake.
    assert answer == b"" or answer[0] == 21
    assert protocol.log == []


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("sent", [0, 1, 5, "half", "all but one byte"])
@pytest.mark.parametrize("flight", [1, 2])
@pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3], ids=["1.2", "1.3"])
async def test_a_visitor_that_vanishes_in_the_handshake_leaves_nothing(loop, guard, how, sent, flight, version):
    guarded = await guard(tls.authority().context_server(version=version))
    sock, protocol = await guarded.visitor()
    flights = Flights(loop, sock, "server")
    for number in range(flight):
        data = await flights.next()
        if number + 1 < flight:
            await loop.sock_sendall(sock, data)
    await loop.sock_sendall(sock, data[: {"half": len(data) // 2, "all but one byte": -1}.get(sent, sent)])
    if how == "FIN":
        sock.shutdown(socket.SHUT_WR)
        await to_end(loop, sock)
    else:
        helpers.reset(sock)
    await helpers.eventually(lambda: helpers.engines.active_engine(loop).stats()["streams"] == 0)
    assert protocol.log == []


@pytest.mark.parametrize("how", ["FIN", "RST", "alert", "noise"])
@pytest.mark.parametrize("sent", [0, 1, 5, "half", "all but one byte"])
async def test_a_server_that_vanishes_in_the_handshake_fails_the_client(loop, meet, how, sent):
    connecting, sock = await meet(Recorder, "client", tls.authority().context_client())
    data = await Flights(loop, sock, "client").next()
    begun = data[: {"half": len(data) // 2, "all but one byte": -1}.get(sent, sent)]
    instead = {"alert": FATAL_ALERT, "noise": RUBBISH["noise"]}.get(how, b"")
    if (begun + instead).startswith(data):
        # The byte that is missing, which is of the record's tag, is by chance the first of what follows.
        begun = begun[:-1]
    await loop.sock_sendall(sock, begun)
    if how == "RST":
        helpers.reset(sock)
    else:
        await loop.sock_sendall(sock, instead)
        sock.shutdown(socket.SHUT_WR)
    with pytest.raises((ConnectionError, ssl.SSLError)) as raised:
        await connecting
    if how in ("FIN", "RST"):
        assert isinstance(raised.value, ConnectionError)


async def test_a_server_that_never_answers_times_out(loop, meet):
    connecting, sock = await meet(Recorder, "client", tls.authority().context_client(), ssl_handshake_timeout=0.05)
    with pytest.raises(
        ConnectionAbortedError,
        match="^SSL handshake is taking longer than 0.05 seconds: aborting the connection$",
    ):
        await connecting
    assert (await to_end(loop, sock))[:1] == b"\x16"


@pytest.mark.parametrize("sent", [0, 1, 50, -1])
@pytest.mark.matrix(debug=(False, True))
async def test_a_visitor_that_stalls_is_sent_away(loop, guard, errors, case, sent):
    guarded = await guard(ssl_handshake_timeout=0.3)  # in which the client that checks it must make it
    sock, protocol = await guarded.visitor()
    data = await Flights(loop, sock, "server").next()
    await loop.sock_sendall(sock, data[:sent])
    assert await to_end(loop, sock) == b""
    assert protocol.log == []
    contexts = errors.take()
    if case.debug:
        [context] = contexts
        assert "SSL handshake is taking longer than 0.3 seconds" in str(context["exception"])
    else:
        assert contexts == []


async def test_a_crowd_of_visitors_that_stall_does_not_hold_up_others(loop, guard):
    guarded = await guard(ssl_handshake_timeout=5)
    for number in range(50):
        sock, _ = await guarded.visitor()
        data = await Flights(loop, sock, "server").next()
        await loop.sock_sendall(sock, data[: 5 * number])
    transport, protocol = await guarded.place.connect(
        loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
    )
    transport.write(b"hello")
    assert await protocol.received(5) == b"hello"
    transport.close()
    assert await protocol.lost is None


async def test_a_visit_cancelled_in_the_handshake_leaves_nothing(loop, meet):
    for wait in range(8):
        connecting, sock = await meet(Recorder, "client", tls.authority().context_client())
        for _ in range(wait):
            await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await to_end(loop, sock)
    engine = helpers.engines.active_engine(loop)
    await helpers.eventually(lambda: engine.stats()["streams"] == engine.stats()["in_flight"] == 0)


# --------------------------------------------------------------------------
# Records that are spoilt after the handshake

# OpenSSL 3.2 was the first to sum it up, and Pythons older than that have no name for the sum.
BAD_RECORD = "BAD_RECORD_MAC" + ("|(?i:record.layer.failure)" if ssl.OPENSSL_VERSION_INFO >= (3, 2) else "")


def spoilt(record, where):
    record = bytearray(record)
    record[where] ^= 0x40
    return bytes(record)


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("where", [5, -1], ids=["first byte", "last byte"])
async def test_a_changed_record_ends_the_connection_with_openssls_reason(loop, secure, role, base, version, where):
    w = await secure(base, role, version=version)
    good, bad, after = (w.tls.sealed(data) for data in (b"good", b"changed", b"after"))
    await w.send_raw(good + spoilt(bad, where) + after)
    lost = await w.protocol.lost
    assert type(lost) is ssl.SSLError
    assert lost.library == "SSL" and re.search(BAD_RECORD, str(lost))
    # What was genuine before it has been delivered, and nothing else.
    assert w.protocol.data == b"good"
    assert w.protocol.log == ["made", "data", "lost"]
    if not ktls.active(w.transport)[1]:  # a kernel that decrypts sends no alerts
        with pytest.raises(ssl.SSLError, match=BAD_RECORD):
            await w.receive_to_end()


@pytest.mark.parametrize("rubbish", ["http", "zeros", "noise", "endless record", "alert"])
async def test_rubbish_after_the_handshake_ends_the_connection(loop, secure, role, rubbish):
    w = await secure(role=role)
    with contextlib.suppress(OSError):
        # Twice: a kernel that decrypts looks at a record when it has 13 bytes.
        await w.send_raw(2 * RUBBISH[rubbish])
    lost = await w.protocol.lost
    assert isinstance(lost, ssl.SSLError)
    assert w.protocol.log == ["made", "lost"]


async def test_records_in_another_order_or_twice_end_the_connection(loop, secure, role):
    for order in ((1, 0), (0, 0), (0, 2)):
        w = await secure(role=role)
        records = [w.tls.sealed(b"%d" % number) for number in range(3)]
        await w.send_raw(b"".join(records[number] for number in order))
        lost = await w.protocol.lost
        assert isinstance(lost, ssl.SSLError) and re.search(BAD_RECORD, str(lost))
        assert w.protocol.data == (b"0" if order[0] == 0 else b"")


async def test_a_changed_record_is_met_when_a_paused_reader_resumes(loop, secure):
    w = await secure()
    w.transport.pause_reading()
    await w.send_raw(w.tls.sealed(b"good") + spoilt(w.tls.sealed(b"changed"), -1))
    await asyncio.sleep(0.005)
    assert w.protocol.log == ["made"]
    w.transport.resume_reading()
    assert isinstance(await w.protocol.lost, ssl.SSLError)
    assert w.protocol.data == b"good"


async def test_a_changed_record_ends_a_connection_whose_output_is_blocked(loop, secure):
    w = await secure()
    await w.block_writing()
    await w.send_raw(spoilt(w.tls.sealed(b"changed"), -1))
    assert isinstance(await w.protocol.lost, ssl.SSLError)
    assert w.transport.get_write_buffer_size() == 0


async def test_a_changed_record_after_close_ends_the_wait(loop, secure):
    w = await secure()
    w.transport.close()
    await w.send_raw(spoilt(w.tls.sealed(b"changed"), -1))
    lost = await w.protocol.lost
    assert lost is None or isinstance(lost, ssl.SSLError)
    assert w.protocol.data == b""


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_record_without_its_end_is_not_delivered(loop, secure, role, how):
    w = await secure(role=role)
    await w.send_raw(w.tls.sealed(b"whole") + w.tls.sealed(pattern(10_000))[:-1])
    await w.protocol.received(5)
    if how == "FIN":
        w.peer.shutdown(socket.SHUT_WR)
        assert await w.protocol.lost is None
    else:
        w.reset()
        assert isinstance(await w.protocol.lost, PEER_IS_GONE)
    assert w.protocol.data == b"whole"


async def test_a_fatal_error_of_one_connection_does_not_disturb_another(loop, secure):
    """OpenSSL keeps its errors in a queue for each thread."""
    good = await secure()
    for number in range(5):
        bad = await secure()
        await bad.send_raw(spoilt(bad.tls.sealed(b"changed"), -1))
        await good.send(b"%d" % number)
        good.transport.write(b"%d" % number)
        assert isinstance(await bad.protocol.lost, ssl.SSLError)
        await good.protocol.received(number + 1)
        assert await good.receive(1) == b"%d" % number
    assert good.protocol.data == b"01234"


async def test_errors_that_others_left_in_openssls_queue_do_no_harm(loop, secure):
    w = await secure()
    for number in range(3):
        with pytest.raises(ssl.SSLError):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata="no certificate")
        w.transport.write(b"%d" % number)
        await w.send(b"%d" % number)
        assert await w.receive(1) == b"%d" % number
        await w.protocol.received(number + 1)
    await w.say_goodbye()
    assert await w.protocol.lost is None
