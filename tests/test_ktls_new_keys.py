"""New keys and tickets in the middle of a connection that the kernel encrypts: it follows, or ends and says why."""

import asyncio
import collections
import platform
import socket
import ssl

import helpers
import ktls
import pytest
import tls
from helpers import Recorder, pattern
from ktls import BULK_BYTES, proof, pumped, roles, swallowed  # noqa: F401
from openssl_command import connect, s_server
from tls_wire import TLSPeer, send_ticket, update_key

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.every_kernel,
    tls.needs_openssl,
    pytest.mark.usefixtures("kernel_tls"),
    pytest.mark.matrix(base="asyncio", debug=False),
]

MIB = 1 << 20


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
