"""The flags that ps-server and ma-launch share: one table, the same words, the same mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from modelaverage.commands.serve_flags import ServeFlags, add_serve_flags
from ps_server.__main__ import main as ps_server_main

TOLD = ServeFlags(2, 4, "auto", 9.5, Path("center"), 3, 1.5)


def parsed(*argv: str) -> ServeFlags:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_flags(parser)
    return ServeFlags.from_arguments(parser.parse_args(argv))


def test_flags_say_all_that_they_were_made_from() -> None:
    assert parsed(*TOLD.to_argv()) == TOLD
    assert parsed() == ServeFlags()
    assert ServeFlags().to_argv() == []


def test_what_is_left_out_of_the_table_is_not_taken() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_flags(parser, without={"max_workers"})
    arguments, unknown = parser.parse_known_args(["--min-workers", "2", "--max-workers", "3"])
    assert ServeFlags.from_arguments(arguments) == ServeFlags(min_workers=2)
    assert unknown == ["--max-workers", "3"]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (ServeFlags(min_workers=4), "--min-workers 4, --workers 3 have to ascend"),
        (ServeFlags(min_workers=2, max_workers=2), "--min-workers 2, --workers 3, --max-workers 2 have to ascend"),
        (ServeFlags(max_workers=4), "--max-workers needs a --min-workers below --workers 3"),
        (ServeFlags(min_workers=3, grace_s=1.0), "--grace-s needs a --min-workers below --workers 3"),
    ],
)
def test_numbers_that_do_not_fit_together_are_named(told: ServeFlags, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        told.check_workers(3, "--workers")


def test_a_server_refuses_them_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert ps_server_main(["serve", "--num-workers", "3", "--grace-s", "1"]) == 1
    assert capsys.readouterr().err == "ps-server: --grace-s needs a --min-workers below --num-workers 3\n"


@pytest.mark.parametrize("flag", ["--checkpoint-every-rounds", "--checkpoint-timeout-s"])
def test_a_flag_about_checkpoints_needs_a_place_for_them(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag} needs a --checkpoint-dir"):
        parsed(flag, "2").check_checkpoints()
    parsed(flag, "2", "--checkpoint-dir", "center").check_checkpoints()
