from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_CONTRIBUTE: _ClassVar[Purpose]
    PURPOSE_ABSTAIN: _ClassVar[Purpose]
    PURPOSE_RESTORE: _ClassVar[Purpose]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_COMMITTED: _ClassVar[Outcome]
    OUTCOME_STALE: _ClassVar[Outcome]
    OUTCOME_ALREADY_COUNTED: _ClassVar[Outcome]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_UNINITIALIZED: _ClassVar[Phase]
    PHASE_IDLE: _ClassVar[Phase]
    PHASE_AVERAGING: _ClassVar[Phase]
    PHASE_STOPPING: _ClassVar[Phase]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_TCP: _ClassVar[Transport]
    TRANSPORT_UNIX: _ClassVar[Transport]
    TRANSPORT_SHARED_MEMORY: _ClassVar[Transport]
    TRANSPORT_DATA_CONNECTION: _ClassVar[Transport]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_MESSAGE_MALFORMED: _ClassVar[ErrorReason]
    ERROR_REASON_MESSAGE_OUT_OF_ORDER: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_INITIALIZED: _ClassVar[ErrorReason]
    ERROR_REASON_MANIFEST_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_MANIFEST_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_MANIFEST_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_GLOBAL_STEP_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_WORKER_ID_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_WORKER_ID_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_INCARNATION_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_WEIGHT_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_BASE_STEP_AHEAD: _ClassVar[ErrorReason]
    ERROR_REASON_UNTOUCHED_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_ROUND_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_ROUND_RESTARTED: _ClassVar[ErrorReason]
    ERROR_REASON_PUSH_SUPERSEDED: _ClassVar[ErrorReason]
    ERROR_REASON_FRAGMENT_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_FRAGMENT_EXTRA: _ClassVar[ErrorReason]
    ERROR_REASON_FRAGMENT_MISPLACED: _ClassVar[ErrorReason]
    ERROR_REASON_FRAGMENT_REPEATED: _ClassVar[ErrorReason]
    ERROR_REASON_FRAGMENT_SIZE_WRONG: _ClassVar[ErrorReason]
    ERROR_REASON_STREAM_STALLED: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_STOPPING: _ClassVar[ErrorReason]
    ERROR_REASON_ROUND_TIMED_OUT: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_ROLE_INSUFFICIENT: _ClassVar[ErrorReason]
    ERROR_REASON_DATA_CONNECTION_LOST: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_OVERLOADED: _ClassVar[ErrorReason]
    ERROR_REASON_READER_TOO_SLOW: _ClassVar[ErrorReason]
    ERROR_REASON_CODEC_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_OUTER_OPTIMIZER_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_OUTER_OPTIMIZER_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_COMPRESSION_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_BASE_UNKNOWN: _ClassVar[ErrorReason]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_CONTRIBUTE: Purpose
PURPOSE_ABSTAIN: Purpose
PURPOSE_RESTORE: Purpose
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_COMMITTED: Outcome
OUTCOME_STALE: Outcome
OUTCOME_ALREADY_COUNTED: Outcome
PHASE_UNSPECIFIED: Phase
PHASE_UNINITIALIZED: Phase
PHASE_IDLE: Phase
PHASE_AVERAGING: Phase
PHASE_STOPPING: Phase
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_TCP: Transport
TRANSPORT_UNIX: Transport
TRANSPORT_SHARED_MEMORY: Transport
TRANSPORT_DATA_CONNECTION: Transport
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_MESSAGE_MALFORMED: ErrorReason
ERROR_REASON_MESSAGE_OUT_OF_ORDER: ErrorReason
ERROR_REASON_NOT_INITIALIZED: ErrorReason
ERROR_REASON_MANIFEST_INVALID: ErrorReason
ERROR_REASON_MANIFEST_MISMATCH: ErrorReason
ERROR_REASON_MANIFEST_UNKNOWN: ErrorReason
ERROR_REASON_GLOBAL_STEP_INVALID: ErrorReason
ERROR_REASON_WORKER_ID_INVALID: ErrorReason
ERROR_REASON_WORKER_ID_IN_USE: ErrorReason
ERROR_REASON_INCARNATION_INVALID: ErrorReason
ERROR_REASON_WEIGHT_INVALID: ErrorReason
ERROR_REASON_BASE_STEP_AHEAD: ErrorReason
ERROR_REASON_UNTOUCHED_INVALID: ErrorReason
ERROR_REASON_ROUND_FULL: ErrorReason
ERROR_REASON_ROUND_RESTARTED: ErrorReason
ERROR_REASON_PUSH_SUPERSEDED: ErrorReason
ERROR_REASON_FRAGMENT_MISSING: ErrorReason
ERROR_REASON_FRAGMENT_EXTRA: ErrorReason
ERROR_REASON_FRAGMENT_MISPLACED: ErrorReason
ERROR_REASON_FRAGMENT_REPEATED: ErrorReason
ERROR_REASON_FRAGMENT_SIZE_WRONG: ErrorReason
ERROR_REASON_STREAM_STALLED: ErrorReason
ERROR_REASON_SERVER_STOPPING: ErrorReason
ERROR_REASON_ROUND_TIMED_OUT: ErrorReason
ERROR_REASON_TOKEN_INVALID: ErrorReason
ERROR_REASON_ROLE_INSUFFICIENT: ErrorReason
ERROR_REASON_DATA_CONNECTION_LOST: ErrorReason
ERROR_REASON_SERVER_OVERLOADED: ErrorReason
ERROR_REASON_READER_TOO_SLOW: ErrorReason
ERROR_REASON_CODEC_UNKNOWN: ErrorReason
ERROR_REASON_OUTER_OPTIMIZER_INVALID: ErrorReason
ERROR_REASON_OUTER_OPTIMIZER_MISMATCH: ErrorReason
ERROR_REASON_COMPRESSION_MISMATCH: ErrorReason
ERROR_REASON_BASE_UNKNOWN: ErrorReason

class Variable(_message.Message):
    __slots__ = ("name", "data_type", "shape", "part")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    name: str
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    part: Part
    def __init__(self, name: _Optional[str] = ..., data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("variable", "start", "shape")
    VARIABLE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    variable: int
    start: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, variable: _Optional[int] = ..., start: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("index", "count", "job_id")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    job_id: bytes
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ..., job_id: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("variables", "fragment_size_bytes", "shard", "frozen_digests")
    VARIABLES_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FROZEN_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    variables: _containers.RepeatedCompositeFieldContainer[Variable]
    fragment_size_bytes: int
    shard: Shard
    frozen_digests: bytes
    def __init__(self, variables: _Optional[_Iterable[_Union[Variable, _Mapping]]] = ..., fragment_size_bytes: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., frozen_digests: _Optional[bytes] = ...) -> None: ...

class Fragment(_message.Message):
    __slots__ = ("index", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class InitializeRequest(_message.Message):
    __slots__ = ("header", "fragment")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    header: InitializeHeader
    fragment: Fragment
    def __init__(self, header: _Optional[_Union[InitializeHeader, _Mapping]] = ..., fragment: _Optional[_Union[Fragment, _Mapping]] = ...) -> None: ...

class InitializeHeader(_message.Message):
    __slots__ = ("worker_id", "manifest", "global_step", "outer_optimizer", "compression")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    OUTER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    manifest: Manifest
    global_step: int
    outer_optimizer: str
    compression: str
    def __init__(self, worker_id: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., global_step: _Optional[int] = ..., outer_optimizer: _Optional[str] = ..., compression: _Optional[str] = ...) -> None: ...

class InitializeResponse(_message.Message):
    __slots__ = ("initialized", "global_step", "manifest_id", "num_workers", "shard", "outer_optimizer", "compression")
    INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OUTER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    initialized: bool
    global_step: int
    manifest_id: str
    num_workers: int
    shard: Shard
    outer_optimizer: str
    compression: str
    def __init__(self, initialized: bool = ..., global_step: _Optional[int] = ..., manifest_id: _Optional[str] = ..., num_workers: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., outer_optimizer: _Optional[str] = ..., compression: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("worker_id", "wait_initialized", "header_only", "accepts_notices", "will_train", "first_fragment", "continued_step", "outer_optimizer", "compression")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    HEADER_ONLY_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_NOTICES_FIELD_NUMBER: _ClassVar[int]
    WILL_TRAIN_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    CONTINUED_STEP_FIELD_NUMBER: _ClassVar[int]
    OUTER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    wait_initialized: bool
    header_only: bool
    accepts_notices: bool
    will_train: bool
    first_fragment: int
    continued_step: int
    outer_optimizer: str
    compression: str
    def __init__(self, worker_id: _Optional[str] = ..., wait_initialized: bool = ..., header_only: bool = ..., accepts_notices: bool = ..., will_train: bool = ..., first_fragment: _Optional[int] = ..., continued_step: _Optional[int] = ..., outer_optimizer: _Optional[str] = ..., compression: _Optional[str] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "fragment", "waiting")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    header: CenterHeader
    fragment: Fragment
    waiting: ChiefNotice
    def __init__(self, header: _Optional[_Union[CenterHeader, _Mapping]] = ..., fragment: _Optional[_Union[Fragment, _Mapping]] = ..., waiting: _Optional[_Union[ChiefNotice, _Mapping]] = ...) -> None: ...

class ChiefNotice(_message.Message):
    __slots__ = ("waited_s",)
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    waited_s: float
    def __init__(self, waited_s: _Optional[float] = ...) -> None: ...

class CenterHeader(_message.Message):
    __slots__ = ("manifest", "manifest_id", "global_step", "num_workers", "outer_optimizer", "compression", "center_id")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ID_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    OUTER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CENTER_ID_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    manifest_id: str
    global_step: int
    num_workers: int
    outer_optimizer: str
    compression: str
    center_id: int
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., manifest_id: _Optional[str] = ..., global_step: _Optional[int] = ..., num_workers: _Optional[int] = ..., outer_optimizer: _Optional[str] = ..., compression: _Optional[str] = ..., center_id: _Optional[int] = ...) -> None: ...

class PushAndAverageRequest(_message.Message):
    __slots__ = ("header", "fragment", "shared")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    fragment: Fragment
    shared: SharedFragments
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., fragment: _Optional[_Union[Fragment, _Mapping]] = ..., shared: _Optional[_Union[SharedFragments, _Mapping]] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("worker_id", "incarnation", "push_id", "is_chief", "base_step", "local_step", "weight", "manifest_id", "untouched_variables", "accepts_shared_memory", "fragments_follow", "accepts_runs", "loss", "accepts_data_connection", "uses_data_connection", "interval_steps", "purpose", "half_duplex", "accepts_combined", "accepts_transports", "uses_transport", "codec", "base_center_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    IS_CHIEF_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ID_FIELD_NUMBER: _ClassVar[int]
    UNTOUCHED_VARIABLES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_RUNS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_DATA_CONNECTION_FIELD_NUMBER: _ClassVar[int]
    USES_DATA_CONNECTION_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    HALF_DUPLEX_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_COMBINED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    USES_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BASE_CENTER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: bytes
    push_id: int
    is_chief: bool
    base_step: int
    local_step: int
    weight: float
    manifest_id: str
    untouched_variables: _containers.RepeatedScalarFieldContainer[int]
    accepts_shared_memory: bool
    fragments_follow: bool
    accepts_runs: bool
    loss: float
    accepts_data_connection: bool
    uses_data_connection: bool
    interval_steps: int
    purpose: Purpose
    half_duplex: bool
    accepts_combined: bool
    accepts_transports: _containers.RepeatedScalarFieldContainer[str]
    uses_transport: str
    codec: str
    base_center_id: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., push_id: _Optional[int] = ..., is_chief: bool = ..., base_step: _Optional[int] = ..., local_step: _Optional[int] = ..., weight: _Optional[float] = ..., manifest_id: _Optional[str] = ..., untouched_variables: _Optional[_Iterable[int]] = ..., accepts_shared_memory: bool = ..., fragments_follow: bool = ..., accepts_runs: bool = ..., loss: _Optional[float] = ..., accepts_data_connection: bool = ..., uses_data_connection: bool = ..., interval_steps: _Optional[int] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., half_duplex: bool = ..., accepts_combined: bool = ..., accepts_transports: _Optional[_Iterable[str]] = ..., uses_transport: _Optional[str] = ..., codec: _Optional[str] = ..., base_center_id: _Optional[int] = ...) -> None: ...

class PushAndAverageResponse(_message.Message):
    __slots__ = ("admission", "fragment", "outcome", "shared", "waiting")
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    admission: PushAdmission
    fragment: Fragment
    outcome: PushOutcome
    shared: SharedFragments
    waiting: WaitingNotice
    def __init__(self, admission: _Optional[_Union[PushAdmission, _Mapping]] = ..., fragment: _Optional[_Union[Fragment, _Mapping]] = ..., outcome: _Optional[_Union[PushOutcome, _Mapping]] = ..., shared: _Optional[_Union[SharedFragments, _Mapping]] = ..., waiting: _Optional[_Union[WaitingNotice, _Mapping]] = ...) -> None: ...

class PushAdmission(_message.Message):
    __slots__ = ("first_needed_fragment", "contribution", "average", "data_connection", "offers", "codec")
    FIRST_NEEDED_FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_CONNECTION_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    first_needed_fragment: int
    contribution: SharedMemory
    average: SharedMemory
    data_connection: DataConnection
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    codec: str
    def __init__(self, first_needed_fragment: _Optional[int] = ..., contribution: _Optional[_Union[SharedMemory, _Mapping]] = ..., average: _Optional[_Union[SharedMemory, _Mapping]] = ..., data_connection: _Optional[_Union[DataConnection, _Mapping]] = ..., offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., codec: _Optional[str] = ...) -> None: ...

class WaitingNotice(_message.Message):
    __slots__ = ("waiting_for", "waiting_for_unknown", "round_age_s", "waiting_for_omitted", "missing", "finished", "finished_omitted", "workers_training")
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    ROUND_AGE_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_OMITTED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_OMITTED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_TRAINING_FIELD_NUMBER: _ClassVar[int]
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    waiting_for_unknown: int
    round_age_s: float
    waiting_for_omitted: int
    missing: _containers.RepeatedCompositeFieldContainer[MissingWorker]
    finished: _containers.RepeatedScalarFieldContainer[str]
    finished_omitted: int
    workers_training: int
    def __init__(self, waiting_for: _Optional[_Iterable[str]] = ..., waiting_for_unknown: _Optional[int] = ..., round_age_s: _Optional[float] = ..., waiting_for_omitted: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[MissingWorker, _Mapping]]] = ..., finished: _Optional[_Iterable[str]] = ..., finished_omitted: _Optional[int] = ..., workers_training: _Optional[int] = ...) -> None: ...

class MissingWorker(_message.Message):
    __slots__ = ("has_left", "last_seen_age_s")
    HAS_LEFT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    has_left: bool
    last_seen_age_s: float
    def __init__(self, has_left: bool = ..., last_seen_age_s: _Optional[float] = ...) -> None: ...

class PushOutcome(_message.Message):
    __slots__ = ("outcome", "global_step", "contributors", "waited_s", "untouched_variables", "nonfinite_values", "center_id")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    UNTOUCHED_VARIABLES_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_VALUES_FIELD_NUMBER: _ClassVar[int]
    CENTER_ID_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    global_step: int
    contributors: _containers.RepeatedScalarFieldContainer[str]
    waited_s: float
    untouched_variables: _containers.RepeatedScalarFieldContainer[int]
    nonfinite_values: int
    center_id: int
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., global_step: _Optional[int] = ..., contributors: _Optional[_Iterable[str]] = ..., waited_s: _Optional[float] = ..., untouched_variables: _Optional[_Iterable[int]] = ..., nonfinite_values: _Optional[int] = ..., center_id: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "finished")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: bytes
    finished: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., finished: bool = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ("workers_training", "global_step")
    WORKERS_TRAINING_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    workers_training: int
    global_step: int
    def __init__(self, workers_training: _Optional[int] = ..., global_step: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("incarnation", "task_index")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TASK_INDEX_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    task_index: int
    def __init__(self, incarnation: _Optional[bytes] = ..., task_index: _Optional[int] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("task_index", "num_workers")
    TASK_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    task_index: int
    num_workers: int
    def __init__(self, task_index: _Optional[int] = ..., num_workers: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("phase", "global_step", "num_workers", "waiting_for", "waiting_for_unknown", "round_age_s", "workers", "model_size_bytes", "manifest_id", "received_bytes", "sent_bytes", "uptime_s", "last_round_s", "rounds_restarted", "stale_pushes", "shared_bytes", "min_workers", "rounds_without_all", "checkpoint_step", "checkpoint_problem", "shard", "rounds_committed", "rounds_per_minute", "pushes_retried", "connected_workers", "checkpoint_age_s", "workers_omitted", "waiting_for_omitted", "checkpoint_writing_s", "workers_finished", "job_over", "outer_optimizer", "compression", "received_raw_bytes", "sent_raw_bytes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    ROUND_AGE_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_S_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_RESTARTED_FIELD_NUMBER: _ClassVar[int]
    STALE_PUSHES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MIN_WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_WITHOUT_ALL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    PUSHES_RETRIED_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_OMITTED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_OMITTED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WRITING_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    JOB_OVER_FIELD_NUMBER: _ClassVar[int]
    OUTER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    global_step: int
    num_workers: int
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    waiting_for_unknown: int
    round_age_s: float
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    model_size_bytes: int
    manifest_id: str
    received_bytes: int
    sent_bytes: int
    uptime_s: float
    last_round_s: float
    rounds_restarted: int
    stale_pushes: int
    shared_bytes: int
    min_workers: int
    rounds_without_all: int
    checkpoint_step: int
    checkpoint_problem: str
    shard: Shard
    rounds_committed: int
    rounds_per_minute: float
    pushes_retried: int
    connected_workers: int
    checkpoint_age_s: float
    workers_omitted: int
    waiting_for_omitted: int
    checkpoint_writing_s: float
    workers_finished: int
    job_over: bool
    outer_optimizer: str
    compression: str
    received_raw_bytes: int
    sent_raw_bytes: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., global_step: _Optional[int] = ..., num_workers: _Optional[int] = ..., waiting_for: _Optional[_Iterable[str]] = ..., waiting_for_unknown: _Optional[int] = ..., round_age_s: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., model_size_bytes: _Optional[int] = ..., manifest_id: _Optional[str] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., uptime_s: _Optional[float] = ..., last_round_s: _Optional[float] = ..., rounds_restarted: _Optional[int] = ..., stale_pushes: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., min_workers: _Optional[int] = ..., rounds_without_all: _Optional[int] = ..., checkpoint_step: _Optional[int] = ..., checkpoint_problem: _Optional[str] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., rounds_committed: _Optional[int] = ..., rounds_per_minute: _Optional[float] = ..., pushes_retried: _Optional[int] = ..., connected_workers: _Optional[int] = ..., checkpoint_age_s: _Optional[float] = ..., workers_omitted: _Optional[int] = ..., waiting_for_omitted: _Optional[int] = ..., checkpoint_writing_s: _Optional[float] = ..., workers_finished: _Optional[int] = ..., job_over: bool = ..., outer_optimizer: _Optional[str] = ..., compression: _Optional[str] = ..., received_raw_bytes: _Optional[int] = ..., sent_raw_bytes: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "is_chief", "local_step", "fragments_given", "waiting", "last_seen_age_s", "nonfinite_values", "pushes_counted", "lateness_s", "loss", "transport", "peer", "has_finished", "has_left", "interval_steps")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    IS_CHIEF_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEP_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_GIVEN_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_VALUES_FIELD_NUMBER: _ClassVar[int]
    PUSHES_COUNTED_FIELD_NUMBER: _ClassVar[int]
    LATENESS_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    HAS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    HAS_LEFT_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    is_chief: bool
    local_step: int
    fragments_given: int
    waiting: bool
    last_seen_age_s: float
    nonfinite_values: int
    pushes_counted: int
    lateness_s: float
    loss: float
    transport: Transport
    peer: str
    has_finished: bool
    has_left: bool
    interval_steps: int
    def __init__(self, worker_id: _Optional[str] = ..., is_chief: bool = ..., local_step: _Optional[int] = ..., fragments_given: _Optional[int] = ..., waiting: bool = ..., last_seen_age_s: _Optional[float] = ..., nonfinite_values: _Optional[int] = ..., pushes_counted: _Optional[int] = ..., lateness_s: _Optional[float] = ..., loss: _Optional[float] = ..., transport: _Optional[_Union[Transport, str]] = ..., peer: _Optional[str] = ..., has_finished: bool = ..., has_left: bool = ..., interval_steps: _Optional[int] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("path", "nonce")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    path: str
    nonce: bytes
    def __init__(self, path: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class SharedFragments(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class DataConnection(_message.Message):
    __slots__ = ("port", "key")
    PORT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    port: int
    key: bytes
    def __init__(self, port: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("transport", "details")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    details: bytes
    def __init__(self, transport: _Optional[str] = ..., details: _Optional[bytes] = ...) -> None: ...
