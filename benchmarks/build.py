"""Compiles the C programs of the benchmarks into benchmarks/build/, and makes the certificate for TLS there.

`python benchmarks/build.py` compiles what is out of date; run.py does the same by itself.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"
CFLAGS = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow"]
PROGRAMS = ("loadgen", "echo_server")
# The same sources with OpenSSL: programs of their own, so that the plain ones need no OpenSSL and pay nothing for it.
TLS_PROGRAMS = tuple(f"{name}_tls" for name in PROGRAMS)
LIBRARIES = {"ring_ways": ["-luring", "-lpthread"]}
CERTIFICATE_DAYS = 3650


def program(name: str) -> pathlib.Path:
    """Path of a compiled program, compiled first when its source is newer."""
    with_tls = name in TLS_PROGRAMS
    source, target = HERE / f"{name.removesuffix('_tls')}.c", BUILD / name
    sources = [source, HERE / "tls_wire.h"] if with_tls else [source]
    if target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return target
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("The benchmarks need a C compiler: install gcc (Debian, Ubuntu: apt install gcc libc6-dev).")
    BUILD.mkdir(exist_ok=True)
    # Renamed into place, so that two runs at once never execute half a file.
    partial = target.with_suffix(f".{os.getpid()}")
    define, libraries = (["-DWITH_TLS"], ["-lssl", "-lcrypto"]) if with_tls else ([], LIBRARIES.get(name, []))
    subprocess.run([compiler, *CFLAGS, *define, "-o", str(partial), str(source), *libraries], check=True)
    partial.replace(target)
    return target


def why_not_tls() -> str | None:
    """What is missing for the TLS cells, in a sentence; None when all is there, compiled and made."""
    try:
        certificate()
        for name in TLS_PROGRAMS:
            program(name)
    except FileNotFoundError as why:
        return str(why)
    except subprocess.CalledProcessError as why:
        if why.cmd[0].endswith("openssl"):
            return f"openssl made no certificate: {why.stderr.strip().splitlines()[-1]}"
        hint = "are its headers there? (Debian, Ubuntu: apt install libssl-dev)"
        return f"the C programs do not compile with OpenSSL: {hint}"
    return None


def certificate() -> tuple[pathlib.Path, pathlib.Path]:
    """A self-signed certificate with an ECDSA P-256 key, made once: what most servers have today."""
    cert, key = BUILD / "cert.pem", BUILD / "key.pem"
    if cert.exists() and key.exists():
        return cert, key
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError(
            "the openssl command, which makes the certificate, is not installed (Debian, Ubuntu: apt install openssl)"
        )
    BUILD.mkdir(exist_ok=True)
    partial = [path.with_suffix(f".{os.getpid()}") for path in (cert, key)]
    subprocess.run(
        [
            openssl,
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-days",
            str(CERTIFICATE_DAYS),
            "-out",
            str(partial[0]),
            "-keyout",
            str(partial[1]),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    # The key first: two runs at once may leave one's key with the other's certificate only for an instant.
    partial[1].replace(key)
    partial[0].replace(cert)
    return cert, key


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each))
    missing = why_not_tls()
    print(f"no TLS: {missing}" if missing else "\n".join(str(program(each)) for each in TLS_PROGRAMS))
    sys.exit(0)
