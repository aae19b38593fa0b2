"""asyncpg against a real PostgreSQL, over TCP, a Unix socket and TLS that starts in mid-connection."""

import asyncio
import io
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import helpers
import pytest
import tls

asyncpg = pytest.importorskip("asyncpg", reason="asyncpg is not installed")

COPY_ROWS = 50_000


def postgres_programs():
    """The folder with initdb and postgres, which Debian keeps out of PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


def why_no_postgres():
    if postgres_programs() is None:
        return "PostgreSQL is not installed"
    if os.getuid() == 0 and not has_user("postgres"):
        return "PostgreSQL does not run as root and there is no user postgres"
    return None


def has_user(name):
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


pytestmark = [
    pytest.mark.matrix(sqpoll=True),
    pytest.mark.pairs(where="unix"),
    pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres())),
]


def as_postgres():
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def certificate_in(folder):
    """Copies that PostgreSQL's user may read, and nobody else; None without openssl's program."""
    if shutil.which("openssl") is None:
        return None
    certificate, key = (Path(shutil.copy(path, folder)) for path in tls.authority().pair())
    key.chmod(0o600)
    return certificate, key


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    # Not below pytest's own folder, which other users cannot enter.
    with helpers.short_folder() as folder:
        programs, data, port = postgres_programs(), folder / "data", helpers.free_port()
        certificate = certificate_in(folder)
        if os.getuid() == 0:
            for path in [folder, *(certificate or ())]:
                shutil.chown(path, "postgres", "postgres")
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            **as_postgres(),
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": folder,
            "fsync": "off",
            "log_min_messages": "fatal",
        }
        if certificate:
            settings |= {"ssl": "on", "ssl_cert_file": certificate[0], "ssl_key_file": certificate[1]}
        args = [programs / "postgres", "-D", data]
        for name, value in settings.items():
            args += ["-c", f"{name}={value}"]

        def ready(_):
            """It listens before it takes connections."""
            asked = [programs / "pg_isready", "-q", "-h", folder, "-p", str(port)]
            return subprocess.run(asked, stdin=subprocess.DEVNULL).returncode == 0

        # SIGINT, by which PostgreSQL ends without waiting for its clients.
        with helpers.Service(args, ready, cwd=folder, **as_postgres()) as service:
            common = {"port": port, "user": "tester", "database": "postgres"}
            yield {
                "tcp": {"host": "127.0.0.1", "ssl": False, **common},
                "unix": {"host": str(folder), **common},
                "tls": {"host": "127.0.0.1", "ssl": certificate and tls.authority().context_client(), **common},
            }
            service.stop(helpers.signal.SIGINT)


@pytest.fixture(params=["tcp", "unix", "tls"])
def where(request, postgres, case):
    if request.param == "tls" and postgres["tls"]["ssl"] is None:
        pytest.skip("openssl's program, which makes the certificate, is not installed")
    return postgres[request.param]


class connected:
    def __init__(self, where):
        self.where = where

    async def __aenter__(self):
        self.connection = await asyncpg.connect(**self.where)
        return self.connection

    async def __aexit__(self, *exc_info):
        await self.connection.close()


async def test_queries_and_prepared_statements(loop, where):
    async with connected(where) as connection:
        assert await connection.fetchval("select $1::int + 1", 41) == 42
        statement = await connection.prepare("select n, repeat('x', n) from generate_series(1, $1) as n")
        rows = await statement.fetch(2000)
    assert [(row[0], len(row[1])) for row in rows] == [(n, n) for n in range(1, 2001)]


async def test_values_of_megabytes_come_back(loop, where):
    value = helpers.pattern(6 << 20)
    async with connected(where) as connection:
        assert await connection.fetchval("select $1::bytea", value) == value


async def test_copy_of_megabytes_both_ways(loop, where):
    async with connected(where) as connection:
        await connection.execute("create temporary table copied (n int, text text)")
        records = [(n, f"row {n} ".ljust(100, "-")) for n in range(COPY_ROWS)]
        await connection.copy_records_to_table("copied", records=records)
        out = io.BytesIO()
        await connection.copy_from_table("copied", output=out)
        text = out.getvalue()
        assert len(text) > 5_000_000
        await connection.execute("create temporary table again (like copied)")
        await connection.copy_to_table("again", source=io.BytesIO(text))
        same = "select count(*) from copied join again using (n, text)"
        assert await connection.fetchval(same) == COPY_ROWS


async def test_notifications_arrive_by_themselves(loop, where):
    async with connected(where) as listener, connected(where) as sender:
        heard = asyncio.Queue()
        await listener.add_listener("news", lambda *args: heard.put_nowait(args[-1]))
        for number in range(50):
            await sender.execute(f"notify news, '{number}'")
        assert [await heard.get() for _ in range(50)] == [str(number) for number in range(50)]
        await listener.reset()


async def test_a_query_that_times_out_is_cancelled_and_the_connection_lives_on(loop, where):
    async with connected(where) as connection:
        with pytest.raises(asyncio.TimeoutError):
            await connection.execute("select pg_sleep(30)", timeout=0.2)
        assert await connection.fetchval("select 1") == 1


async def test_a_pool_serves_many_at_once(loop, where):
    async with asyncpg.create_pool(**where, min_size=2, max_size=10) as pool:
        answers = await asyncio.gather(*(pool.fetchval("select $1::int", n) for n in range(300)))
    assert answers == list(range(300))


async def test_a_connection_that_the_server_ends_is_reported(loop, where):
    async with connected(where) as other:
        connection = await asyncpg.connect(**where)
        await other.execute("select pg_terminate_backend($1)", connection.get_server_pid())
        await helpers.eventually(connection.is_closed)
        with pytest.raises(asyncpg.InterfaceError):
            await connection.fetchval("select 1")


@pytest.mark.matrix(debug=False, sqpoll=False)
@pytest.mark.usefixtures("tls_engine")
@pytest.mark.pairs(tls_engine="ssl")
@pytest.mark.parametrize("where", ["tls"], indirect=True)
class TestOverTLS:
    """Once more with each of the engines that make TLS records."""

    test_values_of_megabytes_come_back = staticmethod(test_values_of_megabytes_come_back)
    test_copy_of_megabytes_both_ways = staticmethod(test_copy_of_megabytes_both_ways)
    test_a_pool_serves_many_at_once = staticmethod(test_a_pool_serves_many_at_once)
