"""What is written for aiofastnet 1.2 runs with another import: its names, parameters, transports and protocols."""

import asyncio
import inspect
import os
import socket
import sys

import helpers
import pytest
import tls
from helpers import pattern
from wire import wire  # noqa: F401

import aiouringnet

pytestmark = pytest.mark.matrix(debug=False)

NAMES = """
OPENSSL_DYN_LIBS Protocol Transport aiofn_is_buffered_protocol connect_accepted_socket connect_read_pipe
connect_write_pipe create_connection create_datagram_endpoint create_server create_unix_connection create_unix_server
install_policy loop_factory open_connection open_unix_connection patch_loop sendfile sock_accept sock_connect sock_recv
sock_recv_into sock_recvfrom sock_recvfrom_into sock_sendall sock_sendto start_server start_tls start_unix_server
""".split()
# No loop of Python 3.10 has these, so that aiofastnet's functions have nothing there that they could call.
NEW_IN_3_11 = {"sock_recvfrom", "sock_recvfrom_into", "sock_sendto"} if sys.version_info < (3, 11) else set()


def test_the_names_are_there():
    missing = {name for name in NAMES if not hasattr(aiouringnet, name)}
    assert missing == NEW_IN_3_11
    assert set(NAMES) - NEW_IN_3_11 <= set(aiouringnet.__all__)


def test_the_functions_take_what_aiofastnets_do():
    aiofastnet = pytest.importorskip("aiofastnet", reason="the package aiofastnet is not installed")
    names = set(aiofastnet.__all__) - NEW_IN_3_11
    assert names <= set(aiouringnet.__all__)
    for name in names:
        theirs, ours = getattr(aiofastnet, name), getattr(aiouringnet, name)
        if not inspect.isfunction(theirs):
            continue
        parameters = inspect.signature(ours).parameters
        varying = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for parameter in inspect.signature(theirs).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD or (varying and parameter.name not in parameters):
                continue
            same = {"py_sock": "sock"}.get(parameter.name, parameter.name)
            assert same in parameters, (name, parameter.name)
            # Where there is one: its cleanup_socket is asyncio's on each Python.
            if parameter.default is not parameter.empty and same != "cleanup_socket":
                assert parameters[same].default == parameter.default, (name, parameter.name)


async def test_transports_are_transports_by_that_name(loop, endpoint):
    kinds = []

    def keep(transport):
        kinds.append(isinstance(transport, aiouringnet.Transport))
        transport.abort()

    async with asyncio.timeout(10) if hasattr(asyncio, "timeout") else _Nothing():
        server = await endpoint.serve(loop, asyncio.Protocol)
        keep((await endpoint.connect(loop, asyncio.Protocol))[0])
        server.close()
        keep((await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0)))[0])
        read_end, write_end = os.pipe()
        reader, _ = await loop.connect_read_pipe(asyncio.Protocol, os.fdopen(read_end, "rb", 0))
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(write_end, "wb", 0))
        kinds += [isinstance(reader, aiouringnet.Transport), isinstance(writer, aiouringnet.Transport)]
        writer.abort()
        reader.close()
        await asyncio.sleep(0.01)
    assert kinds == [True] * 4
    assert not isinstance(object(), aiouringnet.Transport)


class _Nothing:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass


class Plain(aiouringnet.Protocol):
    """As aiofastnet's users derive it: without asyncio's classes."""

    says = None

    def __init__(self):
        self.received = bytearray()
        self.buffer = bytearray(100)
        self.calls = set()
        self.flow = []
        self.held = 0

    def is_buffered_protocol(self):
        return self.says

    def data_received(self, data):
        self.calls.add("data_received")
        self.received += data

    def get_buffer(self, sizehint):
        return self.buffer

    def buffer_updated(self, nbytes):
        self.calls.add("buffer_updated")
        self.received += self.buffer[:nbytes]

    def pause_writing(self):
        self.flow.append("pause")

    def resume_writing(self):
        self.flow.append("resume")


class Buffered(Plain):
    says = True


class Holding(Plain):
    def get_local_write_buffer_size(self):
        return self.held


class Mixed(aiouringnet.Protocol, asyncio.BufferedProtocol):
    pass


def test_what_is_a_buffered_protocol():
    ask = aiouringnet.aiofn_is_buffered_protocol
    assert not ask(Plain()) and ask(Buffered()) and ask(Mixed())
    assert ask(asyncio.BufferedProtocol()) and not ask(asyncio.Protocol()) and not ask(object())


@pytest.mark.parametrize("kind", [Plain, Buffered])
async def test_a_protocol_of_that_base_is_called_as_it_says(wire, kind):
    w = await wire(kind)
    await w.send(pattern(1000))
    await helpers.eventually(lambda: len(w.protocol.received) == 1000)
    assert w.protocol.received == pattern(1000)
    assert w.protocol.calls == {"buffer_updated" if kind is Buffered else "data_received"}


async def test_nocheck_methods_write(wire):
    w = await wire(Plain)
    w.transport.write_nocheck(b"one ")
    w.transport.writelines_nocheck([b"two ", bytearray(b"three")])
    assert await w.receive(13) == b"one two three"


async def test_sendto_nocheck_sends(loop):
    got = loop.create_future()

    class Receiver(asyncio.DatagramProtocol):
        def datagram_received(self, data, addr):
            got.set_result(data)

    receiver, _ = await loop.create_datagram_endpoint(Receiver, ("127.0.0.1", 0))
    sender, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0))
    sender.sendto_nocheck(b"datagram", receiver.get_extra_info("sockname"))
    assert await helpers.within(got) == b"datagram"
    sender.abort()
    receiver.abort()


# --------------------------------------------------------------------------
# What a protocol holds back


async def test_what_a_protocol_holds_back_counts(wire):
    w = await wire(Holding)
    w.protocol.held = 50_000
    assert w.transport.get_write_buffer_size() == 50_000
    size = 10_000
    while w.transport.get_write_buffer_size() == 50_000:
        w.transport.write(bytes(size))
    # The socket is full, and 64 KiB are the limit: not with these alone.
    w.transport.write(bytes(20_000))
    assert w.protocol.flow == ["pause"]


async def test_a_protocol_that_holds_nothing_back_is_paused_at_the_limit_alone(wire):
    w = await wire(Holding)
    while not w.transport.get_write_buffer_size():
        w.transport.write(bytes(10_000))
    w.transport.write(bytes(20_000))
    assert w.protocol.flow == []


async def test_it_is_resumed_when_all_has_left_whatever_it_holds(wire):
    w = await wire(Holding)
    w.protocol.held = 10**6
    total = 0
    while w.protocol.flow != ["pause"]:
        w.transport.write(bytes(10_000))
        total += 10_000
    await w.receive(total)
    await helpers.eventually(lambda: w.protocol.flow == ["pause", "resume"])
    assert w.transport.get_write_buffer_size() == 10**6


async def test_an_error_of_it_ends_the_connection(wire):
    lost = []
    seen = []

    class Failing(Holding):
        def get_local_write_buffer_size(self):
            raise ZeroDivisionError

        def connection_lost(self, exc):
            lost.append(exc)

    w = await wire(Failing)
    w.loop.set_exception_handler(lambda loop, context: seen.append(context["message"]))
    while not w.transport.is_closing():
        w.transport.write(bytes(100_000))
    await helpers.eventually(lambda: lost)
    assert isinstance(lost[0], ZeroDivisionError)
    assert seen == ["Fatal error: protocol.get_local_write_buffer_size() call failed."]


async def test_over_tls_it_counts_as_well(loop):
    with helpers.Endpoint("tcp", secure=True) as endpoint:
        server = await endpoint.serve(loop, Plain)
        transport, protocol = await endpoint.connect(loop, Holding)
        protocol.held = 400_000
        assert transport.get_write_buffer_size() == 400_000
        await helpers.eventually(lambda: endpoint.accepted)
        size = transport.get_write_buffer_limits()[1]
        assert size > protocol.held
        written = 0
        while not protocol.flow:
            transport.write(bytes(16384))
            written += 16384
        assert transport.get_write_buffer_size() - protocol.held <= size
        await helpers.eventually(lambda: protocol.flow == ["pause", "resume"])
        await helpers.eventually(lambda: len(endpoint.accepted[0].received) == written)
        transport.abort()
        server.close()
        await asyncio.sleep(0.05)


# --------------------------------------------------------------------------
# A transport's own sendfile()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(pattern(1_000_000))
    with open(tmp_path / "file", "rb") as file:
        yield file


async def test_a_small_file_is_sent_at_once(wire, file):
    w = await wire(Plain)
    assert w.transport.sendfile(file, 1000, 5000) is None
    assert await w.receive(5000) == pattern(1_000_000)[1000:6000]
    w.transport.write(b"more")
    assert await w.receive(4) == b"more"


async def test_a_file_follows_what_was_written(wire, file):
    w = await wire(Plain)
    w.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    before = 0
    while not w.transport.get_write_buffer_size():
        w.transport.write(bytes(50_000))
        before += 50_000
    sent = w.transport.sendfile(file, 0, None)
    assert isinstance(sent, asyncio.Future)
    with pytest.raises(RuntimeError, match="sendfile is in progress"):
        w.transport.write(b"too early")
    assert await w.receive(before) == bytes(before)
    assert await w.receive(1_000_000) == pattern(1_000_000)
    assert await sent is None
    w.transport.write(b"after")
    assert await w.receive(5) == b"after"
    await w.send(b"reading goes on")
    await helpers.eventually(lambda: w.protocol.received == b"reading goes on")


async def test_a_file_that_is_cancelled_before_it_began_holds_nothing_up(wire, file):
    w = await wire(Plain)
    w.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    before = 0
    while not w.transport.get_write_buffer_size():
        w.transport.write(bytes(50_000))
        before += 50_000
    sent = w.transport.sendfile(file, 0, None)
    sent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sent
    w.transport.write(b"after")
    assert await w.receive(before + 5) == bytes(before) + b"after"


async def test_bad_files_are_refused(wire, file, tmp_path):
    w = await wire(Plain)
    with pytest.raises(ValueError, match="offset must be"):
        w.transport.sendfile(file, -1, None)
    with pytest.raises(ValueError, match="count must be"):
        w.transport.sendfile(file, 0, 0)
    with pytest.raises(asyncio.SendfileNotAvailableError):
        w.transport.sendfile(object(), 0, None)
    w.transport._sendfile_compatible = False  # as aiohttp's tests say that it must not be used
    with pytest.raises(NotImplementedError):
        w.transport.sendfile(file, 0, None)
    del w.transport._sendfile_compatible
    w.transport.close()
    with pytest.raises(RuntimeError, match="closing"):
        w.transport.sendfile(file, 0, None)


# --------------------------------------------------------------------------
# TLS, loops


async def test_what_tls_transports_say_of_themselves(loop, file):
    with helpers.Endpoint("tcp", secure=True) as endpoint:
        server = await endpoint.serve(loop, asyncio.Protocol)
        transport, _ = await endpoint.connect(loop, asyncio.Protocol)
        assert isinstance(transport, aiouringnet.Transport)
        assert transport.get_extra_info("ssl_protocol") is transport
        assert transport.get_extra_info("ssl_layer_num") == 0
        assert transport.get_extra_info("ssl_incoming_use_membio") is True
        assert transport.get_extra_info("ssl_outgoing_use_membio") is True
        with pytest.raises(NotImplementedError):
            transport.sendfile(file, 0, None)
        transport.abort()
        server.close()
        await asyncio.sleep(0.05)


@pytest.mark.matrix(base=("asyncio",), engine=("epoll",), debug=False)
@tls.needs_openssl
async def test_the_libraries_of_openssl_are_named(loop):
    libraries = aiouringnet.OPENSSL_DYN_LIBS
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert os.path.realpath(libraries.libssl) in mapped and "libssl" in libraries.libssl
    assert os.path.realpath(libraries.libcrypto) in mapped
    assert libraries.libcrypto_path == os.fsencode(libraries.libcrypto)


def test_a_loop_that_the_factory_makes_is_the_current_one():
    code = """
import asyncio, aiouringnet
loop = aiouringnet.loop_factory()()
assert asyncio.get_event_loop_policy().get_event_loop() is loop
loop.close()
"""
    ended = helpers.run_python(code)
    assert ended.returncode == 0, ended.stderr


PICOWS = """
import asyncio, sys
import aiouringnet
sys.modules["aiofastnet"] = aiouringnet
from picows import WSListener, WSMsgType, ws_connect, ws_create_server

class Echo(WSListener):
    def on_ws_frame(self, transport, frame):
        transport.send(frame.msg_type, frame.get_payload_as_bytes())

class Client(WSListener):
    def on_ws_connected(self, transport):
        assert isinstance(transport.underlying_transport, aiouringnet.Transport)
        self.received = []
        transport.send(WSMsgType.TEXT, b"short")
        transport.send(WSMsgType.BINARY, bytes(1_000_000))

    def on_ws_frame(self, transport, frame):
        self.received.append(len(frame.get_payload_as_bytes()))
        if len(self.received) == 2:
            transport.disconnect()

async def main():
    server = await ws_create_server(lambda request: Echo(), "127.0.0.1", 0, use_aiofastnet=True)
    address = "ws://127.0.0.1:%d/" % server.sockets[0].getsockname()[1]
    transport, client = await ws_connect(Client, address, use_aiofastnet=True)
    await transport.wait_disconnected()
    print(client.received)
    server.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("engine", ["auto", "epoll"])
def test_a_library_that_is_written_for_it_does_not_notice(engine):
    pytest.importorskip("picows", reason="picows is not installed")
    ended = helpers.run_python(PICOWS, AIOURINGNET_ENGINE=engine)
    assert ended.stdout == "[5, 1000000]\n", ended.stderr
