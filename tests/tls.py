"""What the TLS tests share: an authority of their own, its certificates, and SSLContexts.

    authority().context_server()                  "localhost" and 127.0.0.1
    authority().context_server("other.test")      another host
    authority().context_client()                  trusts the authority, checks names
    authority().pair("localhost")                 (certificate file, key file)
    authority().client_pair()                     for a client that identifies itself
    authority().expired(), .self_signed()         what a client must refuse

The openssl command makes each certificate when it is first asked for, once in a
session. Contexts are new in every call, so that a test may change its own.

    authority().context_server(ktls=True)         asks for kernel TLS; so do all in a session with --ktls

    pytestmark = tls.needs_openssl                            a module that asks for any of this
    pytestmark = pytest.mark.usefixtures("tls_engine")        its tests run on both record engines
"""

import atexit
import functools
import itertools
import shutil
import ssl
import subprocess
import tempfile
from pathlib import Path

import pytest

TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
versions = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["1.2", "1.3"])

# Python has the name since 3.12.
OP_ENABLE_KTLS = 8

# What contexts do that are not told: set by the option --ktls.
ask_for_ktls = False

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the openssl command, which makes the certificates, is not installed"
)

# Python's default context is strict since 3.13: it wants all of these extensions.
EXTENSIONS = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = CA:false
keyUsage = digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
[client]
basicConstraints = CA:false
keyUsage = digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@functools.cache
def authority():
    """The session's authority: what it signs, authority().context_client() trusts."""
    folder = Path(tempfile.mkdtemp(prefix="aiouringnet-tls-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Authority(folder)


class Authority:
    def __init__(self, folder):
        self.folder = folder
        self.serials = itertools.count(1)
        self.made = {}
        self.cafile, self.cakey = self._made("authority", "authority", signed=False)

    # --- certificates: (certificate file, key file) ---------------------------

    def pair(self, name="localhost"):
        """For a server of that name; "localhost" is 127.0.0.1 and ::1, too."""
        return self._made(f"server-{name}", "server", name)

    def expired(self):
        """For localhost, and no longer valid."""
        return self._made("expired", "server", "localhost", days=0)

    def self_signed(self):
        """For localhost, by nobody that anybody knows."""
        return self._made("self-signed", "server", "localhost", signed=False)

    def client_pair(self, name="client"):
        """For a client; `name` is the certificate's common name."""
        return self._made(f"client-{name}", "client", name)

    def _made(self, label, section, name="authority", **options):
        if label not in self.made:
            self.made[label] = self._make(label, section, name, **options)
        return self.made[label]

    def _make(self, label, section, name, days=2, signed=True):
        certificate, key, request, config = (self.folder / f"{label}.{end}" for end in ("crt", "key", "csr", "cnf"))
        names = f"DNS:{name}" + (", IP:127.0.0.1, IP:::1" if name == "localhost" else "")
        config.write_text(EXTENSIONS.format(names=names))
        run_openssl(
            *("req", "-new", "-config", config, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request),
        )
        signer = ("-CA", self.cafile, "-CAkey", self.cakey) if signed else ("-signkey", key)
        run_openssl(
            *("x509", "-req", "-sha256", "-in", request, *signer, "-set_serial", next(self.serials)),
            *("-extfile", config, "-extensions", section, "-days", days, "-out", certificate),
        )
        return str(certificate), str(key)

    # --- contexts -------------------------------------------------------------

    def context_server(self, name="localhost", *, pair=None, verify_client=False, alpn=None, version=None, ktls=None):
        """A server's SSLContext.

        pair: another certificate, such as expired().
        verify_client: want a certificate that this authority has signed.
        alpn: the protocols that it speaks. version: the only one, TLS_1_2 or TLS_1_3.
        ktls: ask for kernel TLS; False: not even where all tests do.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*(pair or self.pair(name)))
        if verify_client:
            context.load_verify_locations(self.cafile)
            context.verify_mode = ssl.CERT_REQUIRED
        return _limited(context, alpn, version, ktls)

    def context_client(self, *, pair=None, alpn=None, version=None, ktls=None):
        """A client's SSLContext that trusts this authority. pair: its own certificate, such as client_pair()."""
        context = ssl.create_default_context(cafile=self.cafile)
        if pair:
            context.load_cert_chain(*pair)
        return _limited(context, alpn, version, ktls)


def _limited(context, alpn, version, ktls):
    if ask_for_ktls if ktls is None else ktls:
        context.options |= OP_ENABLE_KTLS
    if alpn:
        context.set_alpn_protocols(alpn)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


def run_openssl(*args):
    """Runs the openssl command; its complaint becomes the exception's text."""
    done = subprocess.run(
        ["openssl", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")
