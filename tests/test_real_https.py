"""curl and nginx: HTTPS with a server of ours, nginx as a server for our client and as a client of our server."""

import asyncio
import contextlib
import shutil
import signal
import ssl

import helpers
import pytest
import tls
from wire import over

pytestmark = [
    pytest.mark.kernel(engine="uring"),
    pytest.mark.matrix(debug=False),
    pytest.mark.usefixtures("tls_engine"),
    pytest.mark.pairs(tls_engine="ssl"),
    tls.needs_openssl,
]

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


MEGABYTES = helpers.pattern(5 << 20)


# --------------------------------------------------------------------------
# A server of ours


class HTTP(helpers.Recorder):
    """Answers GET with MEGABYTES and anything else with the request's body; keeps the connection."""

    requests = 0

    def data_received(self, data):
        super().data_received(data)
        while self.answer():
            pass

    def answer(self):
        size = self.data.find(b"\r\n\r\n") + 4
        if size < 4:
            return False
        request, *lines = bytes(self.data[: size - 4]).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        end = size + int(headers.get(b"content-length", 0))
        if len(self.data) < end:
            return False
        self.requests += 1
        body = MEGABYTES if request.startswith(b"get") else bytes(self.data[size:end])
        del self.data[:end]
        self.transport.writelines([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body])
        return True

    def eof_received(self):
        super().eof_received()
        self.transport.close()


class Serving:
    """HTTPS on a free port; `url` leads there. In the end every connection has been closed by its client."""

    def __init__(self, loop, endpoint, **context):
        self.loop, self.endpoint = loop, endpoint
        self.context = tls.authority().context_server(**context)

    async def __aenter__(self):
        self.server = await self.endpoint.serve(self.loop, HTTP, ssl=self.context)
        self.url = "https://localhost:{1}/".format(*self.endpoint.address)
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        for protocol in self.endpoint.accepted:
            if protocol.made.done():
                await protocol.lost
        await self.server.wait_closed()


# --------------------------------------------------------------------------
# curl


def curl_args(*args):
    # The name leads to ::1 elsewhere.
    return ("curl", "-sS", "-4", "--noproxy", "*", "--max-time", "15", "--cacert", tls.authority().cafile, *args)


def curl(*args, **options):
    return helpers.command(*curl_args(*args), **options)


@needs_curl
@over("tcp")
@tls.versions
async def test_curl_gets_and_posts_megabytes(loop, endpoint, version):
    most = {tls.TLS_1_2: "1.2", tls.TLS_1_3: "1.3"}[version]
    async with Serving(loop, endpoint) as serving:
        got = await curl("--tls-max", most, "-w", "%{num_connects}", serving.url, serving.url)
        assert got.stdout == MEGABYTES + b"1" + MEGABYTES + b"0", got.stderr
        posted = await curl("--tls-max", most, "-H", "Expect:", "--data-binary", "@-", serving.url, input=MEGABYTES)
        assert posted.stdout == MEGABYTES, posted.stderr
    first = endpoint.accepted[0]
    assert first.requests == 2
    assert first.transport.get_extra_info("ssl_object").version() == f"TLSv{most}"


@needs_curl
@over("tcp")
@tls.versions
@pytest.mark.parametrize("certificate", ["expired", "self_signed"])
async def test_curl_refuses_a_certificate_and_our_server_goes_on(loop, endpoint, version, certificate):
    async with Serving(loop, endpoint, pair=getattr(tls.authority(), certificate)(), version=version) as serving:
        for _ in range(3):
            refused = await curl(serving.url)
            assert refused.returncode == 60, refused.stderr  # CURLE_PEER_FAILED_VERIFICATION
        assert (await curl("--insecure", serving.url)).stdout == MEGABYTES
        # Refused in the handshake, or right after it: later versions of curl look at the certificate then.
        logs = [protocol.log for protocol in endpoint.accepted]
        assert all(log[:1] in ([], ["made"]) and "data" not in log for log in logs[:3]), logs
        assert [protocol.requests for protocol in endpoint.accepted] == [0, 0, 0, 1]


@needs_curl
@over("tcp")
@tls.versions
async def test_curl_is_refused_without_a_certificate(loop, endpoint, version):
    certificate, key = tls.authority().client_pair()
    async with Serving(loop, endpoint, verify_client=True, version=version) as serving:
        refused = await curl(serving.url)
        # CURLE_SSL_CONNECT_ERROR, CURLE_RECV_ERROR
        assert refused.returncode in (35, 56) and b"alert" in refused.stderr, refused
        assert (await curl("--cert", certificate, "--key", key, serving.url)).stdout == MEGABYTES


@needs_curl
@over("tcp")
@tls.versions
async def test_a_curl_that_is_killed_in_mid_download_disturbs_nobody(loop, endpoint, version):
    async with Serving(loop, endpoint, version=version) as serving:
        slowly = curl_args("--limit-rate", "100k", "-o", "/dev/null", serving.url)
        with helpers.Service(slowly, ready=lambda _: True) as service:
            await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].made.done())
            await helpers.eventually(lambda: endpoint.accepted[0].requests == 1)
            service.stop(signal.SIGKILL)
        assert isinstance(await endpoint.accepted[0].lost, (ConnectionError, type(None)))
        assert (await curl(serving.url)).stdout == MEGABYTES


# --------------------------------------------------------------------------
# nginx


CONFIG = """
daemon off;
# One process, which as root stays root: it may read the files here.
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        root {folder};
        {directives}
    }}
}}
"""

# To our server, which it knows by its certificate.
PROXY = """
location / {{
    proxy_pass https://127.0.0.1:{upstream};
    proxy_http_version 1.1;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {cafile};
    proxy_ssl_name localhost;
    proxy_ssl_server_name on;
    proxy_ssl_protocols {protocol};
}}
"""


def nginx(folder, directives=""):
    certificate, key = tls.authority().pair()
    address = ("127.0.0.1", helpers.free_port())
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(folder=folder, port=address[1], certificate=certificate, key=key, directives=directives)
    )
    service = helpers.Service([NGINX, "-p", folder, "-c", config], ready=helpers.accepts(address))
    service.address = address
    return service


async def ask(service, request, context=None):
    """One request over a connection of its own, by streams of ours; returns the answer's body."""
    reader, writer = await asyncio.open_connection(
        *service.address, ssl=context or tls.authority().context_client(), server_hostname="localhost"
    )
    try:
        writer.write(request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        return body
    finally:
        writer.close()
        await writer.wait_closed()


def get(path):
    return b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path


def post(body):
    return b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@needs_nginx
@tls.versions
async def test_downloads_from_nginx_are_whole(loop, tmp_path, version):
    (tmp_path / "file").write_bytes(MEGABYTES)
    context = tls.authority().context_client(version=version)
    with nginx(tmp_path) as service:
        assert await ask(service, get(b"/file"), context) == MEGABYTES
        bodies = await asyncio.gather(*(ask(service, get(b"/file"), context) for _ in range(8)))
    assert [body == MEGABYTES for body in bodies] == [True] * 8


@needs_nginx
async def test_nginx_goes_on_after_we_have_refused_it(loop, tmp_path):
    (tmp_path / "file").write_bytes(b"still there")
    with nginx(tmp_path) as service:
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer certificate"):
            await ask(service, get(b"/file"), ssl.create_default_context())
        assert await ask(service, get(b"/file")) == b"still there"


@needs_nginx
@tls.versions
async def test_an_nginx_that_is_killed_in_mid_download_is_missed(loop, tmp_path, version):
    (tmp_path / "file").write_bytes(MEGABYTES)
    with nginx(tmp_path, "limit_rate 1m;") as service:
        reader, writer = await asyncio.open_connection(
            *service.address, ssl=tls.authority().context_client(version=version), server_hostname="localhost"
        )
        writer.write(get(b"/file"))
        await reader.readexactly(100_000)
        service.stop(signal.SIGKILL)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(len(MEGABYTES))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@needs_nginx
@over("tcp")
@tls.versions
async def test_nginx_passes_requests_on_to_our_server(loop, endpoint, tmp_path, version):
    protocol = {tls.TLS_1_2: "TLSv1.2", tls.TLS_1_3: "TLSv1.3"}[version]
    async with Serving(loop, endpoint):
        upstream, cafile = endpoint.address[1], tls.authority().cafile
        with nginx(tmp_path, PROXY.format(upstream=upstream, cafile=cafile, protocol=protocol)) as service:
            assert await ask(service, get(b"/")) == MEGABYTES
            assert await ask(service, post(MEGABYTES)) == MEGABYTES
            assert await asyncio.gather(*(ask(service, post(b"%d" % n)) for n in range(20))) == [
                b"%d" % n for n in range(20)
            ]
    objects = [accepted.transport.get_extra_info("ssl_object") for accepted in endpoint.accepted]
    assert {ssl_object.version() for ssl_object in objects} == {protocol}
    # nginx keeps its session for the next connection.
    assert not objects[0].session_reused and objects[1].session_reused


@needs_nginx
@over("tcp")
async def test_nginx_does_not_trust_our_server(loop, endpoint, tmp_path):
    async with Serving(loop, endpoint, pair=tls.authority().self_signed()):
        upstream, cafile = endpoint.address[1], tls.authority().cafile
        with nginx(tmp_path, PROXY.format(upstream=upstream, cafile=cafile, protocol="TLSv1.3")) as service:
            with pytest.raises(AssertionError, match="502 Bad Gateway"):
                await ask(service, get(b"/"))
            await service.heard("upstream SSL certificate verify error")
