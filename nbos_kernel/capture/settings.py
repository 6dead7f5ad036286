"""Random states and settings of Python and of the libraries a notebook uses: how each is read and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Item(NamedTuple):
    """`module`: looked at only once it is imported ('' always). `get()` gives a value that compares and pickles."""

    name: str
    module: str
    get: Callable[[], Any]
    put: Callable[[Any], None]


def _lib(name: str) -> Any:
    """An imported library; on a standby it is imported now."""
    import importlib

    return sys.modules.get(name) or importlib.import_module(name)


def _get_numpy_random() -> Any:
    kind, key, *rest = _lib("numpy.random").get_state(legacy=True)
    return (kind, key.tobytes(), *rest)


def _put_numpy_random(value: Any) -> None:
    numpy = _lib("numpy")
    kind, key, *rest = value
    _lib("numpy.random").set_state((kind, numpy.frombuffer(key, numpy.uint32), *rest))


def _get_torch_random() -> Any:
    torch = _lib("torch")
    cuda = torch.cuda.is_initialized()
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]
    return [state.numpy().tobytes() for state in states]


def _put_torch_random(value: list[bytes]) -> None:
    torch = _lib("torch")
    states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in value]
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized() and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all(states[1:])


def _get_torch() -> Any:
    torch = _lib("torch")
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def _put_torch(value: dict[str, Any]) -> None:
    torch = _lib("torch")
    torch.set_default_dtype(value["dtype"])
    if value["threads"] != torch.get_num_threads():
        torch.set_num_threads(value["threads"])
    torch.set_grad_enabled(value["grad"])
    torch.use_deterministic_algorithms(value["deterministic"])
    torch.set_float32_matmul_precision(value["matmul"])


def _get_numpy_options() -> Any:
    numpy = _lib("numpy")
    options = numpy.get_printoptions()
    options.pop("override_repr", None)
    return {"print": {key: value for key, value in options.items() if key != "formatter"}, "errors": numpy.geterr()}


def _put_numpy_options(value: dict[str, Any]) -> None:
    numpy = _lib("numpy")
    numpy.set_printoptions(**value["print"])
    numpy.seterr(**value["errors"])


def _pandas_options() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(options: dict[str, Any], prefix: str) -> None:
        for key, value in options.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, bool | int | float | str | type(None)):
                found[prefix + key] = value

    walk(_lib("pandas._config.config")._global_config, "")
    return found


def _put_pandas_options(value: dict[str, Any]) -> None:
    here = _pandas_options()
    pandas = _lib("pandas")
    for key, wanted in value.items():
        if key not in here or here[key] != wanted:
            pandas.set_option(key, wanted)


def _get_rc() -> dict[str, Any]:
    parameters = _lib("matplotlib").rcParams
    return {key: dict.__getitem__(parameters, key) for key in parameters if not key.startswith("backend")}


def _put_rc(value: dict[str, Any]) -> None:
    dict.update(_lib("matplotlib").rcParams, value)


def _get_warnings() -> Any:
    return list(_lib("warnings").filters)


def _put_warnings(value: Any) -> None:
    warnings = _lib("warnings")
    warnings.filters[:] = value
    warnings._filters_mutated()


def _get_decimal() -> Any:
    context = _lib("decimal").getcontext()
    return {
        **{key: getattr(context, key) for key in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")},
        "traps": [kind for kind, on in context.traps.items() if on],
    }


def _put_decimal(value: dict[str, Any]) -> None:
    decimal = _lib("decimal")
    decimal.setcontext(decimal.Context(**value))


def _get_logging() -> dict[str, Any]:
    logging = _lib("logging")
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return {
        "levels": {name: each.level for name, each in loggers.items() if getattr(each, "level", 0)},
        "disabled": logging.root.manager.disable,
        "root": [handler for handler in map(_stream_handler, logging.root.handlers) if handler],
    }


def _stream_handler(handler: Any) -> tuple[Any, ...] | None:
    """What `logging.basicConfig` makes: a handler that writes to stderr or stdout."""
    logging = _lib("logging")
    if type(handler) is not logging.StreamHandler:
        return None
    formatter = handler.formatter
    stream = "stdout" if handler.stream in (sys.stdout, sys.__stdout__) else "stderr"
    return stream, handler.level, getattr(formatter, "_fmt", None), getattr(formatter, "datefmt", None)


def _put_logging(value: dict[str, Any]) -> None:
    logging = _lib("logging")
    for name, level in value["levels"].items():
        logging.getLogger(name or None).setLevel(level)
    logging.disable(value["disabled"])
    if value["root"] == _get_logging()["root"]:
        return
    for handler in [each for each in logging.root.handlers if _stream_handler(each)]:
        logging.root.removeHandler(handler)
    for stream, level, form, dates in value["root"]:
        handler = logging.StreamHandler(getattr(sys, stream))
        handler.setLevel(level)
        if form is not None:
            handler.setFormatter(logging.Formatter(form, dates))
        logging.root.addHandler(handler)


def _get_gc() -> Any:
    gc = _lib("gc")
    return {"enabled": gc.isenabled(), "threshold": gc.get_threshold()}


def _put_gc(value: dict[str, Any]) -> None:
    gc = _lib("gc")
    (gc.enable if value["enabled"] else gc.disable)()
    gc.set_threshold(*value["threshold"])


def _get_locale() -> Any:
    locale = _lib("locale")
    return locale.setlocale(locale.LC_ALL)


def _put_locale(value: str) -> None:
    locale = _lib("locale")
    locale.setlocale(locale.LC_ALL, value)


def _polars_config() -> Any:
    return _lib("polars").Config.save()


def open_figures() -> list[tuple[int, Any]]:
    """(number, figure) of what pyplot holds open, the current one last."""
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    if helpers is None:
        return []
    return [(number, manager.canvas.figure) for number, manager in helpers.Gcf.figs.items()]


def put_figures(value: list[tuple[int, Any]] | None) -> None:
    """Make pyplot hold exactly these figures."""
    helpers, pyplot = _lib("matplotlib._pylab_helpers"), _lib("matplotlib.pyplot")
    helpers.Gcf.figs.clear()
    for number, figure in value or ():
        backend = pyplot._get_backend_mod()
        manager = backend.new_figure_manager_given_figure(number, figure)
        helpers.Gcf._set_new_active_manager(manager)


ITEMS: tuple[Item, ...] = (
    Item("%random", "random", lambda: _lib("random").getstate(), lambda value: _lib("random").setstate(value)),
    Item("%numpy.random", "numpy.random", _get_numpy_random, _put_numpy_random),
    Item("%torch.random", "torch", _get_torch_random, _put_torch_random),
    Item("%torch", "torch", _get_torch, _put_torch),
    Item("%numpy", "numpy", _get_numpy_options, _put_numpy_options),
    Item("%pandas", "pandas._config.config", _pandas_options, _put_pandas_options),
    Item("%polars", "polars", _polars_config, lambda value: _lib("polars").Config.load(value)),
    Item(
        "%sklearn", "sklearn", lambda: _lib("sklearn").get_config(), lambda value: _lib("sklearn").set_config(**value)
    ),
    Item("%matplotlib", "matplotlib", _get_rc, _put_rc),
    Item("%warnings", "warnings", _get_warnings, _put_warnings),
    Item("%decimal", "decimal", _get_decimal, _put_decimal),
    Item("%logging", "logging", _get_logging, _put_logging),
    Item("%gc", "", _get_gc, _put_gc),
    Item("%locale", "locale", _get_locale, _put_locale),
    Item("%recursion", "", sys.getrecursionlimit, sys.setrecursionlimit),
)
