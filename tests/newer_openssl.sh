#!/usr/bin/env bash
# Makes an environment like PYTHON's whose ssl module and openssl command are OpenSSL 3.5:
#
#   bash tests/newer_openssl.sh DIR [PYTHON]           PYTHON: .venv/bin/python
#   bash tests/run.sh --kernel-runner 'PYTHON=DIR/bin/python vng -r v6.12 --'
#   DIR/bin/python -m pytest tests/test_ktls*.py       on a kernel that has TLS
#
# For Debian 12 and Ubuntu 24.04, whose OpenSSL 3.0 gives only half of TLS 1.3 to
# the kernel. The libraries are Debian 13's, with the C library that they need;
# they are unpacked into DIR, and nothing is installed. DIR/bin/python is PYTHON's
# interpreter under the other C library's loader, with PYTHON's packages; so are
# the children that it starts. A DIR that is there already is left as it is.
#
#   DEBIAN_MIRROR=http://...       instead of the archive that apt here uses for Debian;
#                                  to be named where it uses none (Ubuntu)
set -euo pipefail

SUITE=trixie
PACKAGES=(libssl3t64 openssl libc6 zlib1g libzstd1)
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

die() {
    printf 'newer_openssl.sh: %s\n' "$*" >&2
    exit 1
}

[ $# -ge 1 ] || die "where to? newer_openssl.sh DIR [PYTHON]"
dir=$(realpath -m "$1")
python=${2:-$(dirname "$(realpath "$0")")/../.venv/bin/python}

[ ! -e "$dir" ] || { [ -e "$dir/bin/python" ] && exit 0; } || die "$dir is in the way"
"$python" -c 'import ssl' 2>/dev/null || die "$python is no Python with an ssl module"
if "$python" -c 'import ssl, sys; sys.exit(ssl.OPENSSL_VERSION_INFO < (3, 5))'; then
    die "nothing to do: $python has $("$python" -c 'import ssl; print(ssl.OPENSSL_VERSION)')"
fi
"$python" -c 'import _ssl; _ssl.__file__' 2>/dev/null || die "$python has its OpenSSL built in: it has no other"
command -v apt-get >/dev/null || die "the libraries come from Debian's archive, by apt-get, which is not here"
[ -r $KEYS ] || die "$KEYS, which apt checks the packages with, is not here: apt-get install debian-archive-keyring"

# Whole or not at all.
new=$dir.new
trap 'rm -rf "$new"' EXIT
rm -rf "$new"
mkdir -p "$new"/apt/{etc/apt,var/lib/apt/lists/partial,var/cache/apt/archives/partial,debs} "$new"/{tree,bin}

# An apt of its own: no list, source or package of the machine's is touched.
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | head -n 1)}
apt=$new/apt
[ -n "$mirror" ] || die "apt here uses no archive of Debian's: name one in DEBIAN_MIRROR"
echo "deb [signed-by=$KEYS] $mirror $SUITE main" >"$apt/etc/apt/sources.list"
: >"$apt/status"
own=(-oDir="$apt" -oDir::State::status="$apt/status" -oAPT::Sandbox::User="$(id -un)" -q)
for step in update "download ${PACKAGES[*]}"; do
    # shellcheck disable=SC2086
    (cd "$apt/debs" && apt-get "${own[@]}" $step) >"$apt/log" 2>&1 || {
        tail -n 5 "$apt/log" >&2
        die "Debian's archive, at $mirror, did not give its packages of $SUITE; see DEBIAN_MIRROR"
    }
done
for package in "$apt"/debs/*.deb; do
    dpkg-deb -x "$package" "$new/tree"
done
rm -rf "$apt"

# The loader and the libraries, wherever this architecture has them.
loader=$(cd "$new/tree" && find usr -name 'ld-linux*.so.*' -type f -print -quit)
libraries=$(cd "$new/tree" && find usr -name 'libssl.so.3' -printf '%h\n' -quit)
[ -n "$loader" ] && [ -n "$libraries" ] || die "Debian's packages are not as expected"

under_loader() { # program: a command that runs it
    cat <<END
#!/bin/sh
PATH="$dir/bin:\$PATH" exec "$dir/tree/$loader" --library-path "$dir/tree/$libraries" --argv0 "\$0" "$1" "\$@"
END
}
interpreter=$(realpath "$("$python" -c 'import sys; print(sys.executable)')")
under_loader "$interpreter" >"$new/bin/python"
under_loader "$dir/tree/usr/bin/openssl" >"$new/bin/openssl"
chmod +x "$new"/bin/*

# What makes it a virtual environment: Python finds this next to what it was called as.
"$python" - "$new" <<'END'
import sys, sysconfig
from pathlib import Path

new, version = Path(sys.argv[1]), f"python{sys.version_info[0]}.{sys.version_info[1]}"
(new / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n")
(new / "lib" / version).mkdir(parents=True)
(new / "lib" / version / "site-packages").symlink_to(sysconfig.get_path("purelib"))
END
mv "$new" "$dir"
"$dir/bin/python" -c 'import ssl, sys; sys.exit(ssl.OPENSSL_VERSION_INFO < (3, 5))' ||
    die "$dir/bin/python still has another OpenSSL"
