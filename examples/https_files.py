"""An aiohttp file server over HTTPS: with kernel TLS, files go from the page cache to the socket by sendfile(2).

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost \\
        -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem
    python examples/https_files.py --cert cert.pem --key key.pem --root /usr/share/doc --port 8443
    curl --cacert cert.pem https://localhost:8443/
    curl --cacert cert.pem https://localhost:8443/.path     # which path this connection takes

Kernel TLS needs the kernel's tls module (modprobe tls) and an OpenSSL that was
built with it; without, OpenSSL encrypts in user space and nothing else changes.
"""

import argparse
import ssl

from aiohttp import web

import aiouringnet

OP_ENABLE_KTLS = getattr(ssl, "OP_ENABLE_KTLS", 8)  # Python has the name since 3.12


async def path(request):
    transport = request.transport
    keys = ("tls_engine", "cipher", "ktls_send_enabled", "ktls_recv_enabled", "ktls_why_not")
    return web.json_response({key: transport.get_extra_info(key) for key in keys})


def make_app(root):
    app = web.Application()
    app.router.add_get("/.path", path)
    app.router.add_static("/", root, show_index=True)  # its FileResponse calls loop.sendfile()
    return app


def make_context(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.options |= OP_ENABLE_KTLS
    return context


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="an aiohttp file server over HTTPS")
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--root", default=".")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443)
    args = parser.parse_args()
    context = make_context(args.cert, args.key)
    loop = aiouringnet.new_event_loop()
    web.run_app(make_app(args.root), host=args.host, port=args.port, ssl_context=context, loop=loop)
