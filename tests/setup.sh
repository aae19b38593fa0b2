# The set-up that tests/run.sh and benchmarks/demo.sh share. To be sourced:
#
#   . tests/setup.sh
#   set_up build uvloop               what it takes to build, and further requirements for pip
#   set_up test 'aiouringnet[test]'   the same and the servers that the tests talk to
#
# On a fresh Debian or Ubuntu machine this installs the missing system packages
# (as root or through sudo), makes .venv in the checkout and installs the
# checkout into it. A second run finds everything in place and needs no network.
# It says little; what pip and the compiler said is in .venv/setup.log.
#
#   PYTHON=/path/to/python3.12   uses that Python instead of the first that fits

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
state=$venv/.aiouringnet # what was installed into the venv, in hashes

say() { printf '%s\n' "$*" >&2; }
die() {
    say "aiouringnet set-up: $*"
    exit 1
}

# --- Python ----------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
has_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}
has_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }
has_own_tests() { "$1" -c 'import test.test_asyncio' 2>/dev/null; }
# One that dpkg looks after, so that apt can add what it lacks.
is_systems() { [ "$("$1" -c 'import sys; print(sys.base_prefix)')" = /usr ] && command -v dpkg >/dev/null; }

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer"
        python=$PYTHON
        return
    fi
    for name in python3 python3.{14,13,12,11,10}; do
        is_new_enough "$name" || continue
        if is_systems "$name" || { has_headers "$name" && has_venv "$name"; }; then
            python=$name
            return
        fi
    done
    return 1
}

# --- System packages ---------------------------------------------------------

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}
is_installed() { dpkg -s "$1" 2>/dev/null | grep -q '^Status: .* installed$'; }

missing_packages() { # build|test
    local version
    command -v cc >/dev/null && command -v make >/dev/null || echo build-essential
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --atleast-version=2.3 liburing 2>/dev/null || echo liburing-dev
    if [ -z "${python:-}" ]; then
        echo python3-dev python3-venv
    elif is_systems "$python"; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        has_headers "$python" || echo "python$version-dev"
        has_venv "$python" || echo "python$version-venv"
        if [ "$1" = test ] && ! has_own_tests "$python"; then
            # Debian keeps CPython's own test suite in a package of its own.
            is_installed "libpython$version-testsuite" || echo "libpython$version-testsuite"
        fi
    fi
    [ "$1" = test ] || return 0
    command -v curl >/dev/null || echo curl
    command -v dnsmasq >/dev/null || [ -x /usr/sbin/dnsmasq ] || echo dnsmasq-base
    command -v wrk >/dev/null || echo wrk
    command -v redis-server >/dev/null || echo redis-server
    command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || echo nginx
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null || echo postgresql
}

install_packages() { # package...
    [ $# -gt 0 ] || return 0
    local log
    if ! command -v apt-get >/dev/null; then
        say "Missing here, by Debian's names: $*"
        return 1
    fi
    if [ "$(id -u)" != 0 ] && ! { [ -t 0 ] && command -v sudo >/dev/null; } && ! sudo -n true 2>/dev/null; then
        say "System packages are missing and this is neither root nor allowed to sudo. As root: apt-get install $*"
        return 1
    fi
    say "Installing system packages: $*"
    log=$(mktemp)
    # A list that is too old or a machine without network shows in the install.
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >"$log" 2>&1 || true
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 install "$@" >>"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        say "apt-get could not install: $*"
        return 1
    fi
    rm -f "$log"
}

# --- The virtual environment -------------------------------------------------

logged() {
    if ! "$@" >>"$venv/setup.log" 2>&1 </dev/null; then
        tail -n 30 "$venv/setup.log" >&2
        die "this failed: $*"
    fi
}

is_current() { [ "$(cat "$state.$1" 2>/dev/null)" = "$2" ]; }
remember() { printf '%s\n' "$2" >"$state.$1"; }

hash_of_sources() {
    # What is compiled and how. A change of Python code needs no new install.
    { echo setup.py; echo pyproject.toml; find aiouringnet -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \); } |
        LC_ALL=C sort | tr '\n' '\0' | xargs -0 sha256sum | sha256sum
}

make_venv() {
    local identity
    identity=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')
    if [ -x "$venv/bin/python" ] && is_current python "$identity"; then
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$state.python" ]; then
        # Somebody's own: use it, do not replace it.
        is_new_enough "$venv/bin/python" || die "$venv is in the way: remove it or give it a Python 3.10 or newer"
        return
    fi
    say "Making .venv with Python $("$python" -c 'import platform; print(platform.python_version())')"
    "$python" -m venv --clear "$venv" || die "no virtual environment could be made with $python"
    remember python "$identity"
}

install_package() { # requirement...
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input -q)
    local requires wanted sources recipe
    wanted=$(printf '%s\n' "$*" | cat - pyproject.toml | sha256sum)
    recipe=$(cat setup.py pyproject.toml | sha256sum)
    sources=$(hash_of_sources)
    if ! is_current sources "$sources"; then
        say "Building aiouringnet"
        : >"$venv/setup.log"
        if ! is_current recipe "$recipe"; then
            # The build's own requirements go into the venv, so that a rebuild needs no network.
            requires=$(sed -n 's/^requires = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '",')
            # shellcheck disable=SC2086
            logged "${pip[@]}" install $requires
            # setuptools does not see that other flags or another Cython would give other objects.
            rm -rf build
            find aiouringnet -name "*$("$venv/bin/python" -c \
                'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" -delete
        fi
        # Editable, since in the checkout Python finds these sources first anyway
        # (python -m aiouringnet): they must not lack their compiled half.
        # tests/test_install.py looks after the package as others install it.
        logged "${pip[@]}" install --no-build-isolation --no-deps -e .
        remember recipe "$recipe"
        remember sources "$sources"
    fi
    if ! is_current "requirements.$1" "$wanted"; then
        say "Installing from the package index: $*"
        logged "${pip[@]}" install --no-build-isolation "$@"
        remember "requirements.$1" "$wanted"
    fi
}

install_missing() { # build|test
    local packages
    mapfile -t packages < <(missing_packages "$1" | tr ' ' '\n')
    if ! install_packages "${packages[@]}"; then
        # Without a server some tests are skipped, and say so; without a compiler nothing works.
        mapfile -t packages < <(missing_packages build)
        [ ${#packages[@]} -eq 0 ] || die "it cannot go on without ${packages[*]}"
    fi
}

set_up() { # build|test requirement...
    local stage=$1
    shift
    cd "$root" || exit 1
    python=
    find_python || true
    install_missing "$stage"
    if [ -z "$python" ]; then
        find_python || die "no Python 3.10 or newer with headers and venv was found; set PYTHON to one"
        # Only now its version is known, and with it the package of its own tests.
        install_missing "$stage"
    fi
    make_venv
    install_package "$@"
}
