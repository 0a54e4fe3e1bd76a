from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Span(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class FromClient(_message.Message):
    __slots__ = ("id", "hello", "renew", "leave", "register", "lend", "reclaim", "unregister", "borrow", "give_back", "give_up", "free", "scrubbed")
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    RECLAIM_FIELD_NUMBER: _ClassVar[int]
    UNREGISTER_FIELD_NUMBER: _ClassVar[int]
    BORROW_FIELD_NUMBER: _ClassVar[int]
    GIVE_BACK_FIELD_NUMBER: _ClassVar[int]
    GIVE_UP_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_FIELD_NUMBER: _ClassVar[int]
    id: int
    hello: Hello
    renew: Renew
    leave: Leave
    register: Register
    lend: Lend
    reclaim: Reclaim
    unregister: Unregister
    borrow: Borrow
    give_back: GiveBack
    give_up: GiveUp
    free: Free
    scrubbed: Scrubbed
    def __init__(self, id: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., register: _Optional[_Union[Register, _Mapping]] = ..., lend: _Optional[_Union[Lend, _Mapping]] = ..., reclaim: _Optional[_Union[Reclaim, _Mapping]] = ..., unregister: _Optional[_Union[Unregister, _Mapping]] = ..., borrow: _Optional[_Union[Borrow, _Mapping]] = ..., give_back: _Optional[_Union[GiveBack, _Mapping]] = ..., give_up: _Optional[_Union[GiveUp, _Mapping]] = ..., free: _Optional[_Union[Free, _Mapping]] = ..., scrubbed: _Optional[_Union[Scrubbed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("key", "name", "domain", "claims", "arenas")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    ARENAS_FIELD_NUMBER: _ClassVar[int]
    key: int
    name: str
    domain: str
    claims: _containers.RepeatedCompositeFieldContainer[Claim]
    arenas: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[int] = ..., name: _Optional[str] = ..., domain: _Optional[str] = ..., claims: _Optional[_Iterable[_Union[Claim, _Mapping]]] = ..., arenas: _Optional[_Iterable[int]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("generation", "arena", "held")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    generation: int
    arena: int
    held: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, generation: _Optional[int] = ..., arena: _Optional[int] = ..., held: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Terms(_message.Message):
    __slots__ = ("size", "name", "kind", "domain", "bandwidth", "cap", "scrub", "device")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    size: int
    name: str
    kind: str
    domain: str
    bandwidth: int
    cap: int
    scrub: bool
    device: str
    def __init__(self, size: _Optional[int] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., domain: _Optional[str] = ..., bandwidth: _Optional[int] = ..., cap: _Optional[int] = ..., scrub: _Optional[bool] = ..., device: _Optional[str] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("tag", "arena", "terms", "lent")
    TAG_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    tag: int
    arena: int
    terms: Terms
    lent: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, tag: _Optional[int] = ..., arena: _Optional[int] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., lent: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Lend(_message.Message):
    __slots__ = ("arena", "span")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    arena: int
    span: Span
    def __init__(self, arena: _Optional[int] = ..., span: _Optional[_Union[Span, _Mapping]] = ...) -> None: ...

class Reclaim(_message.Message):
    __slots__ = ("arena", "limit", "deadline_ms", "revoke")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REVOKE_FIELD_NUMBER: _ClassVar[int]
    arena: int
    limit: int
    deadline_ms: int
    revoke: bool
    def __init__(self, arena: _Optional[int] = ..., limit: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., revoke: _Optional[bool] = ...) -> None: ...

class Unregister(_message.Message):
    __slots__ = ("arena", "abandon")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    arena: int
    abandon: bool
    def __init__(self, arena: _Optional[int] = ..., abandon: _Optional[bool] = ...) -> None: ...

class Borrow(_message.Message):
    __slots__ = ("bytes", "unit", "pieces", "minimum", "priority", "prefer", "kinds", "avoid")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PREFER_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    AVOID_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    unit: int
    pieces: int
    minimum: int
    priority: int
    prefer: _containers.RepeatedScalarFieldContainer[str]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    avoid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bytes: _Optional[int] = ..., unit: _Optional[int] = ..., pieces: _Optional[int] = ..., minimum: _Optional[int] = ..., priority: _Optional[int] = ..., prefer: _Optional[_Iterable[str]] = ..., kinds: _Optional[_Iterable[str]] = ..., avoid: _Optional[_Iterable[int]] = ...) -> None: ...

class GiveBack(_message.Message):
    __slots__ = ("generation", "start", "end")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    generation: int
    start: int
    end: int
    def __init__(self, generation: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class GiveUp(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class Free(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class Scrubbed(_message.Message):
    __slots__ = ("arena", "number")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    arena: int
    number: int
    def __init__(self, arena: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class ToClient(_message.Message):
    __slots__ = ("id", "welcome", "registered", "granted", "refused", "done", "error", "revoke", "lost", "returned", "scrub")
    ID_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REVOKE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    id: int
    welcome: Welcome
    registered: Registered
    granted: Granted
    refused: Refused
    done: Done
    error: Error
    revoke: Revoke
    lost: Lost
    returned: Returned
    scrub: Scrub
    def __init__(self, id: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., registered: _Optional[_Union[Registered, _Mapping]] = ..., granted: _Optional[_Union[Granted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., revoke: _Optional[_Union[Revoke, _Mapping]] = ..., lost: _Optional[_Union[Lost, _Mapping]] = ..., returned: _Optional[_Union[Returned, _Mapping]] = ..., scrub: _Optional[_Union[Scrub, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("key", "term_ms")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TERM_MS_FIELD_NUMBER: _ClassVar[int]
    key: int
    term_ms: int
    def __init__(self, key: _Optional[int] = ..., term_ms: _Optional[int] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("arena",)
    ARENA_FIELD_NUMBER: _ClassVar[int]
    arena: int
    def __init__(self, arena: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("generation", "arena", "offset", "bytes", "terms", "lender", "pid")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    LENDER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    generation: int
    arena: int
    offset: int
    bytes: int
    terms: Terms
    lender: str
    pid: int
    def __init__(self, generation: _Optional[int] = ..., arena: _Optional[int] = ..., offset: _Optional[int] = ..., bytes: _Optional[int] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., lender: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("lease", "pieces")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    lease: int
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    def __init__(self, lease: _Optional[int] = ..., pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "free", "longest")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    reason: str
    free: int
    longest: int
    def __init__(self, reason: _Optional[str] = ..., free: _Optional[int] = ..., longest: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("left", "held")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    left: int
    held: int
    def __init__(self, left: _Optional[int] = ..., held: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "field", "value", "allowed")
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    field: str
    value: str
    allowed: str
    def __init__(self, kind: _Optional[str] = ..., field: _Optional[str] = ..., value: _Optional[str] = ..., allowed: _Optional[str] = ...) -> None: ...

class Revoke(_message.Message):
    __slots__ = ("generation", "keep", "deadline_ms")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    keep: int
    deadline_ms: int
    def __init__(self, generation: _Optional[int] = ..., keep: _Optional[int] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("arena", "span")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    arena: int
    span: Span
    def __init__(self, arena: _Optional[int] = ..., span: _Optional[_Union[Span, _Mapping]] = ...) -> None: ...

class Scrub(_message.Message):
    __slots__ = ("arena", "span", "number")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    arena: int
    span: Span
    number: int
    def __init__(self, arena: _Optional[int] = ..., span: _Optional[_Union[Span, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClientRow(_message.Message):
    __slots__ = ("name", "pid", "state", "lent", "held", "wanted")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    state: str
    lent: int
    held: int
    wanted: int
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., lent: _Optional[int] = ..., held: _Optional[int] = ..., wanted: _Optional[int] = ...) -> None: ...

class ArenaRow(_message.Message):
    __slots__ = ("arena", "name", "lender", "pid", "kind", "domain", "lent", "free", "dirty", "held", "wanted")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENDER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    DIRTY_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    arena: int
    name: str
    lender: str
    pid: int
    kind: str
    domain: str
    lent: int
    free: int
    dirty: int
    held: int
    wanted: int
    def __init__(self, arena: _Optional[int] = ..., name: _Optional[str] = ..., lender: _Optional[str] = ..., pid: _Optional[int] = ..., kind: _Optional[str] = ..., domain: _Optional[str] = ..., lent: _Optional[int] = ..., free: _Optional[int] = ..., dirty: _Optional[int] = ..., held: _Optional[int] = ..., wanted: _Optional[int] = ...) -> None: ...

class LeaseRow(_message.Message):
    __slots__ = ("lease", "generation", "arena", "holder", "pid", "held", "wanted", "age_ms", "deadline_ms", "quarantined")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    lease: int
    generation: int
    arena: int
    holder: str
    pid: int
    held: int
    wanted: int
    age_ms: int
    deadline_ms: int
    quarantined: bool
    def __init__(self, lease: _Optional[int] = ..., generation: _Optional[int] = ..., arena: _Optional[int] = ..., holder: _Optional[str] = ..., pid: _Optional[int] = ..., held: _Optional[int] = ..., wanted: _Optional[int] = ..., age_ms: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., quarantined: _Optional[bool] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("clients", "arenas", "leases", "term_ms", "up_ms")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    ARENAS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TERM_MS_FIELD_NUMBER: _ClassVar[int]
    UP_MS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[ClientRow]
    arenas: _containers.RepeatedCompositeFieldContainer[ArenaRow]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseRow]
    term_ms: int
    up_ms: int
    def __init__(self, clients: _Optional[_Iterable[_Union[ClientRow, _Mapping]]] = ..., arenas: _Optional[_Iterable[_Union[ArenaRow, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[LeaseRow, _Mapping]]] = ..., term_ms: _Optional[int] = ..., up_ms: _Optional[int] = ...) -> None: ...
