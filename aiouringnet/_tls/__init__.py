"""Which record layer serves the TLS connections of a loop."""

import dataclasses
import os

from aiouringnet._engine import options_of

try:
    import ssl
except ImportError:
    ssl = None

import_error = None
try:
    from aiouringnet._tls import openssl, records, symbols
except ImportError as exc:  # not built, or a Python without ssl
    import_error = exc


@dataclasses.dataclass(frozen=True)
class OpenSSLDynLibs:
    """The shared libraries of the OpenSSL that the ssl module uses: aiouringnet.OPENSSL_DYN_LIBS."""

    libssl: str
    libcrypto: str

    @property
    def libssl_path(self) -> bytes:
        return os.fsencode(self.libssl)

    @property
    def libcrypto_path(self) -> bytes:
        return os.fsencode(self.libcrypto)


def openssl_libraries():
    """None where OpenSSL's functions cannot be called directly."""
    return OpenSSLDynLibs(*symbols.library_files()) if why_not_openssl() is None else None


def record_layer(loop):
    """What makes the record layers that a loop's options choose; RuntimeError when it cannot be had."""
    choice = options_of(loop).tls
    if choice == "ssl":
        return records.make_records
    if openssl.why_not is None:
        return openssl.make_records
    if choice == "openssl":
        raise RuntimeError(f"tls='openssl' was asked for, but it is not usable: {openssl.why_not}")
    return records.make_records


def why_not_ktls(choice="auto"):
    """Why OpenSSL does not hand its keys to the kernel, None where it does: a sentence and what would help."""
    reason = why_not_openssl(choice)
    if reason is not None:
        return reason, None
    if not openssl.knows_ktls:
        return (
            f"the ssl module's OpenSSL ({ssl.OPENSSL_VERSION}) was built without kTLS",
            "Use a Python that is linked with a system OpenSSL 3 (Debian 12, Ubuntu 22.04 and newer have kTLS in it).",
        )
    return None, None


def why_not_openssl(choice="auto"):
    """Why a loop with the option tls=choice does not call OpenSSL's functions directly, None where it does."""
    if import_error is not None:
        return f"the extension module cannot be imported: {import_error}"
    if choice == "ssl":
        return "the 'ssl' engine was asked for (option tls or AIOURINGNET_TLS)"
    return openssl.why_not
