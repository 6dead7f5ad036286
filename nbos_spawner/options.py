"""The options a user's kernels start with, checked against their limits. No IO.

One check for the form, for `user_options` over the hub's REST API and for the gateway's requests; every
refusal names the field, the bound and the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .limits import Limits, is_image
from .sizes import parse_size, show_size


class OptionError(ValueError):
    """An option that cannot be taken. `limit` is true when it is only too much, not malformed."""

    def __init__(self, field: str, message: str, *, limit: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit

    @property
    def jupyterhub_message(self) -> str:
        """What JupyterHub's spawn page shows."""
        return str(self)


@dataclass(frozen=True)
class KernelOptions:
    """What a new kernel gets when the notebook asks for nothing else. memory is bytes on each device. lazy: bytes from
    which standbys leave variables in the store until they are looked up, 0 = they hold everything. image: '' is the
    hosts' own."""

    replicas: int = 3
    lazy: int = 0
    gpus: int = 0
    tpcs: int = 0
    memory: int = 0
    model: str = ""
    image: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resources(self) -> dict[str, Any]:
        """The part that a record's `Resources` holds."""
        return {k: v for k, v in asdict(self).items() if k not in ("replicas", "lazy", "image")}


FIELDS = tuple(KernelOptions.__dataclass_fields__)


LAZY_FROM = 64 << 20
"""What `lazy` means when it is only switched on."""

_SWITCH = {"on": LAZY_FROM, "true": LAZY_FROM, "yes": LAZY_FROM, "off": 0, "false": 0, "no": 0}


def parse_options(data: Mapping[str, Any], limits: Limits, lazy: int = 0) -> KernelOptions:
    """The options in `data` (values may be text, as from a form). `lazy`: the site's. Raises OptionError."""
    unknown = sorted(set(data) - set(FIELDS))
    if unknown:
        raise OptionError(unknown[0], f"unknown option {unknown[0]!r}; there are {', '.join(FIELDS)}")
    options = KernelOptions(
        replicas=_whole(data, "replicas", min(3, limits.replicas)),
        lazy=parse_lazy(data.get("lazy"), lazy),
        gpus=_whole(data, "gpus", 0),
        tpcs=_whole(data, "tpcs", 0),
        memory=_memory(data),
        model=_model(data),
        image=_image(data),
    )
    check_options(options, limits)
    return options


def check_options(options: KernelOptions, limits: Limits) -> None:
    """Raise OptionError when `options` contradict themselves or pass a bound of `limits`."""
    if options.replicas < 1:
        raise OptionError("replicas", "a kernel needs at least 1 replica; ask for 1 to 5")
    for name, unit in (("replicas", "replicas"), ("gpus", "whole GPUs"), ("tpcs", "TPCs")):
        asked, bound = getattr(options, name), getattr(limits, name)
        if asked > bound:
            raise OptionError(
                name, f"{asked} {unit} asked for, your limit is {bound}; ask for at most {bound}", limit=True
            )
    if limits.memory and options.memory > limits.memory:
        bound_text = show_size(limits.memory)
        raise OptionError(
            "memory",
            f"{show_size(options.memory)} of GPU memory asked for, your limit is {bound_text}; ask for at most "
            f"{bound_text}",
            limit=True,
        )
    if options.image and options.image not in limits.images:
        choice = ", ".join(limits.images) or "none"
        raise OptionError(
            "image",
            f"image {options.image!r} is not one you may use; there are: {choice}; leave it empty for the hosts' own",
            limit=True,
        )
    if options.gpus and options.tpcs:
        raise OptionError("tpcs", "whole GPUs and a slice exclude each other; set GPUs or TPCs to 0")
    if (options.memory or options.model) and not (options.gpus or options.tpcs):
        raise OptionError("memory", "GPU memory or a GPU model without a GPU; ask for GPUs or a slice of TPCs as well")


def options_from_form(form: Mapping[str, list[str]], limits: Limits, lazy: int = 0) -> dict[str, Any]:
    """The checked options of a posted form, ready for JSON. Empty fields mean the default."""
    data = {}
    for name, values in form.items():
        if name.startswith("_"):  # the hub's own fields, such as _xsrf
            continue
        if len(values) != 1:
            raise OptionError(name, f"{name!r} was sent {len(values)} times; send it once")
        if values[0].strip():
            data[name] = values[0].strip()
    return parse_options(data, limits, lazy).as_dict()


def _whole(data: Mapping[str, Any], name: str, default: int) -> int:
    value = data.get(name, default)
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**9:
        raise OptionError(name, f"{name} must be a whole number from 0 up, not {str(value)[:40]!r}")
    return value


def parse_lazy(value: Any, default: int = 0) -> int:
    """Bytes: a size, or on or off; None and empty text mean the default. Raises OptionError."""
    if value is None or value == "":
        return default
    switch = _SWITCH.get(str(value).strip().lower())
    if switch is not None:
        return switch
    try:
        return parse_size(value)
    except ValueError as err:
        raise OptionError("lazy", f"lazy must be on, off, or the size from which values wait; {err}") from err


def _memory(data: Mapping[str, Any]) -> int:
    try:
        return parse_size(data.get("memory", 0))
    except ValueError as err:
        raise OptionError("memory", f"memory: {err}") from err


def _model(data: Mapping[str, Any]) -> str:
    value = data.get("model", "")
    if not isinstance(value, str) or len(value) > 64 or not value.isprintable():
        raise OptionError("model", "model must be a GPU's name, at most 64 printable characters, or empty for any")
    return value


def _image(data: Mapping[str, Any]) -> str:
    value = data.get("image", "")
    if not isinstance(value, str) or (value and not is_image(value)):
        raise OptionError("image", "image must be the name of an image, such as 'lab/kernel:1', or empty")
    return value
