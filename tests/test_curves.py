"""Curves of a run: what is read, how it is plotted as text, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ma_client.files.round_log import LoggedRound
from ps_worker.__main__ import main
from ps_worker.curves import picture
from ps_worker.curves.curve import Curve, Point, curve_of, thinned
from ps_worker.curves.logs import curves_in
from ps_worker.curves.metrics import curves_of
from ps_worker.curves.text import plotted
from ps_worker.events.parse import Event, RoundEvent, StepEvent, encode

ROUND = LoggedRound("worker-0", "a", 1000.5, 0.5, 10, 1, 2.0, 300, 200, 0.0)


def curve(name: str, losses: Sequence[float], every: int = 10, **options: object) -> Curve:
    points = [Point((i + 1) * every, 1001.0 + i, (i + 1) * 1_000_000, loss) for i, loss in enumerate(losses)]
    return curve_of(name, points, 1000.0, **options)  # type: ignore[arg-type]


# What is read


def logged(directory: Path, *rounds: LoggedRound) -> None:
    directory.mkdir(exist_ok=True)
    for each in rounds:
        with (directory / f"{each.worker}.jsonl").open("a") as file:
            file.write(each.to_line() + "\n")


def test_each_worker_has_a_curve_in_the_order_of_numbers(tmp_path: Path) -> None:
    logged(tmp_path, *(replace(ROUND, worker=f"worker-{index}") for index in (10, 2, 0)))
    assert [each.name for each in curves_in(tmp_path)] == ["worker-0", "worker-2", "worker-10"]
    (point,) = curves_in(tmp_path)[0].points
    assert point == Point(10, 1000.5, 500, 2.0, "a")
    assert curves_in(tmp_path)[0].began_at_s == 1000.0


def test_half_lines_and_lines_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    logged(tmp_path, ROUND)
    with (tmp_path / "worker-0.jsonl").open("ab") as file:
        file.write(b'\n{"worker": "worker-0", "ses\n\xff\n[]\n{"kind": "x"}\n')
    logged(tmp_path, replace(ROUND, local_step=20))
    (found,) = curves_in(tmp_path)
    assert [point.step for point in found.points] == [10, 20]


def test_rounds_stand_for_steps_only_if_no_worker_counts_steps(tmp_path: Path) -> None:
    logged(tmp_path, replace(ROUND, local_step=0), replace(ROUND, local_step=0, global_step=2))
    (found,) = curves_in(tmp_path)
    assert found.counts_rounds
    assert [point.step for point in found.points] == [1, 2]
    logged(tmp_path, replace(ROUND, worker="worker-1"))
    assert not any(each.counts_rounds for each in curves_in(tmp_path))


def test_bytes_and_steps_of_a_process_that_starts_again_are_added_to_those_before(tmp_path: Path) -> None:
    logged(
        tmp_path,
        ROUND,
        replace(ROUND, local_step=20, sent_bytes=600),
        replace(ROUND, session="b", sent_bytes=900),  # begins again at step 10
        replace(ROUND, session="c", local_step=60, sent_bytes=100),  # has restored its count of steps
    )
    (found,) = curves_in(tmp_path)
    assert [point.step for point in found.points] == [10, 20, 30, 80]
    assert [point.moved_bytes for point in found.points] == [500, 800, 1900, 2200]


def test_steps_that_a_new_process_has_restored_are_not_added() -> None:
    points = [Point(100, 1.0, 10, 1.0, "a"), Point(200, 2.0, 20, 1.0, "b")]
    assert [point.step for point in curve_of("w", points, 0.0).points] == [100, 200]


def test_a_loss_that_is_null_is_not_finite(tmp_path: Path) -> None:
    logged(tmp_path, ROUND, replace(ROUND, local_step=20, loss=None))
    (found,) = curves_in(tmp_path)
    assert math.isnan(found.last.loss)
    assert found.last_loss == 2.0


def test_events_of_the_built_in_workload_are_curves_too(tmp_path: Path) -> None:
    events: list[Event] = [
        StepEvent("worker-1", 5.0, 10, 0.5, 1.0, 0.0, 1, 700),
        StepEvent("alone", 9.0, 10, 0.25, 1.0, 0.0, 0),
        RoundEvent("worker-1", 5.0, 10, 1, 0.0),
        StepEvent("worker-0", 5.0, 10, 0.5, 1.0, 0.0, 1, 900),
    ]
    found = curves_of(events)
    assert [(each.name, each.has_server, each.last.moved_bytes) for each in found] == [
        ("worker-0", True, 900),
        ("worker-1", True, 700),
        ("alone", False, 0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(encode(event) + "\n" for event in events))
    assert curves_in(tmp_path) == found


def test_a_thinned_curve_has_means_and_ends_where_the_whole_one_does() -> None:
    points = curve("w", [1.0, 3.0, 5.0, 7.0, 9.0]).points
    few, size = thinned(points, 3)
    assert size == 2
    assert [(point.step, point.loss) for point in few] == [(20, 2.0), (40, 6.0), (50, 9.0)]
    assert thinned(points, 5) == (list(points), 1)


# As text


def test_the_plot_shows_each_workers_losses_where_they_were() -> None:
    lines = plotted([curve("worker-0", [4.0, 2.0, 1.0]), curve("worker-1", [4.0, 3.0, 1.0])], 60)
    assert lines == [
        "Loss as reported; MB: what one worker has sent and received",
        "       4 |                *",
        "         |",
        "         |",
        "         |",
        "         |                                 1",
        "         |",
        "    2.36 |",
        "         |                                 0",
        "         |",
        "         |",
        "         |",
        "       1 |                                                 *",
        "         ++-----------------------+------------------------+",
        "   steps  0                       15                      30",
        " seconds  0                       2                        3",
        "      MB  0                       2                        3",
        "  at end  0 worker-0 1   1 worker-1 1   * several of them",
    ]


def test_losses_over_a_wide_range_are_on_a_logarithmic_scale() -> None:
    lines = plotted([curve("w", [100.0, 10.0, 1.0])], 60)
    rows = [index for index, line in enumerate(lines) if line.endswith(("|", "0")) and "0" in line[10:]]
    first, middle, last = rows[:3]
    assert last - middle == pytest.approx(middle - first, abs=1)
    assert "logarithmic" in lines[0]
    assert "logarithmic" not in plotted([curve("w", [3.0, 2.0, 1.0])], 60)[0]
    assert "logarithmic" not in plotted([curve("w", [100.0, 0.0])], 60)[0]


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_no_line_is_wider_than_the_terminal(columns: int, count: int) -> None:
    curves = [curve(f"worker-{i}-{'x' * 40}", [10.0**j for j in range(3, -9, -1)], every=100_000) for i in range(count)]
    lines = plotted(curves, columns)
    assert max(map(len, lines)) <= columns
    assert len(lines) <= 22  # it fits into a terminal of 24 rows
    assert all(line.isprintable() and line.isascii() for line in "".join(lines).replace("…", "."))


def test_losses_that_are_not_finite_are_left_out() -> None:
    assert plotted([curve("w", [math.nan])], 80) == []
    lines = plotted([curve("w", [1.0, math.nan, 2.0])], 80)
    assert sum("0" in line[10:] for line in lines[1:13]) == 2


def test_a_run_that_goes_on_from_another_does_not_begin_at_0() -> None:
    points = [Point(5000, 1001.0, 10, 2.0), Point(5100, 1002.0, 20, 1.0)]
    (steps,) = (line for line in plotted([curve_of("w", points, 1000.0)], 60) if line.startswith("   steps"))
    assert steps.split() == ["steps", "5000", "5050", "5100"]


# As a picture


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    found = list[Figure]()

    def noted(**settings: object) -> Figure:
        found.append(Figure(**settings))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(picture, "Figure", noted)
    return found


def test_the_picture_has_a_line_for_each_worker_over_steps_seconds_and_megabytes(
    tmp_path: Path, figures: list[Figure]
) -> None:
    curves = [curve("worker-0", [3.0, 2.0, 1.0]), curve("worker-1", [3.0, 1.0]), curve("lone", [2.0], has_server=False)]
    picture.draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps, seconds, megabytes = figures[0].axes
    found = [[list(line.get_xdata()) for line in axes.get_lines()] for axes in (steps, seconds, megabytes)]  # type: ignore[arg-type]
    assert found[0] == [[10, 20, 30], [10, 20], [10]]  # worker-1 ends where it ended
    assert found[1] == [[1, 2, 3], [1, 2], [1]]
    assert found[2] == [[1, 2, 3], [1, 2]]  # a worker that trains alone moves no bytes
    assert [list(line.get_ydata()) for line in steps.get_lines()] == [[3, 2, 1], [3, 1], [2]]  # type: ignore[arg-type]


def test_lines_are_told_apart_without_colours(tmp_path: Path, figures: list[Figure]) -> None:
    picture.draw([curve(f"worker-{index}", [2.0, 1.0]) for index in range(16)], tmp_path / "curves.png")
    looks = {(line.get_linestyle(), line.get_marker()) for line in figures[0].axes[0].get_lines()}
    assert len({(picture.look(i)["linestyle"], picture.look(i)["marker"]) for i in range(16)}) == 16
    assert len(looks) > 8


def test_of_many_workers_some_are_named_and_the_rest_counted(tmp_path: Path, figures: list[Figure]) -> None:
    picture.draw([curve(f"worker-{index}", [2.0, 1.0]) for index in range(40)], tmp_path / "curves.png")
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == 24
    assert legend.get_title().get_text() == "40 curves, 24 of them named"


# The command


def test_the_command_plots_and_draws_a_runs_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path / "rounds", ROUND, replace(ROUND, local_step=20))
    assert main(["curves", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"written to {tmp_path / 'curves.png'}"
    assert "0 worker-0 2" in printed[-2]


def test_the_command_takes_files_and_draws_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path, ROUND, replace(ROUND, worker="worker-1"))
    files = [str(tmp_path / f"worker-{index}.jsonl") for index in (0, 1)]
    assert main(["curves", *files]) == 0
    assert list(tmp_path.glob("*.png")) == []
    assert main(["curves", *files, "--out", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "1 worker-1 2" in capsys.readouterr().out


def test_without_matplotlib_the_command_plots_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(tmp_path, ROUND)
    monkeypatch.setattr("ps_worker.curves.command.find_spec", lambda _: None)
    assert main(["curves", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png")) == []
    assert capsys.readouterr().out.splitlines()[-1].startswith("no picture: matplotlib is not installed")


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["nowhere"], "there is no '{}/nowhere'"),
        ([""], "no round with a loss is logged in {}: workers log their rounds where MA_ROUND_LOG names"),
        (["", "nowhere"], "there is no '{}/nowhere'"),
        (["", ""], "give one directory, or only files: '{}' is a directory"),
    ],
)
def test_a_mistake_is_answered_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paths: list[str], said: str
) -> None:
    assert main(["curves", *(str(tmp_path / path) for path in paths)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ps-worker: {said.format(tmp_path)}")
