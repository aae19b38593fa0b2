"""A loop that stops, runs again, or is interrupted by signals goes on where it was."""

import asyncio
import random
import signal
import threading
import time

import helpers
import pytest
from helpers import Recorder, pattern
from in_flight import exchange
from wire import serve  # noqa: F401

pytestmark = pytest.mark.pairs(endpoint="unix")


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.matrix(sqpoll=True)
def test_data_written_right_before_the_loop_stops_reaches_the_peer(loop, endpoint, run, size):
    listener = endpoint.listener()
    transport, _ = run(endpoint.connect(loop, Recorder))
    peer, _ = listener.accept()
    peer.settimeout(5 * helpers.patience)

    async def write():
        transport.write(pattern(size))

    def write_and_stop():
        transport.write(pattern(size))
        loop.stop()
        transport.write(b"end")

    for _ in range(5):
        loop.run_until_complete(write())
        assert helpers.receive_exactly(peer, size) == pattern(size)
        loop.call_soon(write_and_stop)
        loop.run_forever()
        assert helpers.receive_exactly(peer, size + 3) == pattern(size) + b"end"
    transport.abort()
    peer.close()


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_stopped_and_run_again_many_times(loop, endpoint, serve):
    async def begin():
        await serve(helpers.Echo)
        return [endpoint.peer() for _ in range(3)]

    async def echo_came_back(peer, data):
        received = b""
        while len(received) < len(data):
            received += await loop.sock_recv(peer, 100)
        return received == data

    peers = helpers.run_on(loop, begin())
    helpers.run_on(loop, helpers.eventually(lambda: len(endpoint.accepted) == 3))
    for peer in peers:
        peer.setblocking(False)
    for turn in range(200):
        for number, peer in enumerate(peers):
            # It comes while the loop stands still.
            data = b"turn %d of peer %d" % (turn, number)
            peer.send(data)
            assert helpers.run_on(loop, echo_came_back(peer, data), timeout_s=5)
    for peer in peers:
        peer.close()
    for protocol in endpoint.accepted:
        helpers.run_on(loop, helpers.within(asyncio.shield(protocol.lost)))


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_stopped_loop_is_woken_by_what_came_meanwhile(loop, endpoint, serve):
    """No read, no timer, nothing else to run: only the engine's descriptor can wake it."""
    helpers.run_on(loop, serve(Recorder))
    peer = endpoint.peer()
    helpers.run_on(loop, helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport))
    protocol = endpoint.accepted[0]
    for turn in range(100):
        peer.send(b"%04d" % turn)
        loop.run_until_complete(protocol.received(4 * (turn + 1)))
    peer.close()
    assert loop.run_until_complete(protocol.lost) is None


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_signals_in_the_middle_of_everything(make_loop, endpoint):
    """EINTR wherever it may come up."""
    loop = make_loop()
    count = [0]

    def on_signal(signum, frame):
        count[0] += 1

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            started = time.monotonic()
            while time.monotonic() - started < 0.5:
                await exchange(loop, endpoint, 5, 100_000, random.Random(6))
            await asyncio.gather(*(accepted.lost for accepted in endpoint.accepted))

    before = signal.signal(signal.SIGUSR1, on_signal)
    signal.siginterrupt(signal.SIGUSR1, True)
    stop = threading.Event()
    target = threading.get_ident()

    def annoy():
        while not stop.is_set():
            time.sleep(0.0005)  # stop.wait() takes a hundred times as long on a free-threaded Python
            signal.pthread_kill(target, signal.SIGUSR1)

    thread = threading.Thread(target=annoy)
    thread.start()
    try:
        helpers.run_on(loop, main())
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert count[0] > 50
