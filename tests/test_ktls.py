"""Kernel TLS: the kernel encrypts and decrypts, and a connection behaves as if it did not.

Wherever the peer is the standard library's TLS in user space, each byte that
arrives there, and each that arrives here, went through the kernel's cipher:
`proof` reads /proc/net/tls_stat after every test.
"""

import asyncio
import contextlib
import functools
import hashlib
import os
import socket
import ssl
import sys
import threading

import helpers
import ktls
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from ktls import BULK_BYTES, Pump, proof, pumped, roles, swallowed  # noqa: F401
from openssl_command import EchoOf, connect, s_client, s_server, serving
from random_protocols.peers import is_eof
from tls_wire import RECORD_BYTES, TLSPeer
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

kinds = pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])


class Met:
    """A transport of ours over kernel TLS, and the standard library's blocking TLS socket at the other end."""

    def __init__(self, loop, transport, protocol, peer, ours):
        self.loop, self.transport, self.protocol, self.peer = loop, transport, protocol, peer
        self.ours = ours  # the socket that was handed in

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
    except ssl.SSLError as exc:
        if not is_eof(exc):
            raise
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
        peer.settimeout(10 * helpers.patience)
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
        made.append(Met(loop, transport, protocol, peer, ours))
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


@tls.versions
@roles
@kinds
async def test_messages_of_any_size_come_back(meet, role, version, kind):
    met = await meet(recorder(kind, **{"data_received" if kind is Recorder else "buffer_updated": echo}), role, version)
    for size in (1, 2, 100, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 100_000, 3):
        await met.send(pattern(size, seed=size))
        assert await met.receive(size) == pattern(size, seed=size)


def echo(protocol, what):
    protocol.transport.write(what if isinstance(what, bytes) else bytes(protocol.buffer[:what]))


@tls.versions
async def test_what_one_callback_writes_is_one_record(loop, meet, version):
    aiouringnet.patch_loop(loop, gather="always")  # a task writes here
    met = await meet(version=version)
    for _ in range(3):
        met.transport.write(b"head")
        met.transport.writelines([b"and", b"body"])
        # SSL_read returns what one record holds.
        assert await met.call(met.peer.recv, 1000) == b"headandbody"


@pytest.mark.limit(60 + BULK_BYTES // MIB)
@pytest.mark.matrix(sqpoll=True)
@tls.versions
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
@tls.versions
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
@tls.versions
async def test_worker_threads_encrypt_bulk_in_order(workers, loop, proof, version):
    await bulk_both_ways(loop, proof, version)
    stats = aiouringnet.stats()
    assert 0 < stats["worker_sends"] <= stats["ring_sends"]


@by_workers
@tls.versions
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
@tls.versions
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


@by_workers
@tls.versions
def test_a_loop_that_moves_while_a_worker_thread_sends_sends_nothing_twice(workers, loop, meet, version):
    """Only the thread that is left could learn what has gone: the connection ends with an error."""
    data = pattern(4 * MIB)
    moved = []

    async def begin():
        met = await meet(version=version, buffers_bytes=65536)
        met.transport.write(data)
        assert aiouringnet.stats()["worker_sends"] == 1
        return met

    async def go_on(met):
        received = bytearray()
        with contextlib.suppress(ssl.SSLError, ConnectionResetError):
            while len(received) < len(data) and (piece := await met.call(met.peer.recv, 65536)):
                received += piece
        assert data.startswith(received)
        if len(received) < len(data):
            assert isinstance(await met.protocol.lost, ConnectionAbortedError)
        else:
            # A kernel whose worker threads tell everybody of what they have sent: Linux 6.1.
            met.transport.close()
            assert await met.receive_to_end() == (b"", "close_notify")

    def move(met):
        try:
            moved.append(loop.run_until_complete(go_on(met)))
        except BaseException as exc:
            moved.append(exc)

    met = loop.run_until_complete(begin())
    thread = threading.Thread(target=move, args=(met,))
    thread.start()
    thread.join()
    assert moved == [None]


# --------------------------------------------------------------------------
# Flow


@tls.versions
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


@tls.versions
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


@tls.versions
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


@tls.versions
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


@tls.versions
@roles
@kinds
async def test_the_peer_says_goodbye_and_hears_ours(meet, role, version, kind):
    met = await meet(kind, role, version)
    await met.send(b"last words")
    await met.call(met.peer.unwrap)  # an exception, if ours does not come
    assert await met.protocol.lost is None
    assert met.protocol.data == b"last words"
    assert met.protocol.log == ["made", "data", "eof", "lost"]


@tls.versions
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


@tls.versions
async def test_what_arrives_after_our_goodbye_is_dropped(meet, version):
    met = await meet(version=version)
    met.transport.close()
    await met.send(pattern(200_000))
    assert await met.receive_to_end() == (b"", "close_notify")
    await met.call(met.peer.unwrap)
    assert await met.protocol.lost is None
    assert met.protocol.log == ["made", "lost"] or met.protocol.log == ["made", "eof", "lost"]


@tls.versions
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


@tls.versions
async def test_a_record_that_is_cut_off_is_not_delivered(meet, version):
    met = await meet(version=version)
    await met.send(b"last words")
    raw = socket.socket(fileno=met.peer.detach())
    raw.sendall(b"\x17\x03\x03\x01\x00" + bytes(100))
    raw.close()
    assert await met.protocol.lost is None
    assert met.protocol.data == b"last words"


@tls.versions
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


@tls.versions
@roles
async def test_abort_ends_a_connection_with_output_under_way(meet, role, version):
    met = await meet(role=role, version=version, buffers_bytes=65536)
    met.transport.write(bytes(2 * MIB))
    await helpers.eventually(lambda: "pause" in met.protocol.log)
    met.transport.abort()
    assert await met.protocol.lost is None
    data, how = await met.receive_to_end()
    assert len(data) < 2 * MIB and how in ("eof", "reset")


@tls.versions
async def test_a_reset_is_reported(meet, version):
    met = await meet(version=version)
    await met.send(b"last words")
    await met.protocol.received(10)
    helpers.reset(socket.socket(fileno=met.peer.detach()))
    assert isinstance(await met.protocol.lost, (ConnectionResetError, BrokenPipeError))


@tls.versions
async def test_a_goodbye_that_nobody_can_hear_is_tried_once(loop, meet, version, monkeypatch):
    """The peer has closed with something unread, so that ours is refused."""
    met = await meet(version=version)
    later = []
    monkeypatch.setattr(loop, "call_later", lambda *args: later.append(args) or type(loop).call_later(loop, *args))
    met.transport.pause_reading()
    met.peer.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        met.peer.unwrap()
    met.transport.write(b"unread")
    await asyncio.sleep(0.05)
    met.peer.close()
    await asyncio.sleep(0.05)
    later.clear()
    met.transport.resume_reading()
    lost = await helpers.within(met.protocol.lost)
    assert lost is None or isinstance(lost, (ConnectionResetError, BrokenPipeError))
    assert not [callback for _, callback, *_ in later if callback.__name__ == "_drained"]


@tls.versions
async def test_the_goodbye_of_a_socket_that_its_owner_has_closed_goes_to_nobody(meet, version):
    met = await meet(version=version)
    number = met.ours.fileno()
    met.ours.close()
    stranger, beyond = socket.socketpair()
    with stranger, beyond:
        if number not in (stranger.fileno(), beyond.fileno()):
            os.dup2(stranger.fileno(), number)
        met.transport.close()
        await helpers.within(met.protocol.lost)
        for sock in (stranger, beyond):
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(100)
        if number not in (stranger.fileno(), beyond.fileno()):
            os.close(number)


# --------------------------------------------------------------------------
# Upgrades


@tls.versions
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
@tls.versions
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
