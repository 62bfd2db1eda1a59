"""A parser whose answer to a mistake is one line, and whose help keeps its examples as they are written."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["OneLineParser", "help_format"]


class OneLineParser(argparse.ArgumentParser):
    """Answers a mistake with one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def help_format(prog: str) -> argparse.HelpFormatter:
    """Leaves examples as they are written."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)
