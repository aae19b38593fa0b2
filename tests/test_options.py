"""Options are checked where they are given, and the errors name what is allowed."""

import asyncio
import dataclasses
import functools

import pytest

import aiouringnet
from aiouringnet import Options

BOUNDS = {
    "queue_depth": (8, 32768),
    "buffer_size": (256, 1048576),
    "buffer_count": (2, 32768),
    "read_budget": (4096, 1073741824),
    "sqpoll_idle_ms": (1, 10000),
    "ktls_worker_bytes": (16384, 1073741824),
}


def test_the_defaults_are_valid(monkeypatch):
    monkeypatch.delenv("AIOURINGNET_ENGINE", raising=False)
    options = Options()
    assert options.engine == "auto" and options.sqpoll is False
    assert dataclasses.replace(options) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.engine = "epoll"


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_have_bounds(name):
    low, high = BOUNDS[name]
    assert getattr(Options(**{name: low}), name) == low
    assert getattr(Options(**{name: high}), name) == high
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"^{name} must be in {low}\.\.{high}, not {value}$"):
            Options(**{name: value})
    for value in (None, "1024", 1024.0, True):
        if value is None and name in ("ktls_worker_bytes", "queue_depth"):
            continue  # off, and the engine's own choice
        with pytest.raises(TypeError, match=rf"^{name} must be an int in {low}\.\.{high}, not {value!r}$"):
            Options(**{name: value})


def test_the_number_of_buffers_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"^buffer_count must be a power of two in 2\.\.32768, not 100$"):
        Options(buffer_count=100)


def test_sqpoll_is_a_switch():
    with pytest.raises(TypeError, match="^sqpoll must be True or False, not 1$"):
        Options(sqpoll=1)


def test_the_pollers_core_exists():
    assert Options(sqpoll=True, sqpoll_cpu=0).sqpoll_cpu == 0
    with pytest.raises(ValueError, match=r"^sqpoll_cpu must be in 0\.\.\d+, not 100000$"):
        Options(sqpoll=True, sqpoll_cpu=100000)
    with pytest.raises(ValueError, match="^sqpoll_cpu is only meaningful with sqpoll=True$"):
        Options(sqpoll_cpu=0)


def test_gathering_is_one_of_three():
    assert Options().gather == "auto"
    for value in ("auto", "always", "never"):
        assert Options(gather=value).gather == value
    for value in ("sometimes", True, None):
        with pytest.raises(ValueError, match=f"^gather must be one of 'auto', 'always', 'never', not {value!r}$"):
            Options(gather=value)


@pytest.mark.parametrize("engine", ["auto", "uring", "epoll", "loop"])
def test_the_engine_comes_from_the_environment_unless_it_is_given(monkeypatch, engine):
    monkeypatch.setenv("AIOURINGNET_ENGINE", engine)
    assert Options().engine == engine
    assert Options(engine="epoll").engine == "epoll"


@pytest.mark.parametrize("tls", ["auto", "openssl", "ssl"])
def test_the_tls_engine_comes_from_the_environment_unless_it_is_given(monkeypatch, tls):
    monkeypatch.setenv("AIOURINGNET_TLS", tls)
    assert Options().tls == tls
    assert Options(tls="ssl").tls == "ssl"
    for name, options in (("tls", {"tls": "gnutls"}), ("AIOURINGNET_TLS", {})):
        monkeypatch.setenv("AIOURINGNET_TLS", "gnutls")
        with pytest.raises(ValueError, match=f"^{name} must be one of 'auto', 'openssl', 'ssl', not 'gnutls'$"):
            Options(**options)


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", "")
    assert Options().engine == "auto"


def test_a_bad_engine_is_told_the_good_ones(monkeypatch):
    good = "must be one of 'auto', 'uring', 'epoll', 'loop', not 'iocp'$"
    with pytest.raises(ValueError, match=f"^engine {good}"):
        Options(engine="iocp")
    monkeypatch.setenv("AIOURINGNET_ENGINE", "iocp")
    with pytest.raises(ValueError, match=f"^AIOURINGNET_ENGINE {good}"):
        Options()


@pytest.mark.parametrize("function", [aiouringnet.loop_factory, aiouringnet.install_policy, aiouringnet.patch_loop])
def test_bad_options_are_refused_at_once(function):
    loop = asyncio.new_event_loop()
    try:
        take = functools.partial(function, loop) if function is aiouringnet.patch_loop else function
        with pytest.raises(ValueError, match="queue_depth"):
            take(queue_depth=1)
        with pytest.raises(TypeError, match="there is no option 'depth'; the options are engine, queue_depth, "):
            take(depth=1024)
    finally:
        loop.close()


def test_a_bad_engine_in_the_environment_is_told_where_a_loop_is_patched(monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", "iocp")
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ValueError, match="^AIOURINGNET_ENGINE must be one of 'auto', 'uring', 'epoll', 'loop'"):
            aiouringnet.patch_loop(loop)
        assert type(loop).__mro__[0].__dict__.get("_aiouringnet_patched") is None
        # What the program says counts.
        assert aiouringnet.patch_loop(loop, engine="epoll") is loop
    finally:
        loop.close()
