"""Files that are read again when they change: which changes are noticed, and which files are left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelaverage.access.watched_files import WatchedFiles
from modelaverage.errors import SecurityError

LONG_AGO_NS = 1_000_000_000 * 10**9


class Watched:
    """One watched file, and a record of what was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads = 0
        self.problems: list[str] = []
        self.files = WatchedFiles([path], self._read, lambda error: self.problems.append(str(error)))

    def _read(self) -> str:
        self.reads += 1
        try:
            return self.path.read_text()
        except OSError as error:
            raise SecurityError(str(error)) from None


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    path = tmp_path / "token"
    path.write_text("first")
    return Watched(path)


def rewrite(path: Path, text: str) -> None:
    """Rewrites the file in place, and restores those of its times that can be restored."""
    times = os.stat(path)
    with path.open("r+") as file:
        file.write(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_change_is_seen_at_the_next_look_and_once(watched: Watched) -> None:
    assert (watched.files.get(), watched.files.news()) == ("first", None)
    watched.path.write_text("the second")
    assert (watched.files.news(), watched.files.news(), watched.files.get()) == ("the second", None, "the second")
    assert watched.reads == 2


def test_a_rewrite_of_the_same_size_whose_time_is_put_back_is_seen(watched: Watched) -> None:
    os.utime(watched.path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert watched.files.news() is None
    rewrite(watched.path, "other")
    assert os.stat(watched.path).st_mtime_ns == LONG_AGO_NS
    assert watched.files.news() == "other"


def test_a_rewrite_within_one_tick_of_the_file_systems_clock_is_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_one_time = os.stat(watched.path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: at_one_time)
        again = Watched(watched.path)
        assert again.files.news() is None
        with watched.path.open("r+") as file:
            file.write("other")
        assert again.files.news() == "other"


def test_a_rewrite_a_year_after_the_last_one_is_seen(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a file that has not changed for long, only its times are checked."""
    bytes_read = list[Path]()
    read_bytes = Path.read_bytes

    def noted(path: Path) -> bytes:
        bytes_read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    year_later_ns = os.stat(watched.path).st_ctime_ns + 365 * 86400 * 10**9
    monkeypatch.setattr("time.time_ns", lambda: year_later_ns)
    for _ in range(10):
        assert watched.files.news() is None
    assert len(bytes_read) == 1
    before_ns = os.stat(watched.path).st_ctime_ns
    while os.stat(watched.path).st_ctime_ns == before_ns:  # a tick of a few milliseconds
        rewrite(watched.path, "other")
    assert watched.files.news() == "other"


def test_a_file_that_is_touched_or_replaced_by_an_equal_one_is_no_news(watched: Watched, tmp_path: Path) -> None:
    os.utime(watched.path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert watched.files.news() is None
    (tmp_path / "equal").write_text("first")
    (tmp_path / "equal").replace(watched.path)
    assert watched.files.news() is None


def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    for name in ("first", "other"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "token"
    link.symlink_to("first")
    watched = Watched(link)
    (tmp_path / "beside").symlink_to("other")
    (tmp_path / "beside").replace(link)
    assert watched.files.news() == "other"


def test_a_file_that_is_gone_is_told_once_and_what_it_said_stays(watched: Watched) -> None:
    watched.path.unlink()
    assert [watched.files.get() for _ in range(3)] == ["first"] * 3
    assert len(watched.problems) == 1
    watched.path.write_text("first")
    assert watched.files.get() == "first"
    watched.path.write_text("other")
    assert watched.files.get() == "other"
    assert len(watched.problems) == 1


def test_a_pipe_is_read_once() -> None:
    """As `--token-file <(command)` in a shell, whose command may write only now."""
    readable, writable = os.pipe()
    path = Path(f"/dev/fd/{readable}")

    def read() -> str:
        os.write(writable, b"first")
        os.close(writable)  # a second time that is an error
        return path.read_text()

    files = WatchedFiles([path], read, lambda _: None)
    assert [files.get(), files.get()] == ["first", "first"]
    os.close(readable)
