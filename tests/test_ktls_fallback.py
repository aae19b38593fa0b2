"""Kernel TLS that is asked for and cannot be had: the connection works in user space, and the log says why."""

import errno
import functools
import json
import logging
import os
import sys

import helpers
import ktls
import pytest
import tls
from helpers import Recorder, pattern
from ktls_child import SETSOCKOPT

import aiouringnet

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.every_kernel,
    tls.needs_openssl,
    pytest.mark.matrix(base="asyncio", debug=False),
]

DATA = pattern(300_000)


def asking(version=None):
    """Contexts of a server and a client that ask for it."""
    return (
        tls.authority().context_server(version=version, ktls=True),
        tls.authority().context_client(version=version, ktls=True),
    )


@pytest.fixture
def said(caplog):
    """said(): what the log has about kernel TLS, so far."""
    caplog.set_level(logging.DEBUG, logger="aiouringnet")

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == "aiouringnet"]
        return [line for line in lines if "kernel TLS" in line]

    return said


async def exchange(transport, protocol):
    """With a peer that echoes."""
    transport.write(DATA)
    already = len(protocol.data)
    assert (await protocol.received(already + len(DATA)))[already:] == DATA


def assert_in_user_space(said, transports, reason):
    for transport in transports:
        assert ktls.active(transport) == (False, False)
        assert reason in transport.get_extra_info("ktls_why_not")
    assert len(said()) == len(transports)
    assert all(reason in line for line in said())


async def echoed_over(loop, endpoint, contexts):
    """Both transports of a connection that has echoed something."""
    server_context, client_context = contexts
    server = await endpoint.serve(loop, helpers.Echo, ssl=server_context)
    transport, protocol = await endpoint.connect(loop, Recorder, ssl=client_context, server_hostname="localhost")
    await exchange(transport, protocol)
    transport.close()
    assert await protocol.lost is None
    assert await endpoint.accepted[0].lost is None
    server.close()
    await server.wait_closed()
    return transport, endpoint.accepted[0].transport


@pytest.fixture
def tcp():
    with helpers.Endpoint("tcp") as endpoint:
        yield endpoint


@pytest.fixture
def by_openssl(monkeypatch):
    if reason := aiouringnet._tls.why_not_openssl():
        pytest.skip(reason)
    monkeypatch.setenv("AIOURINGNET_TLS", "openssl")


@pytest.fixture
def by_ssl_module(monkeypatch):
    monkeypatch.setenv("AIOURINGNET_TLS", "ssl")


@tls.versions
async def test_a_kernel_without_tls(by_openssl, loop, tcp, said, version):
    if ktls.why_not_kernel() is None:
        pytest.skip("this kernel has TLS")
    transports = await echoed_over(loop, tcp, asking(version))
    assert_in_user_space(said, transports, "modprobe tls")


async def test_a_unix_socket(by_openssl, loop, said):
    with helpers.Endpoint("unix") as endpoint:
        transports = await echoed_over(loop, endpoint, asking())
    assert_in_user_space(said, transports, "TCP only")


async def test_records_by_the_ssl_module(by_ssl_module, loop, tcp, said):
    transports = await echoed_over(loop, tcp, asking())
    assert_in_user_space(said, transports, "ssl module")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the TLS of 3.10 does not nest")
async def test_tls_within_tls(by_openssl, loop, tcp, said):
    inner_contexts = asking()
    outer_contexts = tls.authority().context_server(ktls=False), tls.authority().context_client(ktls=False)

    class Nesting(helpers.Upgrading):
        async def start_tls(self, transport):
            outer = await super().start_tls(transport)
            return await self.loop.start_tls(outer, self, inner_contexts[0], server_side=True)

    server = await tcp.serve(loop, lambda: Nesting(outer_contexts[0]))
    transport, protocol = await tcp.connect(loop, Recorder)
    for context in (outer_contexts[1], inner_contexts[1]):
        if context is outer_contexts[1]:
            transport.write(b"upgrade")
            await protocol.received(8)
        transport = await loop.start_tls(transport, protocol, context, server_hostname="localhost")
    await exchange(transport, protocol)
    assert_in_user_space(said, [transport, tcp.accepted[0].transport], "within TLS")
    transport.close()
    await protocol.lost
    await tcp.accepted[0].lost
    server.close()
    await server.wait_closed()


async def test_nothing_is_said_where_nobody_asked(by_openssl, loop, tcp, said):
    contexts = tls.authority().context_server(ktls=False), tls.authority().context_client(ktls=False)
    for transport in await echoed_over(loop, tcp, contexts):
        assert ktls.active(transport) == (False, False)
        assert transport.get_extra_info("ktls_why_not") is None
    assert said() == []


# --------------------------------------------------------------------------
# A kernel that has TLS and refuses


REFUSALS = [
    ("ulp", errno.ENOENT, "modprobe tls"),
    ("ulp", errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ("send", errno.ENOENT, "modprobe tls"),
    ("send", errno.EINVAL, os.strerror(errno.EINVAL)),
    ("receive", errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)),
    ("receive", errno.EBUSY, ""),
]


@functools.cache
def refused(engine):
    """What the two versions' reports say of each refusal."""
    arguments = [word for call, number, _ in REFUSALS for word in (call, number)]
    child = helpers.run_file("ktls_child.py", engine, *arguments, timeout_s=30, AIOURINGNET_ENGINE=engine)
    assert (child.returncode, child.stderr) == (0, "")
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    return {
        (call, number): pair
        for (call, number, _), pair in zip(REFUSALS, zip(reports[::2], reports[1::2], strict=True), strict=True)
    }


@pytest.mark.skipif(SETSOCKOPT is None, reason="the number of setsockopt() is not known for this machine")
@pytest.mark.usefixtures("kernel_tls")
@pytest.mark.parametrize(
    "call, number, reason", REFUSALS, ids=[f"{call}-{errno.errorcode[number]}" for call, number, _ in REFUSALS]
)
def test_what_the_kernel_refuses_is_done_in_user_space(case, call, number, reason):
    for version, said in zip((tls.TLS_1_2, tls.TLS_1_3), refused(case.engine)[call, number], strict=True):
        assert said["echoed"] and said["ended_with"] == ["None", "None"]
        possible = ktls.expected(version)
        granted = [possible[0] and call == "receive", possible[1] and call == "send"]
        assert said["active"] == [granted, granted]
        assert len(said["log"]) == 2 * (granted != [True, True])
        for way, could, can in zip(("sending", "receiving"), possible, granted, strict=True):
            for why_not in said["why_not"]:
                assert (f"{way}: " in why_not) == (not can)
                assert can or not could or reason in why_not
