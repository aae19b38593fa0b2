"""Which record layer serves the TLS connections of a loop."""

from aiouringnet.engine import import_error, options_of

OpenSSLRecords = SSLRecords = None
if import_error is None:
    from aiouringnet.tls import openssl
    from aiouringnet.tls.records import SSLRecords


def records_class(loop):
    """The class of the record layer that a loop's options choose; RuntimeError when it cannot be had."""
    choice = options_of(loop).tls
    if choice == "ssl":
        return SSLRecords
    if openssl.why_not is None:
        return openssl.OpenSSLRecords
    if choice == "openssl":
        raise RuntimeError(f"tls='openssl' was asked for, but it is not usable: {openssl.why_not}")
    return SSLRecords


def why_not_openssl():
    """Why OpenSSL's functions are not called directly, None where they are."""
    return str(import_error) if import_error is not None else openssl.why_not
