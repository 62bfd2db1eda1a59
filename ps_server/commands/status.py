"""`ps-server status`."""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial

from modelaverage.addresses import check_all
from modelaverage.commands import flag_types
from modelaverage.commands.security_flags import add_security_flags, security_of
from modelaverage.runtime.output import OnLoss
from ps_server.commands.subparsers import SubParsers
from ps_server.unusable import UnusableSettingError

__all__ = ["add_status"]

_EXAMPLES = """\
examples:
  ps-server status 127.0.0.1:2222
  ps-server status 127.0.0.1:2222 --json | jq .waiting_for
  ps-server status ps0:2222 ps1:2222                   a job with two servers
  ps-server status ps0:2222 ps1:2222 --watch           a live view of both
  ps-server status 127.0.0.1:2222 --watch 10 --json    a line of JSON every 10 s
"""


def add_status(commands: SubParsers) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "status",
        help="show what servers are doing and which workers they wait for",
        description="Shows phase, global_step, the workers that the round waits for, and every worker, by server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "addresses",
        nargs="+",
        metavar="ADDRESS",
        help="HOST:PORT or unix:PATH of a server; one or more",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="the whole status as JSON, times in s, sizes in bytes; a list if there are several servers; with --watch "
        "one object a line",
    )
    command.add_argument(
        "--timeout-s",
        type=flag_types.seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for an answer (%(default)s)",
    )
    add_security_flags(command)
    command.add_argument(
        "--watch",
        type=flag_types.seconds,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="refresh at this interval (1) until Ctrl-C: a live view in a terminal, otherwise a line for each change",
    )
    command.set_defaults(run=_run, on_loss=OnLoss.END)


def _run(arguments: argparse.Namespace) -> int:
    from modelaverage.access.channels import Access
    from ps_server.console import status
    from ps_server.console.watch import watch

    try:
        check_all(arguments.addresses)
    except ValueError as error:
        raise UnusableSettingError(str(error)) from None
    fetch = partial(status.fetch, timeout_s=arguments.timeout_s, access=Access(security_of(arguments)))
    if arguments.watch is not None:
        # One unreachable server must not keep the others from being shown.
        timeout_s = min(arguments.timeout_s, max(1.0, arguments.watch))
        watch(arguments.addresses, partial(fetch, timeout_s=timeout_s), arguments.watch, arguments.json)
        return 0
    seen = list[status.Seen]()
    for address in arguments.addresses:
        try:
            seen.append(status.Seen(address, fetch(address)))
        except status.NoAnswerError as error:
            print(f"ps-server: {error}", file=sys.stderr)
    answers = [each.status for each in seen if each.status is not None]
    if arguments.json and answers:
        print(status.as_json(answers))
    elif answers:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for differ in status.differing_choices(seen):
            print(f"{differ}\n")
        print("\n\n".join(status.as_text(answer, columns) for answer in answers))
    return 0 if len(answers) == len(arguments.addresses) else 1
