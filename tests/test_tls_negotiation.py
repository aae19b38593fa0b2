"""What TLS offers besides data: names, certificates, protocols, sessions and new keys."""

import asyncio
import ssl

import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import barrier, echoing, meet, place, role, secure  # noqa: F401

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]


@tls.versions
async def test_extra_info_tells_about_the_connection(loop, secure, role, version, tls_engine, case):
    client, server = (
        tls.authority().context_client(version=version),
        tls.authority().context_server(version=version),
    )
    w = await secure(role=role, client=client, server=server)
    info = w.transport.get_extra_info
    assert isinstance(info("ssl_object"), ssl.SSLObject)
    assert info("ssl_object").version() == {tls.TLS_1_2: "TLSv1.2", tls.TLS_1_3: "TLSv1.3"}[version]
    assert info("sslcontext") is (client if role == "client" else server)
    assert info("cipher") == info("ssl_object").cipher() and info("cipher")[0] == w.tls.sslobj.cipher()[0]
    assert info("compression") is None
    if role == "client":
        assert dict(name[0] for name in info("peercert")["subject"]) == {"commonName": "localhost"}
    else:
        assert not info("peercert")
    assert info("tls_engine") == tls_engine
    assert info("uring")["kind"] == case.engine
    assert info("socket").getsockname() == info("sockname") == w.peer.getpeername()
    assert info("peername") == w.peer.getsockname()
    assert info("nothing of the kind") is None and info("nothing of the kind", "default") == "default"
    w.transport.abort()
    await w.protocol.lost
    assert info("cipher") is not None and info("peername") == w.peer.getsockname()


async def test_it_is_an_asyncio_transport(loop, secure):
    w = await secure()
    assert isinstance(w.transport, asyncio.Transport)
    assert "SSLStreamTransport" in repr(w.transport)
    assert "SSL" in type(w.transport).__name__ and "SSL" in w.transport.__class__.__name__  # libraries ask for it
    assert w.transport.can_write_eof() is False
    with pytest.raises(NotImplementedError):
        w.transport.write_eof()
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


async def test_attributes_of_ones_own_and_replaced_methods_stay_with_the_transport(loop, secure):
    w = await secure()
    written = []
    w.transport.note = "mine"
    write = w.transport.write
    w.transport.write = lambda data: written.append(data) or write(data)
    w.transport.write(b"data")
    assert await w.receive(4) == written[0] == b"data"
    assert w.transport.note == "mine" and vars(w.transport)["note"] == "mine"
    del w.transport.write
    assert w.transport.write == write


@tls.versions
async def test_alpn_is_negotiated(loop, secure, role, version):
    client = tls.authority().context_client(version=version, alpn=["h2", "http/1.1"])
    server = tls.authority().context_server(version=version, alpn=["http/1.1"])
    w = await secure(role=role, client=client, server=server)
    assert w.sslobj.selected_alpn_protocol() == w.tls.sslobj.selected_alpn_protocol() == "http/1.1"


async def test_the_server_chooses_a_certificate_by_the_name_asked_for(loop, secure, role):
    asked = []
    other = tls.authority().context_server("other.test")
    server = tls.authority().context_server()

    def choose(sslobj, name, context):
        asked.append((type(sslobj), name, context))
        sslobj.context = other

    server.sni_callback = choose
    w = await secure(role=role, server=server, server_hostname="other.test")
    assert asked == [(ssl.SSLObject, "other.test", server)]
    client = w.sslobj if role == "client" else w.tls.sslobj
    assert client.server_hostname == "other.test"
    assert ("DNS", "other.test") in client.getpeercert()["subjectAltName"]
    await w.send(b"both")
    assert await w.protocol.received(4) == b"both"
    w.transport.write(b"ways")
    assert await w.receive(4) == b"ways"


@tls.versions
async def test_the_client_identifies_itself(loop, secure, role, version):
    client = tls.authority().context_client(pair=tls.authority().client_pair(), version=version)
    server = tls.authority().context_server(verify_client=True, version=version)
    w = await secure(role=role, client=client, server=server)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    seen = w.transport.get_extra_info("peercert") if role == "server" else w.tls.sslobj.getpeercert()
    assert dict(name[0] for name in seen["subject"]) == {"commonName": "client"}


@tls.versions
async def test_a_session_is_resumed(loop, secure, version):
    client, server = (
        tls.authority().context_client(version=version),
        tls.authority().context_server(version=version),
    )
    first = await secure(role="server", client=client, server=server)
    first.transport.write(b"with the ticket")
    assert await first.receive(15) == b"with the ticket"
    session = first.tls.sslobj.session
    second = await secure(role="server", client=client, server=server, session=session)
    assert second.tls.sslobj.session_reused and second.sslobj.session_reused
    await second.send(b"data")
    assert await second.protocol.received(4) == b"data"


@tls.versions
async def test_the_client_gets_its_session(loop, secure, version):
    w = await secure(version=version)
    await w.send(b"data")
    await w.protocol.received(4)
    assert w.sslobj.session is not None and w.sslobj.session.has_ticket
    assert not w.sslobj.session_reused


@pytest.mark.parametrize("role", ["client", "server"])
async def test_a_client_identifies_itself_after_the_handshake(loop, secure, role):
    client = tls.authority().context_client(pair=tls.authority().client_pair(), version=tls.TLS_1_3)
    server = tls.authority().context_server(verify_client=True, version=tls.TLS_1_3)
    client.post_handshake_auth = server.post_handshake_auth = True
    w = await secure(role=role, client=client, server=server)
    servers = w.sslobj if role == "server" else w.tls.sslobj
    assert not servers.getpeercert()
    servers.verify_client_post_handshake()
    # The request goes with the server's next write, the answer with the client's next.
    if role == "server":
        w.transport.write(b"who is it")
        assert await w.receive(9) == b"who is it"
        await w.send(b"it is I")
        assert await w.protocol.received(7) == b"it is I"
    else:
        await w.send(b"who is it")
        assert await w.protocol.received(9) == b"who is it"
        w.transport.write(b"it is I")
        assert await w.receive(7) == b"it is I"
    assert dict(name[0] for name in servers.getpeercert()["subject"]) == {"commonName": "client"}


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_keys_are_updated_while_data_flows_in_both_directions(loop, secure, role, base):
    w = await secure(base, role, version=tls.TLS_1_3, ktls=False)
    data = pattern(20 * 50_000)

    async def send():
        for start in range(0, len(data), 50_000):
            w.tls.update_key(and_yours=start % 100_000 == 0)
            await w.send(data[start : start + 50_000])

    w.transport.write(data)
    sending = loop.create_task(send())
    assert await w.receive(len(data)) == data
    await sending
    assert await w.protocol.received(len(data)) == data
    w.transport.write(b"and on")
    assert await w.receive(6) == b"and on"


async def test_keys_are_updated_on_an_idle_connection(loop, secure, role, barrier):
    w = await secure(role=role, version=tls.TLS_1_3, ktls=False)
    await w.forget_records()
    for number in range(5):
        w.tls.update_key()
        await w.tls.flush()
        await barrier(1)
        w.transport.write(b"%d" % number)
        assert await w.receive(1) == b"%d" % number
    # An answer to each, and the data.
    assert len(w.tls.headers.seen) == 10


async def test_a_context_with_tls_objects_of_its_own_is_used_as_it_is(loop, place):
    """Tracing libraries wrap them; what is in there is not for OpenSSL's functions to know."""

    class Traced:
        _sslobj = None

        def __init__(self, sslobj):
            self.wrapped, self.calls = sslobj, []

        def __getattr__(self, name):
            self.calls.append(name)
            return getattr(self.wrapped, name)

    class Context(ssl.SSLContext):
        def wrap_bio(self, *args, **kwargs):
            return Traced(super().wrap_bio(*args, **kwargs))

    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.authority().cafile)
    server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
    transport, protocol = await place.connect(loop, Recorder, ssl=context, server_hostname="localhost")
    transport.write(pattern(100_000))
    assert await protocol.received(100_000) == pattern(100_000)
    assert transport.get_extra_info("tls_engine") == "ssl"
    assert {"do_handshake", "read", "write"} <= set(transport.get_extra_info("ssl_object").calls)
    transport.close()
    await protocol.lost
    await place.accepted[0].lost
    server.close()
