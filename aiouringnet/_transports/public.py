"""What applications may name of transports, and what a protocol may have beside asyncio's methods.

The names are aiofastnet's, so that what is written for one runs on the other.
"""

import asyncio


class Transport(asyncio.BaseTransport):
    """What isinstance() sees of each transport of this package, in addition to asyncio's class; never instantiated.

    Stream transports and pipes that are written have the *_nocheck() methods,
    datagram transports have sendto_nocheck(): the same as those without it,
    which check little.  Streams have sendfile().

    Methods raise NotImplementedError here, as those of asyncio.Transport do:
    the transports have their own.
    """

    __slots__ = ()

    def write(self, data):
        raise NotImplementedError

    def writelines(self, list_of_data):
        raise NotImplementedError

    def sendto(self, data, addr=None):
        raise NotImplementedError

    def write_nocheck(self, data):
        raise NotImplementedError

    def writelines_nocheck(self, list_of_data):
        raise NotImplementedError

    def sendto_nocheck(self, data, addr):
        raise NotImplementedError

    def sendfile(self, file, offset, count):
        raise NotImplementedError


class Protocol(asyncio.BaseProtocol):
    """A base for protocols that say what they are.

    Derive from asyncio.Protocol or asyncio.BufferedProtocol as well if loops
    that are not patched are to know, too: they do not ask.

    data_received() is called, or get_buffer() with buffer_updated() where
    is_buffered_protocol() returns True or the class is an
    asyncio.BufferedProtocol; what is called and not there raises
    NotImplementedError.
    """

    __slots__ = ()

    def is_buffered_protocol(self):
        """Whether get_buffer() and buffer_updated() are to be called, not data_received(); None: as for any protocol.

        Asked when the transport gets the protocol.
        """
        return None

    def get_local_write_buffer_size(self):
        """Bytes that the protocol holds back itself, and will write.

        The transport adds them to its own where it says how much is queued,
        and decides on pause_writing() and resume_writing().  Where nothing of
        its own is queued it does not ask.
        """
        return 0

    def get_buffer(self, sizehint):
        raise NotImplementedError

    def buffer_updated(self, nbytes):
        raise NotImplementedError

    def data_received(self, data):
        raise NotImplementedError

    def eof_received(self):
        """As asyncio.Protocol's: the transport closes itself."""


def aiofn_is_buffered_protocol(protocol):
    """Whether a transport calls get_buffer() and buffer_updated() of a protocol, not data_received().

    As its own method says, as asyncio takes it, or else by what it has, as
    uvloop does.
    """
    asked = getattr(protocol, "is_buffered_protocol", None)
    if asked is not None:
        answer = asked()
        if isinstance(answer, bool):  # a mock says anything
            return answer
    if isinstance(protocol, asyncio.BufferedProtocol):
        return True
    return (
        not hasattr(protocol, "data_received")
        and hasattr(protocol, "get_buffer")
        and hasattr(protocol, "buffer_updated")
    )


def tells_what_it_holds(protocol):
    """Whether a protocol has a get_local_write_buffer_size() of its own."""
    return (
        isinstance(protocol, Protocol)
        and type(protocol).get_local_write_buffer_size is not Protocol.get_local_write_buffer_size
    )
