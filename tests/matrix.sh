#!/usr/bin/env bash
# Runs the suite in another place than this checkout with its first Python: a column of the matrix.
#
#   bash tests/matrix.sh 3.12                  the whole suite on that Python: of the PATH's, of pyenv's, else Debian's
#   bash tests/matrix.sh 3.14 -m 'not slow'    further arguments go to pytest
#   bash tests/matrix.sh debian-bookworm       in a fresh Debian: 12, with its Python 3.11 and OpenSSL 3.0
#   bash tests/matrix.sh debian-trixie         13: Python 3.13, OpenSSL 3.5
#   bash tests/matrix.sh debian-sid            what comes next: the newest Python that it has
#   bash tests/matrix.sh 3.14t                 free-threaded, built from Debian's source package; 3.13t likewise
#   bash tests/matrix.sh tsan                  a free-threaded Python and the extensions built for ThreadSanitizer:
#                                              the tests of threads; a data race in our modules fails it
#   bash tests/matrix.sh static-openssl        a Python into which OpenSSL is linked statically: the tests of TLS
#   bash tests/matrix.sh aarch64               Debian 13 for ARM, emulated: builds there, and the epoll engine's tests
#
# A column has a copy of the checkout, an environment and what it took to make them, in
# AIOURINGNET_MATRIX (~/.cache/aiouringnet-matrix): the first run takes long, the next ones do not.
# Columns of Debian need root, a network and Debian's archive. Several may run at once.
#
#   DEBIAN_MIRROR=http://...   instead of the archive that apt here uses for Debian
#   PYTHON_SOURCE=DIR          sources of CPython, instead of Debian's source package
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
column=${1:-}
[ -n "$column" ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
shift
place=$(realpath -m "${AIOURINGNET_MATRIX:-${XDG_CACHE_HOME:-$HOME/.cache}/aiouringnet-matrix}/$column")
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
# What free-threaded and emulated Pythons get: no package of these is compiled.
PURE=(pip 'setuptools>=77' 'cython>=3.1' 'pytest>=8' 'pytest-asyncio>=1.4' 'pytest-xdist>=3.2' dnspython nest_asyncio)

say() { printf '%s\n' "$*" >&2; }
die() {
    say "matrix.sh $column: $*"
    exit 1
}
quietly() { # what it is; its output is shown only if it fails
    local what=$1
    shift
    mkdir -p "$place"
    "$@" >"$place/log" 2>&1 </dev/null || { tail -n 30 "$place/log" >&2; die "$what failed"; }
}

copy_checkout() { # DIR: as it is here, changes included; what was built there before stays
    mkdir -p "$1"
    if [ -e "$1/.copied" ]; then
        (cd "$1" && xargs -0 -r rm -f) <"$1/.copied"
    fi
    (cd "$here" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do
        [ ! -e "$name" ] || printf '%s\0' "$name"
    done) >"$1/.copied"
    (cd "$here" && tar --null -T "$1/.copied" -cf -) | tar -C "$1" -xf -
    # What was built of modules that are no more.
    find "$1/aiouringnet" \( -name '*.c' -o -name '*.so' \) | while IFS= read -r built; do
        local name=${built##*/}
        [ -e "${built%/*}/${name%%.*}.pyx" ] || rm "$built"
    done
}

# --- Debian's archive ---------------------------------------------------------------

mirror() {
    command -v apt-get >/dev/null || die "this takes Debian's archive, by apt-get, which is not here"
    [ -r $KEYS ] || die "$KEYS, which packages are checked with, is not here: apt-get install debian-archive-keyring"
    local found=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' |
        head -n 1)}
    [ -n "$found" ] || die "apt here uses no archive of Debian's: name one in DEBIAN_MIRROR"
    printf '%s\n' "$found"
}
needs_root() {
    [ "$(id -u)" = 0 ] || die "making another Debian (debootstrap, chroot, mounts) is root's alone: this is not"
}
needs_packages() { # package...
    local missing=() package
    for package in "$@"; do
        dpkg -s "$package" 2>/dev/null | grep -q '^Status: .* installed$' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "packages are missing, and this is not root: apt-get install ${missing[*]}"
    say "Installing system packages: ${missing[*]}"
    apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1 || true
    quietly "apt-get install ${missing[*]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 install "${missing[@]}"
}

make_debian() { # suite [--arch=... package...]: in $place/root, whole or not at all
    local suite=$1 url root=$place/root arch=() packages
    shift
    case ${1:-} in --arch=*) arch=("$1") && shift ;; esac
    packages=$(IFS=, && echo "ca-certificates,debian-archive-keyring$(printf ',%s' "$@")")
    needs_root
    [ ! -e "$root" ] || return 0
    url=$(mirror)
    needs_packages debootstrap
    rm -rf "$root.new"
    say "Making a Debian $suite from $url"
    # A suite that this debootstrap has not heard of is made like sid.
    local script=/usr/share/debootstrap/scripts/$suite
    [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
    quietly "debootstrap $suite" debootstrap --variant=minbase --keyring=$KEYS "${arch[@]}" \
        --include="${packages%,}" "$suite" "$root.new" "$url" "$script"
    # What this machine needs to reach the archive and the package index.
    local name
    for name in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
        [ ! -e "$name" ] || cp -L "$name" "$root.new$name"
    done
    # Of apt's settings, too: a proxy, or that a mirror's lists may be older than they are meant to get.
    apt-config dump | grep -E '^Acquire::(Check-|https?::Proxy )' >"$root.new/etc/apt/apt.conf.d/99matrix" || true
    mv "$root.new" "$root"
}
inside() { # command...: in the column's Debian, with mounts that end with it
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -ec '
        root=$1; shift
        for name in proc sys dev dev/pts dev/shm; do
            [ ! -d "/$name" ] || { mkdir -p "$root/$name"; mount --rbind "/$name" "$root/$name"; }
        done
        variables=(HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
        while IFS= read -r -d "" line; do
            case $line in
                PIP_FIND_LINKS=*) ;;
                PIP_* | *_proxy=* | *_PROXY=* | AIOURINGNET_* | PYTHON=*) variables+=("$line") ;;
            esac
        done < <(env -0)
        exec env -i "${variables[@]}" chroot "$root" "$@"' inside "$place/root" "$@"
}
suite_in_debian() { # suite [Python]: the rest goes to pytest
    local suite=$1 python=$2
    shift 2
    make_debian "$suite"
    copy_checkout "$place/root/root/checkout"
    inside apt-get -qq update >/dev/null
    if [ "$python" = newest ]; then
        python=$(inside apt-cache pkgnames python3. | grep -E '^python3\.[0-9]+$' | sort -V | tail -n 1)
    fi
    if [ -n "$python" ]; then
        quietly "installing $python" inside env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
            install "$python-dev" "$python-venv" "lib$python-testsuite"
    fi
    PYTHON=$python inside bash -c 'cd ~/checkout && exec bash tests/run.sh "$@"' run "$@"
}

# --- Pythons ------------------------------------------------------------------------

python_named() { # version: where it is
    local found
    for found in "$(command -v "python$1" || true)" \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1" /usr/local/bin/"python$1"; do
        if [ -n "$found" ] && "$found" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$found"
            return
        fi
    done
    return 1
}

source_of() { # version: CPython's sources of it, in $place/source
    [ ! -e "$place/source/configure" ] || return 0
    mkdir -p "$place"
    if [ -n "${PYTHON_SOURCE:-}" ]; then
        [ -e "$PYTHON_SOURCE/configure" ] || die "PYTHON_SOURCE=$PYTHON_SOURCE has no sources of CPython"
        cp -a "$PYTHON_SOURCE" "$place/source"
        return
    fi
    local url apt=$place/apt suite
    url=$(mirror)
    rm -rf "$apt" "$place/source.new"
    mkdir -p "$apt"/{etc/apt,var/lib/apt/lists/partial,var/cache/apt/archives/partial} "$place/source.new"
    : >"$apt/status"
    local own=(-oDir="$apt" -oDir::State::status="$apt/status" -oAPT::Sandbox::User="$(id -un)" -q)
    for suite in sid forky trixie; do
        echo "deb-src [signed-by=$KEYS] $url $suite main" >"$apt/etc/apt/sources.list"
        apt-get "${own[@]}" update >"$place/log" 2>&1 || continue
        if (cd "$apt" && apt-get "${own[@]}" source --tar-only --download-only "python$1") >>"$place/log" 2>&1; then
            tar -C "$place/source.new" --strip-components=1 -xf "$apt"/python*.orig.tar.*
            mv "$place/source.new" "$place/source"
            rm -rf "$apt"
            return
        fi
    done
    rm -rf "$apt" "$place/source.new"
    return 1
}

build_python() { # version, options of configure...: $place/python
    local version=$1 python
    shift
    python=$place/python/bin/python${version}
    [ ! -x "$python" ] || return 0
    needs_packages build-essential pkg-config liburing-dev libssl-dev zlib1g-dev libffi-dev libbz2-dev liblzma-dev \
        libsqlite3-dev
    source_of "${version%t}" || {
        tail -n 3 "$place/log" >&2
        die "Debian's archive does not give the source package python${version%t}: name sources in PYTHON_SOURCE"
    }
    say "Building Python $version ($*)"
    rm -rf "$place/build" "$place/python"
    mkdir "$place/build"
    cd "$place/build"
    quietly configure ../source/configure -q --prefix="$place/python" "$@"
    # Compiled once, not for each level of optimisation.
    sed -i 's/-o 0 -o 1 -o 2 /-o 0 /' Makefile
    quietly make make -s -j"$(nproc)"
    quietly 'make install' make -s altinstall
    cd "$here"
}

pure_environment() { # Python: $place/venv, by another Python's pip, since this one may be very slow
    local python
    if [ ! -e "$place/venv/complete" ]; then
        quietly venv "$1" -m venv --without-pip --clear "$place/venv"
        python=$(command -v python3) && "$python" -m pip --version >/dev/null 2>&1 || die "there is no python3 with pip"
        # (pip's --python would have this one run pip.)
        quietly 'pip install' "$python" -m pip install -q --target "$(echo "$place"/venv/lib/python3.*/site-packages)" \
            --python-version "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" --only-binary :all: \
            --implementation py --abi none --platform any "${PURE[@]}"
        : >"$place/venv/complete"
    fi
    copy_checkout "$place/checkout"
}
build_extensions() {
    local helper
    say "Building aiouringnet"
    cd "$place/checkout"
    if helper=$(python_named 3.13 || python_named 3.12 || python_named 3.11); then
        # Where Python is slow (the sanitizer) Cython takes long: another Python runs the same one, compiling nothing.
        CC=true LDSHARED=true PYTHONPATH=$(echo "$place"/venv/lib/python3.*/site-packages) \
            quietly Cython "$helper" setup.py -q build_ext --build-temp "$place/none" --build-lib "$place/none"
    fi
    quietly build_ext "$place/venv/bin/python" setup.py -q build_ext --inplace -j"$(nproc)"
}

# --- Columns ------------------------------------------------------------------------

free_threaded() { # version
    build_python "$1" --disable-gil
    pure_environment "$place/python/bin/python$1"
    build_extensions
}

case $column in
    3.1[0-9])
        if python=$(python_named "$column"); then
            copy_checkout "$place"
            cd "$place"
            PYTHON=$python exec bash tests/run.sh "$@"
        fi
        case $column in
            3.11) suite_in_debian bookworm "" "$@" ;;
            3.13) suite_in_debian trixie "" "$@" ;;
            3.1[4-9]) suite_in_debian sid "python$column" "$@" ;;
            *) die "there is no python$column on the PATH or under pyenv, and no Debian has it" ;;
        esac
        ;;
    debian-sid) suite_in_debian sid newest "$@" ;;
    debian-*) suite_in_debian "${column#debian-}" "" "$@" ;;
    3.1[3-9]t)
        free_threaded "$column"
        cd "$place/checkout"
        exec "$place/venv/bin/python" -m pytest "$@" </dev/null
        ;;
    tsan)
        clang=$(apt-cache pkgnames clang- | grep -E '^clang-[0-9]+$' | sort -V | tail -n 1)
        [ -n "$clang" ] || die "this takes clang, and apt here has none"
        needs_packages "$clang" "libclang-rt-${clang#clang-}-dev" "llvm-${clang#clang-}"
        export CC=$clang
        # CPython's threads meet in memory that it knows to be harmless: its own list says where.
        version=3.14t
        if [ -z "${PYTHON_SOURCE:-}" ] && [ ! -e "$place/source" ] && ! source_of 3.14; then
            say "Debian's archive does not give the source package python3.14: with 3.13, then"
            version=3.13t
        fi
        [ ! -e "$place/source" ] || version=$(sed -n 's/^PYTHON_VERSION=//p; s/^VERSION=//p' "$place/source/configure" |
            grep -m 1 -oE '3\.[0-9]+')t
        CFLAGS="-g1 -O1" build_python "$version" --disable-gil --with-thread-sanitizer --disable-test-modules
        export TSAN_OPTIONS=report_bugs=0
        pure_environment "$place/python/bin/python$version"
        CFLAGS="-g1 -O1 -fsanitize=thread" LDFLAGS=-fsanitize=thread build_extensions
        rm -rf "$place/races"
        mkdir "$place/races"
        symbolizer=$(command -v "llvm-symbolizer-${clang#clang-}" || true)
        export TSAN_OPTIONS="suppressions=$place/source/Tools/tsan/suppressions_free_threading.txt"
        # The suite says what failed; what raced is judged here, by whether a module of ours is where it did.
        TSAN_OPTIONS+=" log_path=$place/races/race history_size=5 exitcode=0 external_symbolizer_path=$symbolizer"
        cd "$place/checkout"
        [ $# -gt 0 ] || set -- tests/test_free_threading.py
        status=0
        "$place/venv/bin/python" -m pytest -n 0 -p no:cacheprovider --patience 10 "$@" </dev/null |
            tee "$place/said" || status=$?
        if grep -qs '^SUMMARY: ThreadSanitizer' "$place"/races/*; then
            grep -hE '^(WARNING|SUMMARY)|^  [A-Z]|^    #[0-5] ' "$place"/races/* | cut -c 1-200
            say "Data races, whole in $place/races"
            status=1
        fi
        tail -n 1 "$place/said"
        exit "$status"
        ;;
    static-openssl)
        version=3.13
        PY_UNSUPPORTED_OPENSSL_BUILD=static build_python "$version" --disable-test-modules
        pure_environment "$place/python/bin/python$version"
        build_extensions
        # The ssl module is a shared library there, but OpenSSL's functions are no longer to be found in it.
        "$place/venv/bin/python" -c 'from aiouringnet._tls import openssl
assert "does not export" in (openssl.why_not or ""), openssl.why_not' || die "OpenSSL is not linked statically there"
        cd "$place/checkout"
        [ $# -gt 0 ] || set -- tests/test_tls_*.py tests/test_ktls_fallback.py tests/test_options.py
        exec "$place/venv/bin/python" -m pytest "$@" </dev/null
        ;;
    aarch64)
        needs_packages qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross
        needs_root
        # For as long as this runs the kernel runs ARM's programs by the emulator, which chroots need not have.
        formats=/proc/sys/fs/binfmt_misc
        [ -e $formats/register ] || mount -t binfmt_misc binfmt_misc $formats ||
            die "the kernel has no binfmt_misc here, by which it would run ARM's programs by the emulator"
        if ! grep -qs 'interpreter.*qemu-aarch64' $formats/*; then
            elf='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
            mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
            printf %s ":aiouringnet-aarch64:M::$elf:$mask:/usr/bin/qemu-aarch64-static:F" >$formats/register
            trap 'echo -1 >$formats/aiouringnet-aarch64' EXIT
        fi
        make_debian trixie --arch=arm64 python3 libpython3-dev liburing-dev libc6-dev openssl
        root=$place/root
        version=$(basename "$root"/usr/include/python3.*)
        pure_environment "$(python_named 3.13 || python_named 3.12 || command -v python3)"
        copy_checkout "$root/root/checkout"
        # Emulated, a compiler would take an hour: this machine's makes the same of them.
        say "Building aiouringnet"
        cd "$root/root/checkout"
        compiler="aarch64-linux-gnu-gcc --sysroot=$root -I$root/usr/include/$version"
        suffix=.cpython-${version//[a-z.]/}-aarch64-linux-gnu.so
        CC=$compiler LDSHARED="$compiler -shared" CFLAGS="-O1 -g0" SETUPTOOLS_EXT_SUFFIX=$suffix \
            quietly build_ext "$place/venv/bin/python" setup.py -q build_ext --inplace -j"$(nproc)"
        cd "$here"
        [ -d "$root/root/packages" ] || cp -r "$place"/venv/lib/python3.*/site-packages "$root/root/packages"
        # The emulator has no io_uring, which is a kernel's: a loop is told so, and has the epoll engine.
        [ $# -gt 0 ] || set -- -k asyncio-epoll -m 'not slow' tests/test_{writing,reading,flow_control,half_close}.py \
            tests/test_{closing,streams,pipes,sock_calls,tls_writing,tls_reading,tls_closing}.py
        inside env PYTHONPATH=/root/packages PYTHONDONTWRITEBYTECODE=1 sh -c 'cd ~/checkout && exec "$@"' run \
            python3 -m pytest -n 0 -p no:cacheprovider --patience 10 "$@"
        ;;
    *) die "there is no such column: see bash tests/matrix.sh" ;;
esac
