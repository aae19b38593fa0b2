"""Loop methods that are the loop's own on every engine.

aiofastnet has functions of these names, and code that was written for it
finds them here.
"""

import sys

from aiouringnet._api.call import expect_loop, loops_own
from aiouringnet._api.signatures import like


def _passed_on(name):
    @like(name)
    async def function(loop, *args, **kwargs):
        expect_loop(loop, name)
        return await loops_own(loop, name)(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"The same as loop.{name}()."
    return function


sock_accept = _passed_on("sock_accept")
sock_connect = _passed_on("sock_connect")
sock_recv = _passed_on("sock_recv")
sock_recv_into = _passed_on("sock_recv_into")
sock_sendall = _passed_on("sock_sendall")

if sys.version_info >= (3, 11):
    sock_recvfrom = _passed_on("sock_recvfrom")
    sock_recvfrom_into = _passed_on("sock_recvfrom_into")
    sock_sendto = _passed_on("sock_sendto")
