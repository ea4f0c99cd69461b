"""How a reference operator is declared, registered and counted, and how a missing one is refused.

Stands in for: op-plugin, the part of torch-npu that finds a kernel for an operator.  Schemas stay torch-npu's own, so
a call that the real one would reject for its arguments is rejected here too.

Leaves out: Meta kernels and derivative formulas, which stay torch-npu's own: its derivative formula for npu_rms_norm
calls npu_rms_norm_backward, which is implemented beside the forward.

An argument that a reference operator does not take is refused when it is given with another value than its default.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

FOLDER = "emulator/fake_npu/operators"

KEPT: dict[str, str] = {
    **dict.fromkeys(
        ("_npu_dtype_cast", "_npu_dtype_cast_backward", "npu_dtype_cast", "npu_dtype_cast_", "npu_dtype_cast_backward"),
        "dtype casts: fake_npu/aten.py",
    ),
    **dict.fromkeys(
        (
            "_npu_format_cast",
            "_npu_format_cast.aclnn",
            "_npu_format_cast.input_dtype",
            "npu_format_cast",
            "npu_format_cast.Tensor",
            "npu_format_cast_",
            "npu_format_cast_.acl_format",
            "get_npu_format",
            "get_storage_size",
        ),
        "memory formats: kernels/fractal_nz.cpp, or a query of torch-npu's own",
    ),
    **dict.fromkeys(
        ("copy_memory_", "npu_change_data_ptr", "set_op_timeout_ms", "_npu_distribute_barrier"),
        "memory and runtime, no kernel: they reach the stand-in runtime",
    ),
}
"""Operators of torch-npu (namespace npu) whose own kernels stay, with the reason."""

CALLS: Counter[str] = Counter()
"""How often each reference operator ran in this process, by qualified name, as in `npu::npu_rms_norm`."""

ABSENT: list[str] = []
"""Reference operators that the installed torch-npu or vllm-ascend has no schema for: they were not registered."""


@dataclass(frozen=True)
class Implementation:
    """A reference operator: its function, and the arguments that it may ignore, each with the reason."""

    name: str
    function: Callable[..., Any]
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The file to edit, relative to the repository."""
        return f"{FOLDER}/{self.function.__module__.rpartition('.')[2]}.py"


IMPLEMENTED: dict[str, Implementation] = {}
"""Every reference operator, registered or not, by qualified name."""

REFUSED: set[str] = set()
"""Operators over which a refuser was registered."""

_libraries: list[torch.library.Library] = []
_registered: set[str] = set()


def implements(
    *names: str, ignored: dict[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function the reference version of the operators `names` ("npu::npu_rms_norm").

    Its parameters carry the names that the schema gives them.  `ignored` names arguments that change no result here.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            IMPLEMENTED[name] = Implementation(name, function, ignored or {})
        return function

    return declare


def leave_out(operator: str, **arguments: object) -> NoReturn:
    """Raise NotImplementedError for arguments (name=value) whose meaning the reference `operator` leaves out."""
    implementation = IMPLEMENTED[operator]
    asked = ", ".join(f"{name}={_describe(value)}" for name, value in arguments.items())
    raise NotImplementedError(f"{operator}: {asked} is left out of the stand-in CANN: add it in {implementation.file}")


def missing(name: str) -> NoReturn:
    """Raise NotImplementedError for an operator without a reference version."""
    raise NotImplementedError(
        f"{name} has no reference version in the stand-in CANN: add one to the module of its theme in {FOLDER}/"
    )


def report() -> str:
    """A line for each group: operators registered, absent from the installed release, and refused."""
    return (
        f"registered ({len(_registered)}): {' '.join(sorted(_registered))}\n"
        f"no schema in the installed release ({len(ABSENT)}): {' '.join(sorted(ABSENT))}\n"
        f"refused ({len(REFUSED)}): {' '.join(sorted(REFUSED))}"
    )


def register(namespaces: Iterable[str]) -> None:
    """Register the reference operators of these namespaces that have a schema; note the others in ABSENT.  Idempotent.

    An operator without a schema now (its library is not loaded yet) is registered by a later call.
    """
    for implementation in IMPLEMENTED.values():
        name = implementation.name
        if name.partition("::")[0] not in namespaces or name in _registered:
            continue
        schema = schema_of(name)
        if schema is None:
            if name not in ABSENT:
                ABSENT.append(name)
            continue
        if name in ABSENT:
            ABSENT.remove(name)
        _impl(name, _kernel(implementation, schema))
        _registered.add(name)


def refuse_the_rest(namespaces: Iterable[str], kept: Iterable[str] = ()) -> None:
    """Put a refuser over each operator of these namespaces with an NPU kernel that is neither ours nor kept.

    torch-npu's own kernels would look for an aclnn function that libopapi.so here does not have, or build an ATB
    operation: some fail with a name that is not the operator's, and some, like npu_rotary_mul, fall back to another
    path in silence.  Idempotent.
    """
    keep = set(KEPT) | set(kept)
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, operator = name.partition("::")
        if namespace in namespaces and operator not in keep and name not in _registered and name not in REFUSED:
            _impl(name, _refuser(name))
            REFUSED.add(name)


def schema_of(name: str) -> torch.FunctionSchema | None:
    """The installed schema of "namespace::operator" or "namespace::operator.overload", or None."""
    qualified, _, overload = name.partition(".")
    for schema in torch._C._jit_get_schemas_for_operator(qualified):
        if schema.overload_name == overload:
            return schema
    return None


def _impl(name: str, kernel: Callable[..., Any]) -> None:
    library = torch.library.Library(name.partition("::")[0], "IMPL")
    # torch < 2.9 has no allow_override: there, replacing a kernel that C++ registered needs no permission.
    options = {"allow_override": True} if "allow_override" in inspect.signature(library.impl).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(name.partition("::")[2], kernel, "PrivateUse1", **options)
    _libraries.append(library)


def _kernel(implementation: Implementation, schema: torch.FunctionSchema) -> Callable[..., Any]:
    """The function that the dispatcher calls: counts, gives arguments by name, refuses those that are left out."""
    arguments = list(schema.arguments)
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    taken = set(inspect.signature(implementation.function).parameters)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        CALLS[implementation.name] += 1
        given = dict(defaults)
        given.update(zip((argument.name for argument in arguments), args, strict=False))
        given.update(kwargs)
        for name, value in given.items():
            if name in taken or name in implementation.ignored:
                continue
            if not _same(value, defaults.get(name)):
                leave_out(implementation.name, **{name: value})
        return implementation.function(**{name: value for name, value in given.items() if name in taken})

    return kernel


def _refuser(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        missing(name)

    return refuse


def _same(value: object, default: object) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is default
    if isinstance(value, list) and isinstance(default, list | type(None)):
        return value == (default or [])
    return value is default or value == default


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return repr(value)
