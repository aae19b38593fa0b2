"""The openssl command as the peer: `s_client` asks our server, `s_server` answers our client."""

import ssl
from pathlib import Path

import helpers
import pytest
import tls
from openssl_command import EchoOf, connect, s_client, s_client_args, s_server, serving
from wire import over

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    pytest.mark.matrix(debug=False),
    pytest.mark.usefixtures("tls_engine"),
    pytest.mark.pairs(tls_engine="ssl"),
    tls.needs_openssl,
]


MEGABYTES = helpers.pattern(3 << 20)


# --------------------------------------------------------------------------
# s_client


def report(done, line=b"hello\n"):
    """What s_client printed around our answer, which it puts anywhere, even in the middle of a word."""
    before, answer, after = done.stdout.partition(line)
    assert answer, (done.stdout, done.stderr)
    return before + after


@over("tcp")
@tls.versions
async def test_s_client_gets_an_answer(loop, endpoint, version):
    context = tls.authority().context_server(version=version, alpn=["http/1.1", "h2"])
    async with serving(loop, endpoint, context):
        said = report(await s_client(endpoint, "-alpn", "spdy,h2"))
    assert b"Verify return code: 0 (ok)" in said
    assert b"ALPN protocol: h2" in said
    assert endpoint.accepted[0].transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"


@over("tcp")
@tls.versions
async def test_s_client_gets_its_megabytes_back(loop, endpoint, version):
    context = tls.authority().context_server(version=version)
    async with serving(loop, endpoint, context, lambda: EchoOf(len(MEGABYTES))):
        done = await s_client(endpoint, "-quiet", input=MEGABYTES)
    assert done.stdout == MEGABYTES


@over("tcp")
@pytest.mark.parametrize(
    "options",
    [
        # What a record adds to its data depends on these.
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-SHA384", "-no_etm"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-CCM"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"],
        ["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"],
        ["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
        # Small records, at both ends and at its end.
        ["-maxfraglen", "512"],
        ["-max_send_frag", "512"],
        ["-tls1_3", "-record_padding", "1000"],
        # The server asks for another key share (HelloRetryRequest).
        ["-tls1_3", "-groups", "X448:P-256"],
    ],
    ids=" ".join,
)
async def test_whatever_s_client_wants_its_data_comes_back(loop, endpoint, options):
    context = tls.authority().context_server()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_ecdh_curve("prime256v1")
    async with serving(loop, endpoint, context, lambda: EchoOf(1 << 20)):
        done = await s_client(endpoint, "-quiet", *options, input=MEGABYTES[: 1 << 20])
    assert done.stdout == MEGABYTES[: 1 << 20], done.stderr


@over("tcp")
@tls.versions
async def test_s_client_gets_a_long_certificate_chain(loop, endpoint, version, tmp_path):
    """A flight of the handshake larger than a record."""
    (certificate, key), cafile = tls.authority().pair(), tls.authority().cafile
    chain = tmp_path / "chain"
    chain.write_text(Path(certificate).read_text() + 100 * Path(cafile).read_text())
    context = tls.authority().context_server(pair=(chain, key), version=version)
    async with serving(loop, endpoint, context):
        said = report(await s_client(endpoint, "-showcerts"))
    assert said.count(b"BEGIN CERTIFICATE") > 100


@over("tcp")
async def test_s_client_resumes_its_session_on_each_reconnection(loop, endpoint):
    context = tls.authority().context_server(version=tls.TLS_1_2)
    async with serving(loop, endpoint, context):
        said = report(await s_client(endpoint, "-reconnect"))
    assert said.count(b"New, TLSv1.2") == 1 and said.count(b"Reused, TLSv1.2") == 5
    reused = [protocol.transport.get_extra_info("ssl_object").session_reused for protocol in endpoint.accepted]
    assert reused == [False] + 5 * [True]


@over("tcp")
@tls.versions
async def test_s_client_resumes_a_session_that_it_kept(loop, endpoint, version, tmp_path):
    ticket = tmp_path / "ticket"
    async with serving(loop, endpoint, tls.authority().context_server(version=version)):
        first = report(await s_client(endpoint, "-sess_out", ticket))
        second = report(await s_client(endpoint, "-sess_in", ticket))
    assert b"New, TLS" in first and b"Reused, TLS" in second
    assert endpoint.accepted[1].transport.get_extra_info("ssl_object").session_reused


@over("tcp")
@tls.versions
async def test_s_client_identifies_itself(loop, endpoint, version):
    context = tls.authority().context_server(version=version, verify_client=True)
    certificate, key = tls.authority().client_pair()
    async with serving(loop, endpoint, context):
        report(await s_client(endpoint, "-cert", certificate, "-key", key))
    assert (("commonName", "client"),) in endpoint.accepted[0].transport.get_extra_info("peercert")["subject"]


@over("tcp")
@tls.versions
async def test_s_client_without_its_certificate_learns_why_it_is_refused(loop, endpoint, version):
    context = tls.authority().context_server(version=version, verify_client=True)
    async with serving(loop, endpoint, context):
        refused = await s_client(endpoint)
    assert refused.returncode != 0
    expected = b"alert handshake failure" if version == tls.TLS_1_2 else b"alert certificate required"
    assert expected in refused.stderr, refused.stderr
    assert endpoint.accepted[0].log == []


@over("tcp")
async def test_s_client_renews_its_keys_in_mid_connection(loop, endpoint):
    context = tls.authority().context_server(version=tls.TLS_1_3, ktls=False)
    async with serving(loop, endpoint, context, helpers.Recorder):
        with helpers.Service(s_client_args(endpoint), ready=lambda _: True, talkative=True) as client:
            await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].made.done())
            accepted = endpoint.accepted[0]
            for turn in range(4):
                # A KeyUpdate, or one that wants ours in return.
                client.output = ""
                await client.say(b"k\n" if turn % 2 else b"K\n")
                await client.heard("KEYUPDATE")
                await client.say(b"line %d\n" % turn)
                await accepted.received(7 * (turn + 1))
                accepted.transport.write(b"answer %d\n" % turn)
                await client.heard(f"answer {turn}\n")
            accepted.transport.close()
            await accepted.lost
    assert bytes(accepted.data) == b"line 0\nline 1\nline 2\nline 3\n"


# --------------------------------------------------------------------------
# s_server


@tls.versions
async def test_s_server_answers(loop, version):
    context = tls.authority().context_client(version=version, alpn=["spdy", "h2"])
    with s_server("-rev", "-alpn", "http/1.1,h2") as service:
        transport, protocol = await connect(loop, service, context)
        assert transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        for count in range(1, 20):
            transport.write(b"hello\n")
            assert await protocol.received(6 * count) == b"olleh\n" * count
        transport.close()
        assert await protocol.lost is None


@tls.versions
async def test_a_file_of_s_servers_arrives_whole(loop, version, tmp_path):
    (tmp_path / "file").write_bytes(b"HTTP/1.0 200 OK\r\n\r\n" + MEGABYTES)
    context = tls.authority().context_client(version=version)
    with s_server("-HTTP", cwd=tmp_path) as service:
        transport, protocol = await connect(loop, service, context)
        transport.write(b"GET /file HTTP/1.0\r\n\r\n")
        assert await protocol.lost is None
    assert bytes(protocol.data) == b"HTTP/1.0 200 OK\r\n\r\n" + MEGABYTES
    assert protocol.log == ["made", "data", "eof", "lost"]


@pytest.mark.parametrize(
    "options",
    [
        ["-cipher", "ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0", "-tls1_2"],
        ["-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305", "-tls1_2"],
        ["-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256", "-tls1_3"],
        ["-max_send_frag", "512"],
        ["-tls1_3", "-record_padding", "1000"],
        ["-tls1_3", "-groups", "P-521"],
    ],
    ids=" ".join,
)
async def test_whatever_s_server_wants_its_file_arrives_whole(loop, tmp_path, options):
    (tmp_path / "file").write_bytes(MEGABYTES)
    context = tls.authority().context_client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with s_server("-HTTP", *options, cwd=tmp_path) as service:
        transport, protocol = await connect(loop, service, context)
        transport.write(b"GET /file HTTP/1.0\r\n\r\n")
        assert await protocol.lost is None
    assert bytes(protocol.data) == MEGABYTES


@tls.versions
async def test_we_identify_ourselves_to_s_server(loop, version):
    context = tls.authority().context_client(version=version, pair=tls.authority().client_pair())
    with s_server("-rev", "-Verify", "1", "-verify_return_error", "-CAfile", tls.authority().cafile) as service:
        transport, protocol = await connect(loop, service, context)
        transport.write(b"hello\n")
        assert await protocol.received(6) == b"olleh\n"
        transport.close()
        await protocol.lost
        await service.heard("client\n")


async def test_s_server_refuses_us_without_a_certificate(loop):
    """In TLS 1.3 the refusal comes when the handshake is over for us."""
    with s_server("-rev", "-Verify", "1", "-verify_return_error", "-CAfile", tls.authority().cafile) as service:
        with pytest.raises(ssl.SSLError, match="(?i)handshake failure"):
            await connect(loop, service, tls.authority().context_client(version=tls.TLS_1_2))
        _, protocol = await connect(loop, service, tls.authority().context_client(version=tls.TLS_1_3))
        with pytest.raises(ssl.SSLError, match="(?i)certificate required"):
            raise await protocol.lost


refused = pytest.mark.parametrize(
    "certificate, hostname, reason, alert",
    [
        ("pair", "other.test", "not valid for 'other.test'", "bad certificate"),
        ("expired", "localhost", "certificate has expired", "certificate expired"),
        ("self_signed", "localhost", "self.signed certificate", "unknown ca"),
    ],
)


@tls.versions
@refused
async def test_s_server_learns_why_we_refuse_it(loop, version, certificate, hostname, reason, alert):
    with s_server("-rev", pair=getattr(tls.authority(), certificate)()) as service:
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            await connect(loop, service, tls.authority().context_client(version=version), hostname)
        await service.heard(f"alert {alert}")


commands = pytest.mark.parametrize(
    "version, key",
    [
        pytest.param(tls.TLS_1_3, b"k\n", id="KeyUpdate"),
        pytest.param(tls.TLS_1_3, b"K\n", id="KeyUpdate-in-return"),
        pytest.param(tls.TLS_1_3, b"c\n", id="post-handshake-authentication"),
        pytest.param(tls.TLS_1_2, b"r\n", id="renegotiation"),
    ],
)


def ready_for_commands(version, key):
    # Not all kernels follow new keys: test_ktls_new_keys.py has what becomes of that.
    may_ktls = None if key == b"c\n" else False
    context = tls.authority().context_client(version=version, pair=tls.authority().client_pair(), ktls=may_ktls)
    if version == tls.TLS_1_3:
        context.post_handshake_auth = True
    return context


@commands
async def test_data_goes_on_after_what_s_server_does_in_mid_connection(loop, version, key):
    with s_server("-CAfile", tls.authority().cafile, talkative=True) as service:
        transport, protocol = await connect(loop, service, ready_for_commands(version, key))
        for turn in range(3):
            await service.say(key)
            await service.say(b"hello\n")
            assert await protocol.received(6 * (turn + 1)) == b"hello\n" * (turn + 1)
            transport.write(b"line %d\n" % turn)
            await service.heard(f"line {turn}\n")
        assert service.output.count("SSL_do_handshake -> 1\n") == 3
        if key == b"c\n":
            assert "client\n" in service.output
        transport.close()
        await protocol.lost


@commands
async def test_nothing_is_lost_when_s_server_does_it_while_we_send(loop, version, key):
    with s_server("-CAfile", tls.authority().cafile, talkative=True) as service:
        transport, protocol = await connect(loop, service, ready_for_commands(version, key))
        for _ in range(10):
            for size in range(1, 200):
                transport.write(b"#" * size + b"\n")
            await service.say(key)
        await helpers.eventually(lambda: service.read_output().count("#") == 10 * sum(range(1, 200)))
        # OpenSSL refuses some that come too early after the last.
        await service.heard("SSL_do_handshake -> 1\n")
        await service.say(b"hello\n")
        assert await protocol.received(6) == b"hello\n"
        transport.close()
        await protocol.lost
