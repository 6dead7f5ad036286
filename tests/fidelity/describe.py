"""A value, deeply, as nested tuples of plain values: equal on two processes if and only if the values are the same.

Objects get a number when they are met first, so sharing shows. What a process cannot have in common with another
(addresses, identities) is left out.
"""

from __future__ import annotations

import re
import sys
import types
from typing import Any

_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|\bat \d{9,}\b")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEPTH = 14


class Describer:
    """`namespace`: functions of the notebook must have it as their globals."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        self._storages: dict[Any, int] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind.__name__, repr(value)
        if value is self._namespace:
            return ("the namespace",)
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            return "module", value.__name__
        known = kind in (tuple, frozenset) or isinstance(value, types.BuiltinFunctionType)
        if not known and not self._interned(value):
            if id(value) in self._seen:
                return "seen", self._seen[id(value)]
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
        if depth > DEPTH:
            return "deep", f"{kind.__module__}.{kind.__qualname__}"
        return (f"{kind.__module__}.{kind.__qualname__}", *self._parts(value, depth + 1))

    def _interned(self, value: Any) -> bool:
        """Library constants and values of which it cannot matter whether they are one object."""
        module = type(value).__module__.partition(".")[0]
        return (
            module
            in ("datetime", "decimal", "re", "zoneinfo", "pathlib", "uuid", "fractions", "sympy", "enum", "ipaddress")
            or isinstance(value, slice | range)
            or type(value).__name__ == "device"
        )

    def _parts(self, value: Any, depth: int) -> Any:
        if isinstance(value, staticmethod | classmethod):
            return (self.of(value.__func__, depth),)
        if isinstance(value, types.CodeType):
            return value.co_name, value.co_code.hex()
        if isinstance(value, types.FunctionType):
            if value.__module__ != "__main__" and "<locals>" not in value.__qualname__:
                return value.__module__, value.__qualname__
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        for root, describe in (("numpy", self._numpy), ("torch", self._torch), ("pandas", self._pandas)):
            if root in sys.modules:
                found = describe(value, depth)
                if found is not None:
                    return found
        library = _library(value)
        if library is not None:
            return library
        return self._container(value, depth)

    def _container(self, value: Any, depth: int) -> Any:
        parts: list[Any] = []
        if isinstance(value, dict):
            parts.append([(self.of(k, depth), self.of(v, depth)) for k, v in list(value.items())])
        elif isinstance(value, set | frozenset):
            parts.append(sorted(repr(Describer(self._namespace).of(item, depth)) for item in value))
        elif isinstance(value, list | tuple):
            parts.append([self.of(item, depth) for item in value])
        elif isinstance(value, bytearray | memoryview):
            parts.append(bytes(value))
        state = _state(value)
        if state:
            parts.append([(name, self.of(held, depth)) for name, held in sorted(state.items(), key=lambda it: it[0])])
        if not parts:
            parts.append(_ADDRESS.sub("0x", repr(value)))
        return parts

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        code = value.__code__
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents, depth))
            except ValueError:
                cells.append("empty")
        mine = value.__module__ == "__main__"
        return (
            value.__qualname__, value.__module__, value.__doc__, code.co_code.hex(), code.co_names, code.co_varnames,
            cells, self.of(value.__defaults__, depth), self.of(value.__kwdefaults__, depth),
            self.of(value.__annotations__, depth), self.of(value.__dict__, depth) if mine else "",
            not mine or value.__globals__ is self._namespace,
        )  # fmt: skip

    def _class(self, value: type, depth: int) -> Any:
        if value.__module__ != "__main__":
            return value.__module__, value.__qualname__
        skip = {"__dict__", "__weakref__", "_abc_impl", "__abstractmethods__", "_member_map_", "_value2member_map_"}
        # cloudpickle sets __slotnames__ by pickling an instance: a cache of copyreg's.
        skip |= {"__slotnames__", "__getstate__", "_generate_next_value_", "__class_getitem__", "__parameters__"}
        held = sorted((k, v) for k, v in vars(value).items() if k not in skip and not _descriptor(v))
        bases = [self.of(base, depth) for base in value.__bases__]
        return value.__qualname__, bases, [(k, self.of(v, depth)) for k, v in held]

    def _numpy(self, value: Any, depth: int) -> Any:
        numpy = sys.modules["numpy"]
        if not isinstance(value, numpy.ndarray):
            return None
        mask = bytes(numpy.ma.getmaskarray(value)) if isinstance(value, numpy.ma.MaskedArray) else b""
        raw = numpy.asarray(value)
        data = [self.of(item, depth) for item in raw.ravel().tolist()] if raw.dtype.hasobject else raw.tobytes()
        flags = (raw.flags.writeable, raw.flags.c_contiguous, raw.flags.f_contiguous)
        base = "array" if isinstance(value.base, numpy.ndarray) else type(value.base).__name__
        base = "array" if base == "DummyArray" else base  # numpy.lib.stride_tricks' own way to hold an array
        if type(value) is not numpy.ndarray or base in ("memoryview", "bytearray"):
            base = ""  # a subclass may see its own memory or an array; a buffer, itself or a memoryview
        extra = self.of(vars(value), depth) if hasattr(value, "__dict__") and not mask else ""
        return str(raw.dtype), raw.shape, raw.strides, flags, base, data, mask, extra

    def _torch(self, value: Any, depth: int) -> Any:
        torch = sys.modules["torch"]
        if isinstance(value, torch.Generator):
            return (value.get_state().numpy().tobytes(),)
        if not isinstance(value, torch.Tensor):
            return None
        if value.layout is not torch.strided:
            return (repr(value),)
        key = value.untyped_storage().data_ptr() or id(value)
        storage = self._storages.setdefault(key, len(self._storages))
        content = (
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.dim() else repr(value)
        )
        return (
            str(value.dtype), tuple(value.shape), value.stride(), value.storage_offset(), value.requires_grad, storage,
            content, self.of(value.grad, depth) if value.is_leaf else "",
        )  # fmt: skip

    def _pandas(self, value: Any, depth: int) -> Any:
        pandas = sys.modules["pandas"]
        if not hasattr(pandas, "DataFrame"):
            return None
        if isinstance(value, pandas.DataFrame):
            columns = [self.of(value.iloc[:, i], depth) for i in range(value.shape[1])]
            return value.shape, self.of(value.columns, depth), columns, self.of(value.attrs, depth)
        if isinstance(value, pandas.Series):
            items = [self.of(item, depth) for item in value.tolist()]
            return str(value.dtype), value.name, self.of(value.index, depth), items
        if isinstance(value, pandas.Index):
            return str(value.dtype), tuple(value.names), repr(value.tolist())
        if isinstance(value, pandas.api.extensions.ExtensionArray):
            return str(value.dtype), repr(list(value))
        return None


def _descriptor(value: Any) -> bool:
    return isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)


def _state(value: Any) -> dict[str, Any]:
    found = {}
    try:
        found.update({str(k): v for k, v in vars(value).items()})
    except TypeError:
        found = {}
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            try:
                found[slot] = object.__getattribute__(value, slot)
            except AttributeError:
                continue
    skipped = ("__weakref__", "__dict__", "__pydantic", "_cache", "_mhash", "_hash", "__builtins__")
    return {k: v for k, v in found.items() if not k.startswith(skipped)}


def _library(value: Any) -> Any:
    """Values of libraries that have a form of their own to compare by."""
    kind, module = type(value).__name__, type(value).__module__
    if module.startswith("polars"):
        if kind == "DataFrame":
            return str(value.schema), value.rows()
        if kind == "Series":
            return str(value.dtype), value.name, value.to_list()
        return (str(value),)
    if module.startswith("pyarrow"):
        return (
            kind,
            str(getattr(value, "schema", "")),
            _ADDRESS.sub("0x", str(value.to_pylist() if hasattr(value, "to_pylist") else value)),
        )
    if module.startswith("PIL"):
        return (
            (value.mode, value.size, value.tobytes(), repr(sorted(value.info)))
            if hasattr(value, "tobytes")
            else (kind,)
        )
    if module.startswith("matplotlib"):
        return (kind, _figure(value)) if kind == "Figure" else (kind,)
    if module.startswith(("numpy.polynomial", "ipaddress")) or (module == "torch" and kind == "device"):
        return (repr(value),)
    if module.startswith("torch.optim") and hasattr(value, "state_dict"):
        return kind, repr(value.state_dict())
    if module.startswith("sympy"):
        return (sys.modules["sympy"].srepr(value),)
    if module.startswith("scipy.sparse"):
        return kind, repr(value.toarray().tolist()) if hasattr(value, "toarray") else ""
    if module.startswith(
        ("sklearn.tree._tree", "sklearn.neighbors", "scipy", "ipywidgets", "traitlets", "jinja2", "logging")
    ):
        return (kind,)
    if module in (
        "_io",
        "sqlite3",
        "threading",
        "_thread",
        "weakref",
        "_weakrefset",
        "queue",
        "concurrent.futures.thread",
    ):
        return (kind, getattr(value, "closed", None))
    if module.startswith(
        ("itertools", "_random", "random", "numpy.random", "xml", "argparse", "configparser", "functools")
    ):
        return (kind,)
    if kind.endswith(("iterator", "enumerate", "zip", "map", "reversed")):
        return (kind,)
    return None


def _figure(figure: Any) -> bytes:
    import hashlib
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shown = figure.canvas
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_raw(file)
    figure.set_canvas(shown)
    return hashlib.sha256(file.getvalue()).digest()
