"""Nothing of ours blocks a running loop, as far as blockbuster sees: other projects' test suites look with it."""

import asyncio
import os

import helpers
import pytest
import tls

import aiouringnet
from aiouringnet import _engine as engines

blockbuster = pytest.importorskip("blockbuster")

pytestmark = pytest.mark.matrix(debug=False)


@pytest.fixture
def run_watched(loop, run):
    """Like `run`, but blocking calls within the running loop raise BlockingError; and the ring is probed anew."""

    def run_watched(coroutine):
        engines._require_features.cache_clear()
        with blockbuster.blockbuster_ctx():
            return run(coroutine)

    return run_watched


@pytest.mark.parametrize("kind", ["tcp", "unix", pytest.param("tls", marks=tls.needs_openssl)])
def test_a_connections_life_does_not_block(loop, run_watched, kind):
    async def live():
        aiouringnet.status()
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            for size in (5, 300_000):
                transport.write(bytes(size))
            await protocol.received(300_005)
            assert aiouringnet.status()["running"] and aiouringnet.stats()["streams"] >= 1
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost
        with pytest.raises(OSError):
            await endpoint.connect(loop, helpers.Recorder)
        with pytest.raises(blockbuster.BlockingError):
            os.stat(__file__)  # it does look

    with helpers.Endpoint("unix" if kind == "unix" else "tcp", secure=kind == "tls") as endpoint:
        run_watched(live())


def test_a_unix_servers_file_goes_without_a_blocking_call(loop, run_watched):
    async def serve(path):
        server = await aiouringnet.create_unix_server(loop, helpers.Echo, path, cleanup_socket=True)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        server.close()
        await server.wait_closed()

    with helpers.short_folder() as folder:
        run_watched(serve(folder / "s"))
        assert not (folder / "s").exists()


def test_a_file_is_sent_without_a_blocking_call(loop, run_watched, tmp_path):
    async def send(file):
        async with await endpoint.serve(loop, helpers.Recorder):
            transport, _ = await endpoint.connect(loop, asyncio.Protocol)
            assert await loop.sendfile(transport, file) == len(data)
            transport.close()
            await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].lost.done())
            assert bytes(endpoint.accepted[0].data) == data

    data = helpers.pattern(300_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file, helpers.Endpoint("tcp") as endpoint:
        run_watched(send(file))
