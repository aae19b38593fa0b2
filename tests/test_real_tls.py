"""What the ssl module offers beyond encryption, between our transports and the standard library's own sockets."""

import socket
import ssl

import helpers
import pytest
import tls
from wire import over

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.matrix(debug=False),
    pytest.mark.usefixtures("tls_engine"),
    pytest.mark.pairs(tls_engine="ssl"),
    tls.needs_openssl,
]


SECRETS = {
    tls.TLS_1_2: {"CLIENT_RANDOM"},
    tls.TLS_1_3: {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
        "EXPORTER_SECRET",
    },
}


class Connected:
    """Two transports of ours over one TLS connection, which has carried data both ways."""

    def __init__(self, loop, endpoint, server_context, client_context, hostname="localhost"):
        self.loop, self.endpoint, self.hostname = loop, endpoint, hostname
        self.server_context, self.client_context = server_context, client_context

    async def __aenter__(self):
        self.listener = await self.endpoint.serve(self.loop, helpers.Echo, ssl=self.server_context)
        self.client, self.protocol = await self.endpoint.connect(
            self.loop, helpers.Recorder, ssl=self.client_context, server_hostname=self.hostname
        )
        self.client.write(b"hello")
        assert await self.protocol.received(5) == b"hello"
        self.server = self.endpoint.accepted[0].transport
        self.objects = [transport.get_extra_info("ssl_object") for transport in (self.client, self.server)]
        return self

    async def __aexit__(self, *exc_info):
        self.client.close()
        await self.protocol.lost
        await self.endpoint.accepted[0].lost
        self.listener.close()
        await self.listener.wait_closed()
        # They keep the context, which keeps its keylog file open.
        self.endpoint.accepted.clear()


def common_names(certificate):
    return [value for part in certificate["subject"] for name, value in part if name == "commonName"]


# --------------------------------------------------------------------------
# Certificates


@pytest.mark.parametrize("hostname", ["localhost", "other.test"])
async def test_sni_callback_chooses_the_certificate(loop, endpoint, hostname):
    asked = []

    def choose(ssl_object, name, context):
        asked.append((ssl_object, name, context))
        if name == "other.test":
            ssl_object.context = other

    first, other = tls.authority().context_server(), tls.authority().context_server("other.test")
    first.sni_callback = choose
    async with Connected(loop, endpoint, first, tls.authority().context_client(), hostname) as both:
        assert common_names(both.client.get_extra_info("peercert")) == [hostname]
        assert asked == [(both.objects[1], hostname, first)]


async def test_sni_callback_refuses_a_name(loop, endpoint):
    context = tls.authority().context_server()
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    server = await endpoint.serve(loop, helpers.Recorder, ssl=context)
    with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
        await endpoint.connect(
            loop, helpers.Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
        )
    server.close()
    await server.wait_closed()
    assert endpoint.accepted[0].log == []


@tls.versions
async def test_each_side_sees_the_others_certificate(loop, endpoint, version):
    server_context = tls.authority().context_server(version=version, verify_client=True)
    client_context = tls.authority().context_client(pair=tls.authority().client_pair("somebody"))
    async with Connected(loop, endpoint, server_context, client_context) as both:
        assert common_names(both.client.get_extra_info("peercert")) == ["localhost"]
        assert common_names(both.server.get_extra_info("peercert")) == ["somebody"]
        for ssl_object, path in zip(
            both.objects, (tls.authority().pair()[0], tls.authority().client_pair("somebody")[0]), strict=True
        ):
            with open(path) as file:
                assert ssl_object.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(file.read())


# --------------------------------------------------------------------------
# Keys and sessions


def secrets(path):
    return {line for line in path.read_text().splitlines() if not line.startswith("#")}


@tls.versions
async def test_keylog_files_of_both_sides_hold_the_same_secrets(loop, endpoint, version, tmp_path):
    server_context, client_context = tls.authority().context_server(version=version), tls.authority().context_client()
    server_context.keylog_filename = str(tmp_path / "server")
    client_context.keylog_filename = str(tmp_path / "client")
    async with Connected(loop, endpoint, server_context, client_context):
        pass
    logged = secrets(tmp_path / "server")
    assert SECRETS[version] <= {line.split()[0] for line in logged}
    assert logged == secrets(tmp_path / "client")


async def test_sslkeylogfile_names_the_keylog_file(loop, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    client_context = tls.authority().context_client()
    async with Connected(loop, endpoint, tls.authority().context_server(), client_context):
        pass
    assert SECRETS[tls.TLS_1_3] <= {line.split()[0] for line in secrets(tmp_path / "keys")}


@over("tcp")
@tls.versions
async def test_a_client_resumes_its_session_at_our_server(loop, endpoint, version):
    context = tls.authority().context_client(version=version)

    def ask(session=None):
        with (
            socket.create_connection(endpoint.address, timeout=10 * helpers.patience) as sock,
            context.wrap_socket(sock, server_hostname="localhost", session=session) as secure,
        ):
            secure.sendall(b"hello")
            assert helpers.receive_exactly(secure, 5) == b"hello"
            return secure.session_reused, secure.session

    server = await endpoint.serve(loop, helpers.Echo, ssl=tls.authority().context_server())
    reused, session = await loop.run_in_executor(None, ask)
    assert not reused
    for _ in range(3):
        reused, session = await loop.run_in_executor(None, ask, session)
        assert reused
    for protocol in endpoint.accepted:
        await protocol.lost
    server.close()
    await server.wait_closed()
    at_server = [protocol.transport.get_extra_info("ssl_object").session_reused for protocol in endpoint.accepted]
    assert at_server == [False, True, True, True]


async def test_both_sides_bind_to_the_same_channel(loop, endpoint):
    contexts = tls.authority().context_server(version=tls.TLS_1_2), tls.authority().context_client()
    async with Connected(loop, endpoint, *contexts) as both:
        of_client, of_server = (ssl_object.get_channel_binding("tls-unique") for ssl_object in both.objects)
        assert of_client and of_client == of_server


@tls.versions
async def test_both_sides_agree_on_what_was_negotiated(loop, endpoint, version):
    server_context = tls.authority().context_server(version=version, alpn=["http/1.1", "h2"])
    client_context = tls.authority().context_client(alpn=["h2", "http/1.1"])
    async with Connected(loop, endpoint, server_context, client_context) as both:
        for transport, ssl_object in zip((both.client, both.server), both.objects, strict=True):
            assert ssl_object.version() == {tls.TLS_1_2: "TLSv1.2", tls.TLS_1_3: "TLSv1.3"}[version]
            assert transport.get_extra_info("cipher") == both.objects[0].cipher()
            assert transport.get_extra_info("compression") is None
            # The ssl module's servers have their own order prevail.
            assert ssl_object.selected_alpn_protocol() == "http/1.1"
