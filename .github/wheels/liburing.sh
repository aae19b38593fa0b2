#!/usr/bin/env bash
# Builds the liburing that is inside the wheels: liburing.sh PREFIX
#
# It is upstream's unmodified source, as Debian keeps and signs it, in the version that Debian 13 has.
# Static, not vendored by auditwheel: what we use of it is 20 KiB that have no state, so no second library is to be
# found, patched and loaded; and hidden, so that another liburing of the process and ours do not meet.
# setup.py finds it as it finds the system's, by pkg-config: PKG_CONFIG_PATH=PREFIX/lib/pkgconfig.
set -euo pipefail

version=2.9
sha256=57e9b36e4ac1e46b8e0351dfb1694dc59638fc25e384b4ba36d87b800b16db1a
# Whichever answers; the second keeps what the first gives up.
sources=(
    "http://deb.debian.org/debian/pool/main/libu/liburing/liburing_$version.orig.tar.gz"
    "https://snapshot.debian.org/file/3fb172d64d5be70c79e1b93d963888dfac5a4653"
)

[ $# = 1 ] || { echo "usage: liburing.sh PREFIX" >&2; exit 2; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

for source in "${sources[@]}"; do
    ! curl -fsSL --retry 3 --max-time 300 -o liburing.tar.gz "$source" || break
done
echo "$sha256  liburing.tar.gz" | sha256sum -c - >&2
tar -xzf liburing.tar.gz --strip-components=1

# Not -nolibc, which is liburing's way on some machines and an option on others: one code for all.
./configure --prefix="$prefix" --libdir="$prefix/lib" --use-libc >configure.log
make -s -C src CFLAGS="-O3 -g -Wall -Wextra -fPIC -fvisibility=hidden" liburing.a
make -s liburing.pc
# Not `make install`, which installs the shared library and manual pages, too.
mkdir -p "$prefix/include/liburing" "$prefix/lib/pkgconfig" "$prefix/share/licenses/liburing"
cp src/liburing.a "$prefix/lib/"
cp src/include/liburing.h "$prefix/include/"
cp src/include/liburing/*.h "$prefix/include/liburing/"
cp liburing.pc "$prefix/lib/pkgconfig/"
cp LICENSE "$prefix/share/licenses/liburing/"
# For repair.py, which says in the wheel what is in it.
printf '%s %s %s\n' "$version" "$sha256" "${sources[0]}" >"$prefix/share/licenses/liburing/origin"
echo "liburing $version is in $prefix" >&2
