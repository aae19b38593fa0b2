"""Whatever protocol there is, and however it reads, gets each decrypted byte once and in its order."""

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import ANY_BASE, KINDS, RECORD_BYTES, barrier, meet, place, role, secure  # noqa: F401
from wire import Boom, boom, recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]


@pytest.mark.parametrize("buffer_size", [1, 7, 1000, RECORD_BYTES, 200_000])
async def test_a_buffered_protocol_gets_every_byte_in_order(loop, secure, role, buffer_size):
    w = await secure(lambda: BufferedRecorder(buffer_size=buffer_size), role)
    data = pattern(300_000 if buffer_size > 100 else 5000)
    await w.send(data)
    assert await w.protocol.received(len(data)) == data
    assert all(size <= buffer_size for size in w.protocol.chunks)


async def test_get_buffer_is_called_only_when_data_is_there(loop, secure, role, barrier):
    w = await secure(BufferedRecorder, role)
    # Handshake, tickets, part of a record: nothing to put into a buffer.
    record = w.tls.sealed(b"complete")
    await w.send_raw(record[:-1])
    await barrier()
    assert w.protocol.size_hints == []
    await w.send_raw(record[-1:])
    assert await w.protocol.received(8) == b"complete"
    await w.say_goodbye()
    await w.protocol.eof
    assert len(w.protocol.size_hints) == len(w.protocol.chunks) == 1
    assert all(hint > 0 for hint in w.protocol.size_hints)


@pytest.mark.parametrize("first, second", [(Recorder, BufferedRecorder), (BufferedRecorder, Recorder)])
@pytest.mark.parametrize("size", [100, 300_000])
async def test_data_after_set_protocol_goes_to_the_new_protocol(loop, secure, first, second, size):
    later = second()

    def switch(protocol, _):
        protocol.transport.set_protocol(later)

    callback = "data_received" if first is Recorder else "buffer_updated"
    w = await secure(recorder(first, **{callback: switch}))
    earlier = w.protocol
    await w.send(pattern(size))
    await helpers.eventually(lambda: len(earlier.data) + len(later.data) == size)
    await w.send(b"the rest")
    await helpers.eventually(lambda: later.data.endswith(b"the rest"))
    assert earlier.data + later.data == pattern(size) + b"the rest"
    assert len(earlier.chunks) == 1
    assert w.transport.get_protocol() is later
    w.transport.abort()
    assert await later.lost is None
    assert not earlier.lost.done()
    # What every connection must have had, it had in two parts.
    earlier.log += later.log
    earlier.lost.set_result(None)


@ANY_BASE
@pytest.mark.parametrize("kind", ["by its methods", "by its own word", "not, by its own word"])
async def test_a_protocol_with_a_buffer_of_its_own_need_not_inherit_buffered_protocol(loop, secure, role, kind):
    """As uvloop takes it, and aiofastnet's protocols say it."""
    w = await secure(lambda: helpers.unusual_protocol(kind), role)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    assert w.protocol.buffered == (not kind.startswith("not"))


@KINDS
async def test_a_protocol_set_while_a_buffer_is_asked_for_gets_the_data(loop, secure, role, base):
    later = base()

    def switch(protocol, _):
        protocol.transport.set_protocol(later)

    w = await secure(recorder(BufferedRecorder, get_buffer=switch), role)
    earlier = w.protocol
    await w.send(pattern(100_000))
    assert await later.received(100_000) == pattern(100_000)
    assert not earlier.data
    w.transport.abort()
    await later.lost
    # What every connection must have had, it had in two parts.
    earlier.log += later.log
    earlier.lost.set_result(None)


@pytest.mark.parametrize("buffer", [b"read-only", bytearray(), None], ids=repr)
async def test_a_buffer_that_cannot_be_filled_ends_the_connection(loop, secure, errors, buffer):
    w = await secure(recorder(BufferedRecorder, get_buffer=lambda *_: buffer if buffer is not None else boom()))
    await w.send(b"data")
    lost = await w.protocol.lost
    wanted = Boom if buffer is None else {b"read-only": BufferError}.get(bytes(buffer), RuntimeError)
    assert isinstance(lost, wanted)
    [context] = errors.take()
    assert context["exception"] is lost and "get_buffer" in context["message"]
