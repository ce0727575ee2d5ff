"""The registry: keys shown once, hashes kept, and changes of other processes seen."""

import contextlib
import hashlib
import hmac
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from brim.apps import database, registry
from brim.apps.registry import LOOK_PERIOD_S, MAX_KEY_LETTERS, Registry
from brim.core.app import App, Budgets, Pair
from brim.errors import ConfigError, NotFound

MAIL = App(name="mail", budgets=Budgets(tokens=100), pairs=(Pair(target="x", draft="y"),))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def look(self) -> None:
        """Let enough pass for another look at the file."""
        self.now += LOOK_PERIOD_S


Opener = Callable[..., Registry]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens registries, and gives their files back in the end."""
    registries: list[Registry] = []

    def opened(path: Path, **options: Clock) -> Registry:
        registries.append(Registry(path, **options))
        return registries[-1]

    yield opened
    for each in registries:
        each.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "apps.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_made_before_an_app_is_added(opened: Opener, path: Path) -> None:
    """A server without apps leaves no file, and knows no key."""
    apps = opened(path)
    assert apps.apps() == ()
    assert apps.authenticate("brim-" + "x" * 43) is None
    assert not path.parent.exists()


def test_a_key_is_the_apps_and_survives_a_restart(opened: Opener, path: Path) -> None:
    """The key that `add` gives is known from now on, with all that the app may do."""
    key = opened(path).add(MAIL, "text")
    assert re.fullmatch(r"brim-[A-Za-z0-9_-]{43}", key)
    again = opened(path)
    assert again.authenticate(key) == MAIL
    assert again.get("mail") == MAIL
    assert again.apps() == (MAIL,)
    assert again.entry("mail").manifest == "text"
    assert key.startswith(again.entry("mail").key_hint)


def test_only_a_hash_is_kept(opened: Opener, path: Path) -> None:
    """No file has the key or what is secret of it, in letters or bytes."""
    key = opened(path).add(MAIL, "")
    data = b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert hashlib.sha256(key.encode()).digest() in data
    assert key.encode() not in data
    assert key[13:].encode() not in data


def test_wrong_keys_are_nobodys(opened: Opener, path: Path) -> None:
    """One letter more, less or another, another hint, none at all, or a long one."""
    apps = opened(path)
    key = apps.add(MAIL, "")
    other = "A" if key[-1] != "A" else "B"
    wrong = ["", "brim-", key + "x", key[:-1], key[:-1] + other, key.upper(), "é" + key, "\udcff",
             "x" * (MAX_KEY_LETTERS + 1), key + "x" * 10_000_000]  # fmt: skip
    assert [apps.authenticate(each) for each in wrong] == [None] * len(wrong)


def test_keys_are_compared_in_constant_time(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole digest is compared by `hmac.compare_digest`, for right keys and near ones."""
    compared: list[bytes] = []

    apps = opened(path)
    key = apps.add(MAIL, "")
    monkeypatch.setattr("brim.apps.registry.hmac.compare_digest", _recording(compared))
    assert apps.authenticate(key) == MAIL
    assert apps.authenticate(key[:-1] + "!") is None
    assert [len(each) for each in compared] == [32, 32]


def _recording(compared: list[bytes]) -> Callable[[bytes, bytes], bool]:
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    return compare


def test_a_name_is_given_once(opened: Opener, path: Path) -> None:
    """Adding it again is refused and changes nothing; replacing keeps the key."""
    apps = opened(path)
    key = apps.add(MAIL, "old")
    with pytest.raises(ConfigError, match="there is an app 'mail' already; --replace"):
        apps.add(App(name="mail"), "new")
    assert apps.authenticate(key) == MAIL
    apps.replace(App(name="mail"), "new")
    assert apps.authenticate(key) == App(name="mail")
    assert apps.entry("mail").manifest == "new"


def test_a_rotated_key_is_the_only_one(opened: Opener, path: Path) -> None:
    """The old key is refused at once."""
    apps = opened(path)
    old = apps.add(MAIL, "")
    new = apps.rotate("mail")
    assert (apps.authenticate(old), apps.authenticate(new)) == (None, MAIL)


def test_a_removed_app_is_gone(opened: Opener, path: Path) -> None:
    """Its key is refused, its name is free again, and the new key is another."""
    apps = opened(path)
    key = apps.add(MAIL, "")
    apps.remove("mail")
    assert apps.authenticate(key) is None
    assert apps.get("mail") is None
    assert apps.add(MAIL, "") != key
    assert apps.authenticate(key) is None


def test_unknown_names_are_named(opened: Opener, path: Path) -> None:
    """What is asked of an app that does not exist names those that do."""
    apps = opened(path)
    apps.add(MAIL, "")
    for ask in (apps.remove, apps.rotate, apps.entry):
        with pytest.raises(NotFound, match="no app 'chat'; there are: 'mail'"):
            ask("chat")
    with pytest.raises(NotFound):
        apps.replace(App(name="chat"), "")


def test_changes_of_another_process_are_seen(opened: Opener, path: Path, clock: Clock) -> None:
    """Within a second, whether or not there was a file before; not at every request."""
    server, command = opened(path, clock=clock), opened(path)
    key = command.add(MAIL, "")
    assert server.authenticate(key) is None
    clock.look()
    assert server.authenticate(key) == MAIL
    other = command.rotate("mail")
    clock.look()
    assert (server.authenticate(key), server.authenticate(other)) == (None, MAIL)
    command.remove("mail")
    assert server.authenticate(other) == MAIL
    clock.look()
    assert server.authenticate(other) is None
    assert LOOK_PERIOD_S <= 1


def test_another_file_in_its_place_is_seen(
    opened: Opener, path: Path, tmp_path: Path, clock: Clock
) -> None:
    """A backup that is put back, and a file that is taken away, count within a second."""
    server = opened(path, clock=clock)
    backup = opened(tmp_path / "backup.sqlite")
    key = backup.add(MAIL, "")
    backup.close()
    opened(path).add(App(name="new"), "")
    clock.look()
    assert [app.name for app in server.apps()] == ["new"]
    for each in path.parent.iterdir():
        each.unlink()
    clock.look()
    assert server.apps() == ()
    opened(path).add(App(name="newer"), "")
    clock.look()
    assert [app.name for app in server.apps()] == ["newer"]
    (tmp_path / "backup.sqlite").rename(path)
    clock.look()
    assert server.authenticate(key) == MAIL


def test_a_writer_that_takes_its_time_is_not_waited_for(
    opened: Opener, path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was known stands while the file is locked; the change is seen when it is there."""
    command = opened(path)
    key = command.add(MAIL, "")
    server = opened(path, clock=clock)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("DELETE FROM app")
    clock.look()
    assert server.authenticate(key) == MAIL
    assert server._connection is not None
    assert server._connection.execute("PRAGMA busy_timeout").fetchone() == (0,)
    connection.execute("COMMIT")
    connection.close()
    clock.look()
    assert server.authenticate(key) is None
    assert capfd.readouterr().err == ""


def test_two_writers_see_each_other(opened: Opener, path: Path) -> None:
    """Whoever writes looks first: a name that another process took a moment ago is taken."""
    one, two = opened(path), opened(path)
    one.add(MAIL, "")
    with pytest.raises(ConfigError, match="already"):
        two.add(MAIL, "")
    two.add(App(name="chat"), "")
    one.rotate("chat")
    assert [app.name for app in one.apps()] == ["chat", "mail"]


def test_many_add_at_once(opened: Opener, path: Path) -> None:
    """Commands that begin in the same moment, on no file yet, all add their app."""
    names = [f"app-{i}" for i in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        keys = list(pool.map(lambda name: opened(path).add(App(name=name), ""), names))
    apps = opened(path)
    assert [getattr(apps.authenticate(key), "name", None) for key in keys] == names


def test_files_are_the_users_alone(opened: Opener, path: Path) -> None:
    """The directory and the one file in it, also where that was open to others."""
    apps = opened(path)
    apps.add(MAIL, "")
    apps.close()
    path.chmod(0o644)
    apps = opened(path)
    apps.rotate("mail")
    modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    assert modes == {"apps.sqlite": 0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_damaged_file_is_refused_and_stays(opened: Opener, path: Path) -> None:
    """Keys are in it, so it is neither put aside nor overwritten; the sentence says what to do."""
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"is damaged .*keys: put a copy from a backup") as caught:
        opened(path)
    assert str(path) in caught.value.message
    assert path.read_bytes() == b"no database" * 1000


def test_a_foreign_or_tampered_table_is_damage(opened: Opener, path: Path) -> None:
    """Another program's database, and a row that is no app, are refused in a sentence."""
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE app (x)")
    connection.close()
    with pytest.raises(ConfigError, match="is damaged"):
        opened(path)
    path.unlink()
    opened(path).add(MAIL, "")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE app SET app = '{}'")
    connection.close()
    with pytest.raises(ConfigError, match="is damaged"):
        opened(path)


def test_damage_under_a_running_server_leaves_what_was_known(
    opened: Opener, path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    """Apps go on with their keys, and it is said once."""
    server = opened(path, clock=clock)
    key = opened(path).add(MAIL, "")
    clock.look()
    assert server.authenticate(key) == MAIL
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE app SET app = 'x'")
    connection.close()
    for _ in range(3):
        clock.look()
        assert server.authenticate(key) == MAIL
    assert capfd.readouterr().err.count("apps_unread") == 1


def test_a_newer_file_is_refused(opened: Opener, path: Path) -> None:
    """A brim that does not know the format does not touch it."""
    opened(path).add(MAIL, "")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(ConfigError, match=r"by a newer brim \(its format is 7, this one knows 1\)"):
        opened(path)


def test_an_older_file_is_brought_up_to_date(tmp_path: Path) -> None:
    """Each script runs once, in order, whatever version the file has, and rows stay."""
    scripts = ("CREATE TABLE a (x); INSERT INTO a VALUES (1)", "ALTER TABLE a ADD y DEFAULT 2",
               "UPDATE a SET x = x + 1")  # fmt: skip
    path = tmp_path / "x.sqlite"
    for num_known in (1, 1, 3, 3):
        connection = database.open_database(path, scripts[:num_known], holds="nothing")
        rows = connection.execute("SELECT * FROM a").fetchall()
        connection.close()
    assert rows == [(2, 2)]


def test_a_script_that_fails_changes_nothing(tmp_path: Path) -> None:
    """An upgrade happens as a whole or not at all."""
    path = tmp_path / "x.sqlite"
    good = ("CREATE TABLE a (x)",)
    database.open_database(path, good, holds="nothing").close()
    with pytest.raises(ConfigError):
        database.open_database(path, (*good, "CREATE TABLE b (x); DROP TABLE c"), holds="nothing")
    connection = database.open_database(path, good, holds="nothing")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("a",)]
    connection.close()


def test_there_is_a_most(opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that adds apps without end is stopped."""
    monkeypatch.setattr(registry, "MAX_APPS", 1)
    apps = opened(path)
    apps.add(MAIL, "")
    with pytest.raises(ConfigError, match="which is the most"):
        apps.add(App(name="chat"), "")


def test_a_place_that_takes_nothing(opened: Opener, tmp_path: Path) -> None:
    """A directory that cannot be made is a sentence that names the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*server.state_directory"):
        opened(tmp_path / "file" / "apps.sqlite").add(MAIL, "")


def test_what_is_no_regular_file_is_left_alone(opened: Opener, tmp_path: Path) -> None:
    """Neither its mode is changed, which may be a device's, nor is it opened, which may hang."""
    os.mkfifo(tmp_path / "pipe", 0o644)
    (tmp_path / "apps.sqlite").symlink_to(tmp_path / "pipe")
    mode = (tmp_path / "pipe").stat().st_mode
    with pytest.raises(ConfigError, match="no regular file; move it away"):
        opened(tmp_path / "apps.sqlite")
    assert (tmp_path / "pipe").stat().st_mode == mode


def test_a_write_that_sqlite_took_back_itself_says_why() -> None:
    """As when the disk is full: that is told, and not that there is nothing to take back."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (a PRIMARY KEY)")
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            with database.transaction(connection):
                for _ in range(2):
                    connection.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
