"""What the fork server does before it forks: imports all that the processes need; and it ends with its parent."""

from __future__ import annotations

import ps_server.__main__  # noqa: F401
from chaos.forks import die_with_parent
from chaos.worker import warm_up

__all__: list[str] = []

die_with_parent()
warm_up()
