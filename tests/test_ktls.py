"""Kernel TLS: the kernel encrypts and decrypts, and a connection behaves as if it did not.

Wherever the peer is the standard library's TLS in user space, each byte that
arrives there, and each that arrives here, went through the kernel's cipher:
`proof` reads /proc/net/tls_stat after every test.
"""

import asyncio
import collections
import functools
import hashlib
import os
import platform
import random
import socket
import ssl
import sys

import helpers
import ktls
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from openssl_command import EchoOf, connect, s_client, s_server, serving
from tls_wire import TLSPeer, send_ticket, update_key
from wire import over, recorder

import aiouringnet

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.every_kernel,
    tls.needs_openssl,
    pytest.mark.usefixtures("kernel_tls"),
    pytest.mark.matrix(base="asyncio", debug=False),
]

MIB = 1 << 20
RECORD_BYTES = 16384

# Each way, in the tests that are there for the amount.
BULK_BYTES = int(os.environ.get("AIOURINGNET_TEST_BULK_MIB", 8)) * MIB

versions = pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3], ids=["1.2", "1.3"])
roles = pytest.mark.parametrize("role", ["client", "server"])
kinds = pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])


@pytest.fixture
def proof(monkeypatch):
    """proof(transport, version): the test's connection is one that the kernel has taken over."""
    monkeypatch.setenv("AIOURINGNET_TLS", "openssl")
    proof = ktls.Proof()
    yield proof
    proof.check()


class Met:
    """A transport of ours over kernel TLS, and the standard library's blocking TLS socket at the other end."""

    def __init__(self, loop, transport, protocol, peer):
        self.loop, self.transport, self.protocol, self.peer = loop, transport, protocol, peer

    async def call(self, function, *args):
        return await self.loop.run_in_executor(None, function, *args)

    async def send(self, data):
        await self.call(self.peer.sendall, data)

    async def receive(self, size_bytes):
        return await self.call(helpers.receive_exactly, self.peer, size_bytes)

    async def receive_to_end(self):
        """What comes, and how it ends: "close_notify", "eof" or "reset"."""
        return await self.call(received_to_end, self.peer)


def received_to_end(sock):
    data = bytearray()
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except ssl.SSLEOFError:
        return bytes(data), "eof"
    except ConnectionResetError:
        return bytes(data), "reset"
    return bytes(data), "close_notify"


@pytest.fixture
def meet(loop, proof):
    """await meet(factory, role, version) -> Met; kernel TLS is on at our end, and at the peer's if it is told so."""
    made = []

    async def meet(factory=Recorder, role="client", version=tls.TLS_1_2, peer_ktls=False, buffers_bytes=None):
        contexts = {
            "server": tls.authority().context_server(version=version, ktls=role == "server" or peer_ktls),
            "client": tls.authority().context_client(version=version, ktls=role == "client" or peer_ktls),
        }
        theirs, ours = socket.create_server(("127.0.0.1", 0)), socket.socket()
        with theirs:
            if buffers_bytes:
                for sock in (theirs, ours):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers_bytes)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers_bytes)
            ours.connect(theirs.getsockname())
            peer, _ = theirs.accept()
        peer.settimeout(10)
        wrap = functools.partial(
            contexts["client" if role == "server" else "server"].wrap_socket,
            peer,
            server_side=role == "client",
            server_hostname="localhost" if role == "server" else None,
            suppress_ragged_eofs=False,
        )
        handshake = loop.run_in_executor(None, wrap)
        if role == "client":
            transport, protocol = await loop.create_connection(
                factory, sock=ours, ssl=contexts[role], server_hostname="localhost"
            )
        else:
            ours.setblocking(False)
            transport, protocol = await loop.connect_accepted_socket(factory, ours, ssl=contexts[role])
        peer = await handshake
        proof(transport, version)
        if peer_ktls:
            proof.of_peer(version)
        made.append(Met(loop, transport, protocol, peer))
        return made[-1]

    yield meet
    for met in made:
        met.transport.abort()
        met.peer.close()


# --------------------------------------------------------------------------
# Data


CIPHERS = [
    pytest.param(tls.TLS_1_2, "ECDHE-ECDSA-AES128-GCM-SHA256", id="1.2-AES128-GCM"),
    pytest.param(tls.TLS_1_2, "ECDHE-ECDSA-AES256-GCM-SHA384", id="1.2-AES256-GCM"),
    pytest.param(tls.TLS_1_2, "ECDHE-ECDSA-CHACHA20-POLY1305", id="1.2-CHACHA20"),
    pytest.param(tls.TLS_1_3, "TLS_AES_128_GCM_SHA256", id="1.3-AES128-GCM"),
    pytest.param(tls.TLS_1_3, "TLS_AES_256_GCM_SHA384", id="1.3-AES256-GCM"),
    pytest.param(tls.TLS_1_3, "TLS_CHACHA20_POLY1305_SHA256", id="1.3-CHACHA20"),
]


def choosing(version, cipher):
    """The openssl command's options; Python's contexts cannot choose the ciphers of TLS 1.3."""
    return ("-tls1_2", "-cipher", cipher) if version == tls.TLS_1_2 else ("-tls1_3", "-ciphersuites", cipher)


@over("tcp")
@pytest.mark.parametrize("version, cipher", CIPHERS)
async def test_the_kernel_has_the_cipher_that_s_client_wants(loop, endpoint, proof, version, cipher):
    data = pattern(MIB)
    async with serving(loop, endpoint, tls.authority().context_server(ktls=True), lambda: EchoOf(len(data))):
        done = await s_client(endpoint, "-quiet", *choosing(version, cipher), input=data)
    assert done.stdout == data, done.stderr
    transport = endpoint.accepted[0].transport
    assert transport.get_extra_info("cipher")[0] == cipher
    proof(transport, version)


@pytest.mark.parametrize("version, cipher", CIPHERS)
async def test_the_kernel_has_the_cipher_that_s_server_wants(loop, proof, tmp_path, version, cipher):
    (tmp_path / "file").write_bytes(pattern(MIB))
    with s_server("-HTTP", *choosing(version, cipher), cwd=tmp_path) as service:
        transport, protocol = await connect(loop, service, tls.authority().context_client(ktls=True))
        assert transport.get_extra_info("cipher")[0] == cipher
        proof(transport, version)
        transport.write(b"GET /file HTTP/1.0\r\n\r\n")
        assert await protocol.lost is None
    assert bytes(protocol.data) == pattern(MIB)


@versions
@roles
@kinds
async def test_messages_of_any_size_come_back(meet, role, version, kind):
    met = await meet(recorder(kind, **{"data_received" if kind is Recorder else "buffer_updated": echo}), role, version)
    for size in (1, 2, 100, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 100_000, 3):
        await met.send(pattern(size, seed=size))
        assert await met.receive(size) == pattern(size, seed=size)


def echo(protocol, what):
    protocol.transport.write(what if isinstance(what, bytes) else bytes(protocol.buffer[:what]))


@versions
async def test_what_one_callback_writes_is_one_record(loop, meet, version):
    aiouringnet.patch_loop(loop, gather="always")  # a task writes here
    met = await meet(version=version)
    for _ in range(3):
        met.transport.write(b"head")
        met.transport.writelines([b"and", b"body"])
        # SSL_read returns what one record holds.
        assert await met.call(met.peer.recv, 1000) == b"headandbody"


class Pump:
    """Random bytes in random pieces, and the hash of them all; the same again for the same seed."""

    def __init__(self, size_bytes, seed):
        self.random = random.Random(seed)
        self.left = size_bytes
        self.hash = hashlib.sha256()

    def __iter__(self):
        while self.left:
            # Most are small in number of pieces, and large in number of bytes.
            piece = self.random.randbytes(min(self.left, int(2 ** self.random.uniform(0, 19))))
            self.left -= len(piece)
            self.hash.update(piece)
            yield piece


async def pumped(writer, seed, interrupt=None):
    pump = Pump(BULK_BYTES, seed)
    for number, piece in enumerate(pump):
        writer.write(piece)
        await writer.drain()
        if interrupt is not None and number % 10 == 9:
            interrupt(number // 10)
    return pump.hash.hexdigest()


async def swallowed(reader):
    digest, left = hashlib.sha256(), BULK_BYTES
    while left:
        data = await reader.read(1 << 18)
        assert data, f"the stream ended with {left} bytes to come"
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


@pytest.mark.limit(60 + BULK_BYTES // MIB)
@pytest.mark.matrix(sqpoll=True)
@versions
async def test_bulk_arrives_whole_in_both_directions_at_once(loop, proof, version):
    await bulk_both_ways(loop, proof, version)


async def bulk_both_ways(loop, proof, version):
    accepted = loop.create_future()
    server = await asyncio.start_server(
        lambda *streams: accepted.set_result(streams),
        "127.0.0.1",
        0,
        ssl=tls.authority().context_server(version=version, ktls=True),
    )
    client = await asyncio.open_connection(
        *server.sockets[0].getsockname(),
        ssl=tls.authority().context_client(version=version, ktls=True),
        server_hostname="localhost",
    )
    ends = [client, await accepted]
    for _, writer in ends:
        proof(writer.transport, version)
    tasks = [pumped(ends[0][1], 1), swallowed(ends[1][0]), pumped(ends[1][1], 2), swallowed(ends[0][0])]
    sent, received, sent_back, received_back = await asyncio.gather(*tasks)
    assert sent == received and sent_back == received_back
    for _, writer in ends:
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


@pytest.mark.limit(60 + BULK_BYTES // MIB)
@versions
@roles
@pytest.mark.parametrize("peer_ktls", [False, True], ids=["", "peer-too"])
async def test_bulk_comes_back_whole_from_another_tls(meet, role, version, peer_ktls):
    met = await meet(helpers.Echo, role, version, peer_ktls)
    pump, returned = Pump(BULK_BYTES, 3), hashlib.sha256()
    for piece in pump:
        await met.send(piece)
        returned.update(await met.receive(len(piece)))
    assert returned.hexdigest() == pump.hash.hexdigest()


# --------------------------------------------------------------------------
# Worker threads


@pytest.fixture
def workers(loop):
    """Sends of two records and more go to io_uring's worker threads."""
    aiouringnet.patch_loop(loop, ktls_worker_bytes=2 * RECORD_BYTES)


by_workers = pytest.mark.matrix(engine="uring")


@by_workers
@pytest.mark.limit(60 + BULK_BYTES // MIB)
@versions
async def test_worker_threads_encrypt_bulk_in_order(workers, loop, proof, version):
    await bulk_both_ways(loop, proof, version)
    stats = aiouringnet.stats()
    assert 0 < stats["worker_sends"] <= stats["ring_sends"]


@by_workers
@versions
async def test_a_worker_thread_waits_for_no_slow_peer(workers, meet, version):
    met = await meet(version=version, buffers_bytes=65536)
    data = pattern(2 * MIB)
    met.transport.write(data)
    await helpers.eventually(lambda: "pause" in met.protocol.log)
    # Small messages keep their order behind it.
    met.transport.write(b"the end")
    assert await met.receive(len(data)) == data
    assert await met.receive(7) == b"the end"
    assert met.transport.get_write_buffer_size() == 0


@by_workers
@versions
@pytest.mark.parametrize("how", ["abort", "close the loop"])
def test_a_worker_threads_send_does_not_outlive_its_connection(workers, loop, meet, version, how):
    async def begin():
        met = await meet(version=version, buffers_bytes=65536)
        met.transport.write(bytes(4 * MIB))
        assert aiouringnet.stats()["worker_sends"] == 1
        if how == "abort":
            await asyncio.sleep(0)
            met.transport.abort()
            assert await met.protocol.lost is None

    loop.run_until_complete(begin())
    loop.close()


# --------------------------------------------------------------------------
# Flow


@versions
@roles
async def test_writing_pauses_while_the_peer_does_not_read(meet, role, version):
    met = await meet(role=role, version=version, buffers_bytes=65536)
    data = pattern(2 * MIB)
    for start in range(0, len(data), 100_000):
        met.transport.write(data[start : start + 100_000])
    await helpers.eventually(lambda: "pause" in met.protocol.log)
    assert await met.receive(len(data)) == data
    await helpers.eventually(lambda: met.protocol.log[-1] == "resume")
    assert met.transport.get_write_buffer_size() == 0


@versions
@kinds
async def test_nothing_arrives_while_reading_is_paused(meet, version, kind):
    met = await meet(kind, version=version)
    data = pattern(300_000)
    await met.send(data[:1000])
    assert await met.protocol.received(1000) == data[:1000]
    met.transport.pause_reading()
    sending = asyncio.ensure_future(met.send(data[1000:]))
    await asyncio.sleep(0.2)
    assert len(met.protocol.data) == 1000
    met.transport.resume_reading()
    assert await met.protocol.received(len(data)) == data
    await sending


@versions
@kinds
async def test_reading_pauses_in_every_callback(meet, version, kind):
    def pause(protocol, what):
        protocol.transport.pause_reading()
        protocol.loop.call_soon(protocol.transport.resume_reading)

    factory = recorder(
        kind,
        connection_made=lambda protocol, transport: setattr(protocol, "loop", asyncio.get_running_loop()),
        **{"data_received" if kind is Recorder else "buffer_updated": pause},
    )
    met = await meet(factory, version=version)
    data = pattern(300_000)
    await met.send(data)
    assert await met.protocol.received(len(data)) == data


@versions
async def test_the_protocol_changes_in_mid_connection(meet, version):
    met = await meet(version=version)
    await met.send(b"to the first")
    await met.protocol.received(12)
    second = BufferedRecorder(buffer_size=100)
    met.transport.set_protocol(second)
    await met.send(pattern(10_000))
    assert await second.received(10_000) == pattern(10_000)
    assert met.protocol.data == b"to the first"
    met.transport.abort()
    await second.lost


# --------------------------------------------------------------------------
# The end


@versions
@roles
@kinds
async def test_the_peer_says_goodbye_and_hears_ours(meet, role, version, kind):
    met = await meet(kind, role, version)
    await met.send(b"last words")
    await met.call(met.peer.unwrap)  # an exception, if ours does not come
    assert await met.protocol.lost is None
    assert met.protocol.data == b"last words"
    assert met.protocol.log == ["made", "data", "eof", "lost"]


@versions
@roles
async def test_all_that_was_written_precedes_our_goodbye(meet, role, version):
    met = await meet(role=role, version=version, buffers_bytes=65536)
    data = pattern(2 * MIB)
    met.transport.write(data)
    await helpers.eventually(lambda: "pause" in met.protocol.log)
    met.transport.close()
    assert await met.receive_to_end() == (data, "close_notify")
    await met.call(met.peer.unwrap)
    assert await met.protocol.lost is None


@versions
async def test_what_arrives_after_our_goodbye_is_dropped(meet, version):
    met = await meet(version=version)
    met.transport.close()
    await met.send(pattern(200_000))
    assert await met.receive_to_end() == (b"", "close_notify")
    await met.call(met.peer.unwrap)
    assert await met.protocol.lost is None
    assert met.protocol.log == ["made", "lost"] or met.protocol.log == ["made", "eof", "lost"]


@versions
@roles
@kinds
async def test_a_peer_that_just_ends_has_ended(meet, role, version, kind):
    met = await meet(kind, role, version)
    await met.send(b"last words")
    met.transport.write(b"and yours")
    await met.receive(9)  # with a server's tickets: what a socket has not read, it answers with a reset
    socket.socket(fileno=met.peer.detach()).close()
    assert await met.protocol.lost is None
    assert met.protocol.data == b"last words"
    assert met.protocol.log == ["made", "data", "eof", "lost"]


@versions
async def test_a_record_that_is_cut_off_is_not_delivered(meet, version):
    met = await meet(version=version)
    await met.send(b"last words")
    raw = socket.socket(fileno=met.peer.detach())
    raw.sendall(b"\x17\x03\x03\x01\x00" + bytes(100))
    raw.close()
    assert await met.protocol.lost is None
    assert met.protocol.data == b"last words"


@versions
async def test_a_forged_record_ends_the_connection_and_the_peer_is_told(meet, proof, version, errors):
    met = await meet(version=version)
    await met.send(b"last words")
    await met.protocol.received(10)
    os.write(met.peer.fileno(), b"\x17\x03\x03\x01\x00" + bytes(256))
    lost = await met.protocol.lost
    assert isinstance(lost, ssl.SSLError) and lost.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
    assert met.protocol.data == b"last words"
    with pytest.raises(ssl.SSLError) as told:
        await met.call(met.peer.recv, 1)
    assert told.value.reason == "SSLV3_ALERT_BAD_RECORD_MAC"  # OpenSSL's name of alert 20
    proof.forged = int(ktls.expected(version)[1])
    errors.take()


@versions
@roles
async def test_abort_ends_a_connection_with_output_under_way(meet, role, version):
    met = await meet(role=role, version=version, buffers_bytes=65536)
    met.transport.write(bytes(2 * MIB))
    await helpers.eventually(lambda: "pause" in met.protocol.log)
    met.transport.abort()
    assert await met.protocol.lost is None
    data, how = await met.receive_to_end()
    assert len(data) < 2 * MIB and how in ("eof", "reset")


@versions
async def test_a_reset_is_reported(meet, version):
    met = await meet(version=version)
    await met.send(b"last words")
    await met.protocol.received(10)
    helpers.reset(socket.socket(fileno=met.peer.detach()))
    assert isinstance(await met.protocol.lost, (ConnectionResetError, BrokenPipeError))


# --------------------------------------------------------------------------
# Upgrades


@versions
async def test_an_upgraded_connection_is_taken_over_at_both_ends(loop, proof, version):
    with helpers.Endpoint("tcp") as endpoint:
        context = tls.authority().context_server(version=version, ktls=True)
        server = await endpoint.serve(loop, lambda: helpers.Upgrading(context))
        transport, protocol = await endpoint.connect(loop, Recorder)
        transport.write(b"upgrade")
        assert await protocol.received(8) == b"go ahead"
        context = tls.authority().context_client(version=version, ktls=True)
        secure = await loop.start_tls(transport, protocol, context, server_hostname="localhost")
        data = pattern(MIB)
        secure.write(data)
        assert (await protocol.received(8 + len(data)))[8:] == data
        for each in (secure, endpoint.accepted[0].transport):
            proof(each, version)
        secure.close()
        assert await protocol.lost is None
        assert await endpoint.accepted[0].lost is None
        server.close()
        await server.wait_closed()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="StreamWriter.start_tls came with 3.11")
@versions
async def test_what_had_arrived_before_an_upgrade_is_not_lost(loop, proof, version):
    """The kernel cannot have that any more, so it does not receive; it sends all the same."""

    async def serve(reader, writer):
        assert await reader.readline() == b"upgrade\n"
        await writer.start_tls(tls.authority().context_server(version=version, ktls=True))
        accepted.set_result(writer.transport)
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
        done.set_result(None)

    accepted, done = loop.create_future(), loop.create_future()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, server.sockets[0].getsockname())
        peer = TLSPeer(loop, sock, tls.authority().context_client(version=version), False, "localhost")
        with pytest.raises(ssl.SSLWantReadError):
            peer.sslobj.do_handshake()
        # In one segment: the server's reader has both.
        await loop.sock_sendall(sock, b"upgrade\n" + peer.outgoing.read())
        await peer.handshake()
        data = pattern(300_000)
        sending = loop.create_task(peer.send(data))
        assert await peer.receive(len(data)) == data
        await sending
        transport = await accepted
        assert ktls.active(transport) == (True, False)
        if ktls.expected(version)[1]:
            assert "received before" in transport.get_extra_info("ktls_why_not")
        proof.sending += 1
        await loop.sock_sendall(sock, peer.close_notify())
        assert await peer.receive_to_end() == (b"", "close_notify")
        await done
    server.close()
    await server.wait_closed()


# --------------------------------------------------------------------------
# New keys


def can_rekey():
    """Whether kernel and OpenSSL change keys of TLS 1.3: since 6.14, and 3.5."""
    return tuple(map(int, platform.release().split(".")[:2])) >= (6, 14) and ssl.OPENSSL_VERSION_INFO >= (3, 5)


cannot_rekey = pytest.mark.skipif(can_rekey(), reason="this kernel and this OpenSSL change keys")
rekeying = pytest.mark.skipif(not can_rekey(), reason="this kernel, or this OpenSSL, does not change keys")

# A KeyUpdate that asks for ours in return, or not.
requests = pytest.mark.parametrize("and_yours", [True, False], ids=["both", "theirs"])


def ends_by(and_yours):
    """Whether a KeyUpdate ends a connection whose keys the kernel cannot change: those of OpenSSL are its own."""
    return and_yours or all(ktls.expected(tls.TLS_1_3))


@cannot_rekey
@roles
@requests
@pytest.mark.parametrize("times", [1, 3])
async def test_new_keys_that_the_kernel_cannot_follow_end_the_connection_and_say_so(
    loop, proof, role, and_yours, times
):
    """What came next, or what we sent next, nobody could decrypt."""
    if not ends_by(and_yours):
        pytest.skip("the kernel does not receive: see test_new_keys_of_the_peer_alone_are_openssls_business")
    transport, protocol, peer = await with_keys_to_update(loop, proof, role)
    for _ in range(times):
        peer.update_key(and_yours)
    await peer.send(b"question")
    if times == 1 and not all(ktls.expected(tls.TLS_1_3)):
        assert await protocol.received(8) == b"question"
        transport.write(b"answer")
    assert_explained(await protocol.lost)
    # And the peer is not left waiting, nor with records that it cannot read.
    assert await received_at(peer) == b""


def assert_explained(lost):
    assert isinstance(lost, ssl.SSLError) and "KeyUpdate" in str(lost)


async def received_at(peer, before=b""):
    """What still comes; the connection ends without close_notify."""
    data = bytearray(before)
    try:
        while chunk := await peer.call(peer.sslobj.read, 1 << 16):
            data += chunk
        raise AssertionError("it ended with close_notify")
    except (ssl.SSLEOFError, ConnectionError):
        return bytes(data)
    finally:
        peer.sock.close()


@cannot_rekey
@roles
@requests
async def test_such_keys_end_a_connection_with_data_under_way_in_both_directions(loop, proof, role, and_yours):
    if not ends_by(and_yours):
        pytest.skip("the kernel does not receive")
    transport, protocol, peer = await with_keys_to_update(loop, proof, role)
    data = pattern(16 * MIB)  # more than two sockets hold at their largest
    transport.write(data)
    await helpers.eventually(lambda: "pause" in protocol.log)
    # The new keys are in the middle of what comes in, and arrive while the socket is full of what goes out:
    # an answer has to precede what is still to be written.
    sending = loop.create_task(peer.send(data))
    await helpers.eventually(lambda: protocol.data)
    peer.update_key(and_yours)
    updating = loop.create_task(peer.flush())
    await asyncio.gather(sending, updating, return_exceptions=True)
    received = await received_at(peer)
    assert_explained(await protocol.lost)
    genuine = data.startswith(received), data.startswith(protocol.data)
    assert genuine == (True, True)
    if all(ktls.expected(tls.TLS_1_3)):
        # All that preceded the new keys; the peer sends a MiB at a time.
        assert protocol.data and len(protocol.data) % MIB == 0


@rekeying
@roles
@pytest.mark.parametrize("times", [1, 3])
async def test_data_goes_on_with_new_keys(loop, proof, role, times):
    transport, protocol, peer = await with_keys_to_update(loop, proof, role)
    for turn in range(1, 4):
        for _ in range(times):
            peer.update_key(and_yours=turn % 2 == 1)
            if role == "client":
                peer.send_ticket()
        await peer.send(b"question")
        assert await protocol.received(8 * turn) == b"question" * turn
        transport.write(b"answer")
        assert await peer.receive(6) == b"answer"
    transport.abort()
    await protocol.lost
    peer.sock.close()


@rekeying
@roles
async def test_new_keys_do_not_wait_for_a_peer_that_does_not_read(loop, proof, role):
    transport, protocol, peer = await with_keys_to_update(loop, proof, role)
    data = pattern(8 * MIB)
    transport.write(data)
    await helpers.eventually(lambda: "pause" in protocol.log)
    for turn in range(1, 4):
        peer.update_key(and_yours=True)
        await peer.send(b"question")
        assert await protocol.received(8 * turn) == b"question" * turn
    transport.write(b"answer")
    assert await peer.receive(len(data) + 6) == data + b"answer"
    transport.abort()
    await protocol.lost
    peer.sock.close()


@pytest.mark.skipif(all(ktls.expected(tls.TLS_1_3)), reason="this OpenSSL has the kernel receive")
async def test_new_keys_of_the_peer_alone_are_openssls_business(loop, proof):
    transport, protocol, peer = await with_keys_to_update(loop, proof, "client")
    for turn in range(1, 4):
        peer.update_key(and_yours=False)
        await peer.send(b"question")
        assert await protocol.received(8 * turn) == b"question" * turn
        transport.write(b"answer")
        assert await peer.receive(6) == b"answer"
    transport.abort()
    await protocol.lost
    peer.sock.close()


async def with_keys_to_update(loop, proof, role, factory=Recorder):
    """A transport over kernel TLS 1.3, and a TLSPeer that can change its keys."""
    contexts = {
        "server": tls.authority().context_server(version=tls.TLS_1_3, ktls=role == "server"),
        "client": tls.authority().context_client(version=tls.TLS_1_3, ktls=role == "client"),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    for each in (ours, sock):
        each.setblocking(False)
    if role == "client":
        connecting = loop.create_connection(factory, sock=ours, ssl=contexts[role], server_hostname="localhost")
        peer = TLSPeer(loop, sock, contexts["server"], True)
    else:
        connecting = loop.connect_accepted_socket(factory, ours, ssl=contexts[role])
        peer = TLSPeer(loop, sock, contexts["client"], False, "localhost")
    connecting = loop.create_task(connecting)
    await peer.handshake()
    transport, protocol = await connecting
    proof(transport, tls.TLS_1_3)
    return transport, protocol, peer


@pytest.mark.limit(60 + BULK_BYTES // MIB)
@pytest.mark.matrix(sqpoll=True)
@roles
async def test_bulk_arrives_whole_while_tickets_and_new_keys_do(loop, proof, role):
    """In both directions at once. A server may send tickets at any time, and both may change keys where kernels can."""
    reader = asyncio.StreamReader()
    transport, protocol, peer = await with_keys_to_update(
        loop, proof, role, lambda: asyncio.StreamReaderProtocol(reader)
    )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    done = collections.Counter()

    def interrupt_ours(number):
        sslobj = transport.get_extra_info("ssl_object")
        if role == "server" and number % 2:
            done["our tickets"] += send_ticket(sslobj)
        elif can_rekey():
            done["our keys"] += update_key(sslobj, and_yours=number % 4 == 0)

    def interrupt_theirs(number):
        if role == "client":
            peer.send_ticket()
            done["tickets"] += 1
        if can_rekey():
            peer.update_key(and_yours=number % 2 == 1)
            done["keys"] += 1

    class PeersWriter:
        def write(self, data):
            self.data = data

        async def drain(self):
            await peer.send(self.data)

    class PeersReader:
        async def read(self, size):
            return await peer.call(peer.sslobj.read, size)

    tasks = [
        pumped(writer, 1, interrupt_ours),
        swallowed(PeersReader()),
        pumped(PeersWriter(), 2, interrupt_theirs),
        swallowed(reader),
    ]
    sent, received, sent_back, received_back = await asyncio.gather(*tasks)
    assert sent == received and sent_back == received_back
    ours, theirs = ("our tickets", "our keys"), ("tickets", "keys")
    expected = [ours[0] if role == "server" else theirs[0], *([ours[1], theirs[1]] if can_rekey() else [])]
    assert sorted(+done) == sorted(expected), done
    writer.close()
    assert await peer.receive_to_end() == (b"", "close_notify")
    peer.sock.close()
    await writer.wait_closed()


async def test_a_session_of_tickets_that_the_kernel_decrypted_is_resumed(loop, proof):
    context = tls.authority().context_client(version=tls.TLS_1_3, ktls=True)
    with s_server("-rev", "-tls1_3") as service:
        transport, protocol = await connect(loop, service, context)
        proof(transport, tls.TLS_1_3)
        transport.write(b"hello\n")
        assert await protocol.received(6) == b"olleh\n"
        session = transport.get_extra_info("ssl_object").session
        assert session.has_ticket
        transport.close()
        assert await protocol.lost is None

        def again():
            sock = socket.create_connection(service.address)
            with context.wrap_socket(sock, server_hostname="localhost", session=session) as resumed:
                return resumed.session_reused

        context.options &= ~tls.OP_ENABLE_KTLS
        assert await loop.run_in_executor(None, again)


async def test_renegotiation_ends_the_connection_and_says_so(loop, proof):
    """In TLS 1.2 no kernel changes keys."""
    context = tls.authority().context_client(version=tls.TLS_1_2, ktls=True)
    with s_server(talkative=True) as service:
        transport, protocol = await connect(loop, service, context)
        proof(transport, tls.TLS_1_2)
        transport.write(b"before\n")
        await service.heard("before\n")
        await service.say(b"r\n")
        assert isinstance(await protocol.lost, ssl.SSLError)
