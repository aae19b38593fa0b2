"""Loop methods that are the loop's own on every engine.

aiofastnet has functions of these names, and code that was written for it
finds them here.
"""

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


connect_read_pipe = _passed_on("connect_read_pipe")
connect_write_pipe = _passed_on("connect_write_pipe")
