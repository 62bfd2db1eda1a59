"""The log of servers and workers: a table of all events with their fields, and the two formats of a line.

A logging call names its event in addition to its message: ``log.warning("...", extra=event("round_restarted",
round=7))``. With `--log-json` a line is one JSON object: time, level, program, event, message, and the event's fields.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from modelaverage.runtime.output import OnLoss, keep_output

__all__ = ["COMMON_FIELDS", "EVENTS", "event", "event_of", "keep_logging", "log_json", "say"]

COMMON_FIELDS = ("time", "level", "program", "event", "message")
# In every event, `worker` is a worker's id, `round` the global_step that a round starts from, `peer` an address.
EVENTS: dict[str, tuple[str, ...]] = {
    # logged by the server
    "listening": ("addresses",),
    "data_port_listening": ("addresses",),
    "metrics_listening": ("address",),
    "page_listening": ("url",),
    "page_failed": (),  # a defect
    "center_initialized": ("worker", "peer", "round", "variables", "size_bytes", "outer_optimizer", "compression"),
    "call_refused": ("rpc", "reason", "worker", "peer"),
    "data_connection_refused": ("peer", "cause", "others"),
    "connection_cut": ("peer", "reason"),
    "call_failed": ("rpc", "worker", "peer", "cause"),  # not caused by the client
    "round_committed": ("round", "workers", "workers_omitted", "round_s"),
    "round_restarted": ("round", "cause"),
    "worker_finished": ("worker", "round", "training"),
    "worker_left": ("worker",),
    "worker_returned": ("worker", "training"),
    "job_over": ("round",),
    "intervals_differ": ("intervals",),
    "values_not_finite": ("worker", "round", "values"),  # also logged by workers
    "center_awaited": ("waited_s", "workers"),
    "no_shared_memory": ("worker",),
    "no_data_port": ("cause",),
    "checkpoint_failed": ("path", "cause"),
    "checkpoint_hangs": ("path", "round", "waited_s"),
    "checkpoint_written_late": ("path", "round", "waited_s"),
    "checkpoint_given_up": ("path", "round", "waited_s"),
    "checkpoint_writer_ended": ("cause",),
    "checkpoint_directory_made": ("path",),
    "checkpoint_passed_over": ("path", "cause"),
    "checkpoint_restored": ("path", "round"),
    "stopping": (),
    "exposed": ("address", "cause"),
    "certificate_changed": ("path",),
    "certificate_chain_broken": ("path", "cause"),
    "few_descriptors": ("limit", "needed"),  # at the start
    "no_descriptors": ("limit",),
    "descriptors_again": ("waited_s", "turned_away"),
    # logged by the server and by workers
    "credentials_kept": ("cause",),  # the new file is unusable
    "data_connection_waits": ("worker", "peer", "waited_s"),
    "round_waits": ("round", "waited_s", "waiting_for", "waiting_for_omitted", "waiting_for_unknown"),
    "output_lost": ("stream", "lines", "cause"),
    "failed": ("cause",),  # a setting that cannot be used, or a job that cannot continue: the last line
    "crashed": ("traceback",),  # a defect of this program
    "other": (),  # logged by a library
    # logged by a worker
    "server_away": ("peer", "cause", "patience_s"),
    "chief_awaited": ("peer", "waited_s"),
    "data_connection_given_up": ("peer", "cause", "pause_s"),
    "server_behind": ("peer", "round", "other_round", "waited_s", "waiting_for"),
    "finish_awaited": ("workers", "waited_s"),
    "stays_local": ("variables", "variables_omitted"),
    "center_goes_on": ("worker", "round"),
    "frozen_differ": ("worker", "variables", "variables_omitted"),
    "init_values_unused": ("path", "variables", "variables_omitted"),
    "init_values_converted": ("path", "variables", "variables_omitted"),
    "push_not_used": ("worker", "round", "steps"),
    "worker_abstains": ("worker", "values", "variables"),
    "optimizer_state_dropped": ("worker", "variables"),
    "steps_discarded": ("worker", "round", "steps"),
    "training_finished": ("worker", "round", "workers_training"),
    "task_index_waits": ("peer", "cause"),
    "task_index_lost": ("peer", "cause"),
    "gradients_shared": ("wrapper", "processes"),
    "ranks_differ": ("ranks",),
    "round_log_lost": ("worker", "path", "cause"),
    "stopped": ("cause",),
    "progress": ("worker", "round", "local_step", "steps", "loss", "samples_per_s", "waited_s", "accuracy"),
}
_EVENT, _FIELDS = "modelaverage_event", "modelaverage_fields"
_LONGEST_VALUE = 2000
_logs_json = False


def event(name: str, **fields: Any) -> dict[str, Any]:
    """The ``extra`` of a logging call: an event of the table with all its fields."""
    return {_EVENT: name, _FIELDS: fields}


def event_of(record: logging.LogRecord) -> str:
    """The name of the event that a line logs."""
    return "crashed" if record.exc_info else str(getattr(record, _EVENT, "other"))


class _JsonLines(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: _short(value) for name, value in getattr(record, _FIELDS, {}).items()}
        name = event_of(record)
        if record.exc_info:  # a defect of this program
            fields = {"traceback": "".join(traceback.format_exception(*record.exc_info))}
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        common = (time.replace("+00:00", "Z"), record.levelname.lower(), self._program, name)
        line = dict(zip(COMMON_FIELDS, (*common, _short(record.getMessage())), strict=True)) | fields
        return json.dumps(line, default=str)


def log_json(program: str) -> None:
    """From now on, every line that this process logs is JSON, including warnings and the exception that ends it."""
    global _logs_json
    _logs_json = True
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(program))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)

    def crashed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        failure = kind() if error is None else error
        logging.getLogger().critical("%s", failure, exc_info=(kind, failure, trace))

    sys.excepthook = crashed
    threading.excepthook = lambda args: crashed(args.exc_type, args.exc_value, args.exc_traceback)


def keep_logging(program: str, on_loss: OnLoss = OnLoss.DROP) -> None:
    """From now on, a line that cannot be written ends this process only if ``on_loss`` requires it. Once lines can be
    written again, a line says how many were lost."""

    def words(stream: str, lines: int, cause: str) -> str:
        what = f"standard {'output' if stream == 'stdout' else 'error'}"
        message = f"{what} cannot be written ({cause}): later lines are lost, and the work goes on"
        if lines:
            message = f"{what} could not be written ({cause}): {lines:,} lines of it are lost"
        extra = event("output_lost", stream=stream, lines=lines, cause=cause)
        record = logging.makeLogRecord({"msg": message, "levelno": logging.WARNING, "levelname": "WARNING", **extra})
        return _JsonLines(program).format(record) if _logs_json else f"{program}: {message}"

    keep_output(words, on_loss)


def say(program: str, as_json: bool, message: str, extra: dict[str, Any]) -> None:
    """Prints one line to standard output: as plain text, or as JSON like a logged line."""
    if not as_json:
        print(f"{program}: {message}", flush=True)
        return
    record = logging.makeLogRecord({"msg": message, "levelno": logging.INFO, "levelname": "INFO", **extra})
    print(_JsonLines(program).format(record), flush=True)


def _short(value: Any) -> Any:
    # Texts may come from clients, so their length is limited. Numbers that JSON lacks become words.
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
    if isinstance(value, float) and value - value != 0:
        return repr(value)
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value
