"""What a request to make a kernel may hold. Checked here, field by field, before anything is done with it. No
IO."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nbos_cluster import keys

from ..limits import Limits
from ..options import KernelOptions, OptionError, parse_options
from .errors import ApiError

MAX_BODY = 1024 * 1024
"""Bytes of one request."""

_ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
_MAX_ENV = 256
_MAX_ENV_VALUE = 32 * 1024


class ResourcesWanted(msgspec.Struct, forbid_unknown_fields=True):
    gpus: int = 0
    tpcs: int = 0
    memory: int | str = 0
    model: str = ""


class KernelWanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST api/kernels."""

    kernel_id: str
    replicas: int | None = None
    resources: ResourcesWanted | None = None
    lazy: int | str | bool | None = None
    image: str = ""
    cwd: str = ""
    env: dict[str, str] = {}


def read_kernel_wanted(body: bytes) -> KernelWanted:
    """The request in `body`. Raises ApiError 400 that names the field."""
    try:
        wanted = msgspec.json.decode(body, type=KernelWanted)
    except msgspec.DecodeError as err:  # ValidationError is one as well
        raise ApiError(400, "malformed", f"the body is not a kernel request: {err}") from err
    except UnicodeDecodeError as err:
        raise ApiError(400, "malformed", "the body is not UTF-8") from err
    _check_id(wanted.kernel_id)
    _check_place(wanted)
    return wanted


def _check_id(kernel_id: str) -> None:
    try:
        keys.checked(kernel_id, "kernel_id")
    except ValueError as err:
        raise ApiError(400, "malformed", str(err)) from err


def _check_place(wanted: KernelWanted) -> None:
    if wanted.cwd and (not wanted.cwd.startswith("/") or "\0" in wanted.cwd or len(wanted.cwd) > 4096):
        raise ApiError(400, "malformed", "cwd must be an absolute path of at most 4096 characters")
    if len(wanted.env) > _MAX_ENV:
        raise ApiError(400, "malformed", f"env has {len(wanted.env)} variables; send at most {_MAX_ENV}")
    for name, value in wanted.env.items():
        if not _ENV_NAME.match(name):
            raise ApiError(400, "malformed", f"env: {name[:60]!r} is no name of a variable")
        if "\0" in value or len(value) > _MAX_ENV_VALUE:
            raise ApiError(400, "malformed", f"env: {name} must hold at most {_MAX_ENV_VALUE} characters and no NUL")


def options_of(wanted: KernelWanted, limits: Limits) -> KernelOptions:
    """The checked options. Raises ApiError 403 when only a bound is passed, 400 when they make no sense."""
    data: dict[str, Any] = msgspec.to_builtins(wanted.resources) if wanted.resources else {}
    if wanted.replicas is not None:
        data["replicas"] = wanted.replicas
    if wanted.image:
        data["image"] = wanted.image
    if wanted.lazy is not None:
        data["lazy"] = wanted.lazy
    try:
        return parse_options(data, limits)
    except OptionError as err:
        raise (ApiError(403, "over_limit", str(err)) if err.limit else ApiError(400, "malformed", str(err))) from err


def check_count(have: int, limits: Limits) -> None:
    """Raise ApiError 403 when the caller has as many kernels as they may."""
    if have >= limits.kernels:
        raise ApiError(
            403, "over_limit", f"you have {have} kernels, your limit is {limits.kernels}; shut one down first"
        )
