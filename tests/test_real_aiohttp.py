"""aiohttp talks to itself: its client and its server on one patched loop, in the clear and over TLS."""

import asyncio
import contextlib
import io
import sys

import helpers
import ktls
import pytest
import tls

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed")
web = pytest.importorskip("aiohttp.web", reason="aiohttp is not installed")

pytestmark = pytest.mark.matrix(sqpoll=True)

BODY = helpers.pattern(5 << 20)


async def echo(request):
    return web.Response(body=await request.read(), headers={"X-Peer-Port": str(peer_port(request))})


def peer_port(request):
    peer = request.transport.get_extra_info("peername")
    return peer[1] if isinstance(peer, tuple) else 0


async def stream(request):
    """Sends the body in pieces that fit no buffer exactly."""
    response = web.StreamResponse()
    await response.prepare(request)
    for start in range(0, len(BODY), 70_001):
        await response.write(BODY[start : start + 70_001])
    return response


async def trickle(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * 1000)
        await asyncio.sleep(0.01)


async def shout(request):
    websocket = web.WebSocketResponse(max_msg_size=0)
    await websocket.prepare(request)
    async for message in websocket:
        await websocket.send_bytes(message.data.upper())
    return websocket


@contextlib.asynccontextmanager
async def service(endpoint, folder=None):
    """A client session, with a base URL that leads to the server, and to the files of `folder`."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/echo", echo)
    app.router.add_get("/stream", stream)
    app.router.add_get("/trickle", trickle)
    app.router.add_get("/shout", shout)
    if folder:
        app.router.add_static("/files", folder)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    if endpoint.kind == "unix":
        await web.UnixSite(runner, endpoint.address).start()
        connector, url = aiohttp.UnixConnector(endpoint.address, limit=100), "http://localhost"
    else:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=endpoint.server_tls.get("ssl"))
        await site.start()
        host, port = runner.addresses[0][:2]
        connector = aiohttp.TCPConnector(limit=100, ssl=endpoint.client_tls.get("ssl", True))
        url = f"{'https' if endpoint.client_tls else 'http'}://{host}:{port}"
    try:
        async with aiohttp.ClientSession(url, connector=connector) as session:
            yield session
    finally:
        await runner.cleanup()


async def test_bodies_of_megabytes_both_ways(loop, endpoint):
    async with service(endpoint) as session:
        async with session.post("/echo", data=io.BytesIO(BODY)) as answer:
            assert await answer.read() == BODY
        async with session.get("/stream") as answer:
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert await answer.read() == BODY


async def test_chunked_uploads(loop, endpoint):
    async def pieces():
        for start in range(0, len(BODY), 30_011):
            yield BODY[start : start + 30_011]

    async with service(endpoint) as session:
        async with session.post("/echo", data=pieces()) as answer:
            assert await answer.read() == BODY


async def test_a_connection_is_kept_for_further_requests(loop, endpoint):
    ports = set()
    async with service(endpoint) as session:
        for _ in range(50):
            async with session.post("/echo", data=b"again") as answer:
                assert await answer.read() == b"again"
                ports.add(answer.headers["X-Peer-Port"])
    assert len(ports) == 1


async def test_a_hundred_requests_at_once(loop, endpoint):
    async def ask(session, number):
        body = helpers.pattern(20_000, number)
        async with session.post("/echo", data=body) as answer:
            return await answer.read() == body

    async with service(endpoint) as session:
        assert all(await asyncio.gather(*(ask(session, number) for number in range(100))))


async def test_a_client_that_leaves_in_mid_response_disturbs_nobody(loop, endpoint, errors):
    async with service(endpoint) as session:
        async with session.get("/trickle") as answer:
            await answer.content.readexactly(5000)
            answer.close()
        async with session.post("/echo", data=b"still there") as answer:
            assert await answer.read() == b"still there"
        await asyncio.sleep(0.05)


async def test_websocket_messages(loop, endpoint):
    async with service(endpoint) as session, session.ws_connect("/shout", max_msg_size=0) as websocket:
        for size in (1, 125, 126, 70_000, 3 << 20):
            await websocket.send_bytes(b"a" * size)
            assert await websocket.receive_bytes() == b"A" * size
        await websocket.ping()


# --------------------------------------------------------------------------
# Files


@pytest.fixture
def ways(monkeypatch):
    """Which way each file goes that our sendfile() is given: "send", the kernel's, or "_read_and_write"."""
    module = sys.modules["aiouringnet._api.sendfile"]
    taken = []

    def note(name):
        way = getattr(module, name)

        async def noting(*args):
            taken.append(name)
            return await way(*args)

        monkeypatch.setattr(module, name, noting)

    for name in ("send", "_read_and_write"):
        note(name)
    return taken


@pytest.fixture(params=["http", *(pytest.param(kind, marks=tls.needs_openssl) for kind in ("https", "https-ktls"))])
def site(request):
    with helpers.Endpoint("tcp", secure=request.param != "http") as endpoint:
        endpoint.ktls = request.param == "https-ktls"
        if endpoint.server_tls:
            endpoint.server_tls = {"ssl": tls.authority().context_server(ktls=endpoint.ktls)}
            endpoint.client_tls = {"ssl": tls.authority().context_client(ktls=False)}
        yield endpoint


PARTS = [
    (None, slice(None)),
    ("bytes=1000-1999999", slice(1000, 2_000_000)),
    ("bytes=-70001", slice(-70_001, None)),
    ("bytes=5000000-", slice(5_000_000, None)),
]


@pytest.mark.kernel
@pytest.mark.matrix(debug=False, sqpoll=False)
async def test_files_and_parts_of_files_are_sent_by_sendfile(loop, site, ways, tmp_path):
    (tmp_path / "body").write_bytes(BODY)
    by_kernel = site.ktls and ktls.why_not() is None
    before = ktls.counters()["TlsTxSw"] if by_kernel else 0
    async with service(site, tmp_path) as session:
        for wanted, part in PARTS:
            headers = {"Range": wanted} if wanted else {}
            async with session.get("/files/body", headers=headers) as answer:
                assert answer.status == (206 if wanted else 200)
                assert await answer.read() == BODY[part]
        if by_kernel:
            assert ktls.counters()["TlsTxSw"] == before + 1  # one connection, kept
    way = "send" if by_kernel or not site.server_tls else "_read_and_write"
    assert ways == [way] * len(PARTS)


# --------------------------------------------------------------------------
# Over TLS


@tls.needs_openssl
@pytest.mark.usefixtures("tls_engine")
@pytest.mark.pairs(tls_engine="ssl")
@pytest.mark.matrix(debug=False, sqpoll=False)
class TestOverTLS:
    """The same tests once more."""

    @pytest.fixture
    def endpoint(self):
        with helpers.Endpoint("tcp", secure=True) as endpoint:
            yield endpoint

    test_bodies_of_megabytes_both_ways = staticmethod(test_bodies_of_megabytes_both_ways)
    test_chunked_uploads = staticmethod(test_chunked_uploads)
    test_a_connection_is_kept_for_further_requests = staticmethod(test_a_connection_is_kept_for_further_requests)
    test_a_hundred_requests_at_once = staticmethod(test_a_hundred_requests_at_once)
    test_a_client_that_leaves_in_mid_response_disturbs_nobody = staticmethod(
        test_a_client_that_leaves_in_mid_response_disturbs_nobody
    )
    test_websocket_messages = staticmethod(test_websocket_messages)
