"""Shows on a live TLS connection which path is active: whose records, and whether the kernel makes them.

python examples/tls_path.py www.python.org
python examples/tls_path.py localhost --port 8443 --cafile cert.pem
"""

import argparse
import asyncio
import ssl

import aiouringnet

OP_ENABLE_KTLS = getattr(ssl, "OP_ENABLE_KTLS", 8)  # Python has the name since 3.12


async def show(host, port, context):
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    status = aiouringnet.status()
    print("engine        ", status["engine"])
    print("cipher        ", *writer.get_extra_info("cipher")[:2])
    print("records by    ", writer.get_extra_info("tls_engine"), "of", status["openssl"])
    print("kernel sends  ", writer.get_extra_info("ktls_send_enabled"))
    print("kernel reads  ", writer.get_extra_info("ktls_recv_enabled"))
    if writer.get_extra_info("ktls_why_not"):
        print("why not       ", writer.get_extra_info("ktls_why_not"))
    if not status["ktls_available"]:
        print("on this machine", status["ktls_why_not"], "-", status["ktls_remedy"])
    writer.close()
    await writer.wait_closed()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="shows which path a TLS connection takes")
    parser.add_argument("host")
    parser.add_argument("--port", type=int, default=443)
    parser.add_argument("--cafile", help="certificates to trust instead of the system's")
    args = parser.parse_args()
    context = ssl.create_default_context(cafile=args.cafile)
    context.options |= OP_ENABLE_KTLS
    loop = aiouringnet.new_event_loop()
    loop.run_until_complete(show(args.host, args.port, context))
    loop.close()
