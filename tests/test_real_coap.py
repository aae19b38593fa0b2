"""aiocoap, a server and a client on one loop: a resource, one of 100 KiB in blocks, and one that is observed."""

import asyncio

import helpers
import pytest
from helpers import pattern

pytestmark = pytest.mark.matrix(debug=False)

SIZE = 100 << 10  # bytes: a hundred blocks of CoAP's
NOTES = 5

# How server and client get at datagrams: by create_datagram_endpoint() each, or by add_reader(), recvmsg() and
# sendmsg() on sockets of their own beside our transports; CoAP over TCP.
WAYS = {
    "endpoints": ("simplesocketserver", "simple6", "coap"),
    "sockets": ("udp6", "udp6", "coap"),
    "tcp": ("tcpserver", "tcpclient", "coap+tcp"),
}


def site():
    from aiocoap import CHANGED, Message, resource

    class Document(resource.Resource):
        def __init__(self):
            super().__init__()
            self.content = pattern(SIZE)

        async def render_get(self, request):
            return Message(payload=self.content)

        async def render_put(self, request):
            self.content = request.payload
            return Message(code=CHANGED)

    class Counter(resource.ObservableResource):
        number = 0

        def count(self):
            self.number += 1
            self.updated_state()

        async def render_get(self, request):
            return Message(payload=b"%d" % self.number)

    root = resource.Site()
    root.document, root.counter = Document(), Counter()
    root.add_resource(["document"], root.document)
    root.add_resource(["counter"], root.counter)
    return root


@pytest.fixture(params=WAYS)
def coap(request, loop, run):
    """(what the server serves, a client's request, the start of its URIs)"""
    aiocoap = pytest.importorskip("aiocoap", reason="aiocoap is not installed")
    serving, asking, scheme = WAYS[request.param]
    port = helpers.free_port()
    root = site()

    async def start():
        server = await aiocoap.Context.create_server_context(root, bind=("127.0.0.1", port), transports=[serving])
        return server, await aiocoap.Context.create_client_context(transports=[asking])

    async def end():
        await client.shutdown()
        await server.shutdown()
        await asyncio.sleep(0.01)

    server, client = run(start())

    def ask(code, path, **options):
        message = aiocoap.Message(code=code, uri=f"{scheme}://127.0.0.1:{port}/{path}", **options)
        return client.request(message, handle_blockwise=code != aiocoap.GET or "observe" not in options)

    yield root, ask
    run(end())


async def test_documents_come_and_go_in_blocks(coap):
    from aiocoap import CHANGED, GET, PUT

    root, ask = coap
    answer = await ask(GET, "document").response
    assert answer.code.is_successful() and answer.payload == pattern(SIZE)
    changed = await ask(PUT, "document", payload=pattern(SIZE, seed=1)).response
    assert changed.code == CHANGED
    assert root.document.content == pattern(SIZE, seed=1)


async def test_requests_that_are_made_together_get_their_own_answers(coap):
    from aiocoap import GET, NOT_FOUND

    _, ask = coap
    await ask(GET, "counter").response  # simple6 has one endpoint then, else it forgets all that it makes but the last
    paths = ["counter", "nowhere"] * 10
    answers = await asyncio.gather(*(ask(GET, path).response for path in paths))
    assert [answer.code == NOT_FOUND for answer in answers] == [path == "nowhere" for path in paths]


async def test_what_is_observed_is_told_of_each_change(coap):
    from aiocoap import GET

    root, ask = coap
    request = ask(GET, "counter", observe=0)
    assert (await request.response).payload == b"0"
    notes = aiter(request.observation)
    for number in range(1, NOTES + 1):
        root.counter.count()
        assert (await helpers.within(anext(notes))).payload == b"%d" % number
    request.observation.cancel()
