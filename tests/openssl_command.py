"""The openssl command as a peer: `s_client` asks our server, `s_server` answers our client.

async with serving(loop, endpoint, context, factory):
    done = await s_client(endpoint, "-quiet", input=b"hello\\n")

with s_server("-rev") as service:
    transport, protocol = await connect(loop, service)
"""

import contextlib
import re

import helpers
import tls

# --------------------------------------------------------------------------
# s_client


class EchoOf(helpers.Recorder):
    """Sends so many bytes back, and ends the connection."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def data_received(self, data):
        super().data_received(data)
        self.transport.write(data)
        if len(self.data) == self.size:
            self.transport.close()


def s_client_args(endpoint, *args):
    host, port = endpoint.address
    trusting = ("-CAfile", tls.authority().cafile, "-verify_return_error", "-verify_hostname", "localhost")
    return ("openssl", "s_client", "-connect", f"{host}:{port}", "-servername", "localhost", *trusting, *args)


def s_client(endpoint, *args, input=b"hello\n"):
    return helpers.command(*s_client_args(endpoint, "-ign_eof", *args), input=input)


@contextlib.asynccontextmanager
async def serving(loop, endpoint, context, factory=lambda: EchoOf(6)):
    server = await endpoint.serve(loop, factory, ssl=context)
    yield
    for protocol in endpoint.accepted:
        if protocol.made.done():
            await protocol.lost
    server.close()
    await server.wait_closed()


# --------------------------------------------------------------------------
# s_server


@contextlib.contextmanager
def s_server(*args, pair=None, **options):
    certificate, key = pair or tls.authority().pair()
    listening = ("openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", certificate, "-key", key)
    with helpers.Service([*listening, *args], ready=has_address, **options) as service:
        service.address = ("127.0.0.1", int(has_address(service)[1]))
        yield service


def has_address(service):
    return re.search(r"ACCEPT 127\.0\.0\.1:(\d+)\s", service.output)


async def connect(loop, service, context=None, hostname="localhost"):
    return await loop.create_connection(
        helpers.Recorder,
        *service.address,
        ssl=context or tls.authority().context_client(),
        server_hostname=hostname,
    )
