"""Libraries that speak over datagrams: aioquic's HTTP/3 with a file, dnspython's asyncio backend."""

import asyncio
import os

import helpers
import pytest
import tls
from datagrams import Datagrams, close

pytestmark = pytest.mark.matrix(sqpoll=True)

SIZE = 1 << 20


# --------------------------------------------------------------------------
# HTTP/3


def http3(content):
    """A server's protocol that answers each request with `content`, and a client's with get()."""
    pytest.importorskip("aioquic", reason="aioquic is not installed")
    from aioquic.asyncio import QuicConnectionProtocol
    from aioquic.h3.connection import H3Connection
    from aioquic.h3.events import DataReceived, HeadersReceived
    from aioquic.quic.events import ProtocolNegotiated

    class HTTP3(QuicConnectionProtocol):
        http = None

        def quic_event_received(self, event):
            if self.http is None and isinstance(event, ProtocolNegotiated):
                self.http = H3Connection(self._quic)
            if self.http is not None:
                for http_event in self.http.handle_event(event):
                    self.on_http(http_event)

    class Server(HTTP3):
        def on_http(self, event):
            if isinstance(event, HeadersReceived):
                self.http.send_headers(event.stream_id, [(b":status", b"200")])
                self.http.send_data(event.stream_id, content, end_stream=True)
                self.transmit()

    class Client(HTTP3):
        def on_http(self, event):
            if isinstance(event, DataReceived):
                self.body += event.data
            if event.stream_ended:
                self.done.set_result(bytes(self.body))

        async def get(self):
            self.body, self.done = bytearray(), asyncio.get_running_loop().create_future()
            if self.http is None:
                self.http = H3Connection(self._quic)
            request = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")]
            self.http.send_headers(self._quic.get_next_available_stream_id(), request, end_stream=True)
            self.transmit()
            return await self.done

    return Server, Client


@pytest.mark.limit(60)
async def test_a_file_over_http3(loop):
    content = os.urandom(SIZE)
    server_protocol, client_protocol = http3(content)
    from aioquic.asyncio import connect, serve
    from aioquic.quic.configuration import QuicConfiguration

    certificate, key = tls.authority().pair()
    settings = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
    settings.load_cert_chain(certificate, key)
    server = await serve("127.0.0.1", 0, configuration=settings, create_protocol=server_protocol)
    address = server._transport.get_extra_info("sockname")
    trusting = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost")
    trusting.load_verify_locations(tls.authority().cafile)
    async with connect(*address, configuration=trusting, create_protocol=client_protocol) as client:
        assert "DatagramTransport fd=" in repr(client._transport)
        for _ in range(2):
            assert await client.get() == content
    server.close()
    await asyncio.sleep(0.01)


# --------------------------------------------------------------------------
# DNS


async def test_dnspython_asks_a_server(loop):
    dns = pytest.importorskip("dns", reason="dnspython is not installed")
    import dns.asyncquery
    import dns.asyncresolver
    import dns.message
    import dns.rcode
    import dns.rrset

    class Server(Datagrams):
        silent = 1  # so many queries get no answer

        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            query = dns.message.from_wire(data)
            if len(self.received) <= self.silent:
                return
            answer = dns.message.make_response(query)
            name = query.question[0].name
            if str(name) == "here.test.":
                answer.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.1", "192.0.2.2"))
            else:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            self.transport.sendto(answer.to_wire(), addr)

    transport, _ = await loop.create_datagram_endpoint(Server, ("127.0.0.1", 0))
    host, port = transport.get_extra_info("sockname")
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port, resolver.timeout = [host], port, 0.2
    found = await resolver.resolve("here.test.", "A")
    assert sorted(record.address for record in found) == ["192.0.2.1", "192.0.2.2"]
    with pytest.raises(dns.asyncresolver.NXDOMAIN):
        await resolver.resolve("elsewhere.test.", "A")
    # Many at once
    query = dns.message.make_query("here.test.", "A")
    answers = await asyncio.gather(*(dns.asyncquery.udp(query, host, timeout=5, port=port) for _ in range(100)))
    assert all(len(answer.answer[0]) == 2 for answer in answers)
    await close(transport)
    await helpers.eventually(transport.is_closing)
