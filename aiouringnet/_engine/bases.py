"""What our users may rely on beneath us: a loop of asyncio's, or one of uvloop's, which does some things otherwise.

* uvloop keeps a socket open for as long as something of it uses that, whoever closes it meanwhile: a transport
  that was given it, or a call such as loop.sock_recv().  asyncio's loops lose it.
* A transport of uvloop's calls its protocol in one context for as long as it lives.  asyncio's takes the current
  one where a method of its own calls the protocol, and in start_tls().
"""

import asyncio


def is_asyncios(loop):
    return isinstance(loop, asyncio.BaseEventLoop)
