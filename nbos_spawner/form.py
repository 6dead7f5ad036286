"""The options form on JupyterHub's spawn page: plain HTML, works without a script and with a screen reader.

Bounds stand in the fields themselves (`max`), in words beside them, and are checked again on the server.
"""

from __future__ import annotations

from html import escape

from .limits import Limits
from .options import KernelOptions
from .sizes import show_size

_NUMBER = """
<div class="form-group mb-3">
  <label class="form-label" for="nbos-{name}">{label}</label>
  <input class="form-control" type="number" inputmode="numeric" id="nbos-{name}" name="{name}" min="{low}" max="{high}"
   step="1" value="{value}" aria-describedby="nbos-{name}-help"{disabled}>
  <small class="form-text text-muted" id="nbos-{name}-help">{help}</small>
</div>"""

_TEXT = """
<div class="form-group mb-3">
  <label class="form-label" for="nbos-{name}">{label}</label>
  <input class="form-control" type="text" id="nbos-{name}" name="{name}" maxlength="64" value="{value}"
   autocomplete="off" spellcheck="false" aria-describedby="nbos-{name}-help"{disabled}>
  <small class="form-text text-muted" id="nbos-{name}-help">{help}</small>
</div>"""

_CHOICE = """
<div class="form-group mb-3">
  <label class="form-label" for="nbos-{name}">{label}</label>
  <select class="form-control" id="nbos-{name}" name="{name}" aria-describedby="nbos-{name}-help">{options}</select>
  <small class="form-text text-muted" id="nbos-{name}-help">{help}</small>
</div>"""


def options_form(limits: Limits, chosen: KernelOptions) -> str:
    """The form's inner HTML for a user with `limits`; `chosen` fills it in (the last choice)."""
    most = f"; at most {show_size(limits.memory)}" if limits.memory else ""
    return f"""<fieldset>
<legend>What new kernels start with</legend>
<p>A GPU is held only while a cell runs. A cell may ask for something else with <code>%%gpu</code> or
<code>%%cpu</code> in its first line.</p>
{
        _number(
            "replicas",
            "Replicas",
            1,
            limits.replicas,
            chosen.replicas,
            f"Copies of the kernel on different hosts, 1 to {limits.replicas}. With 3, any two may be lost.",
        )
    }
{
        _text(
            "lazy",
            "Large values on standbys",
            show_size(chosen.lazy) if chosen.lazy else "off",
            False,
            "Off: every replica holds every variable. A size, for example 64M: a standby leaves variables of that size "
            "and more in the store until a cell uses them, which saves memory and makes the first such cell wait.",
        )
    }
{_number("gpus", "Whole GPUs per cell", 0, limits.gpus, chosen.gpus, _bound("GPU", "GPUs", limits.gpus))}
{
        _number(
            "tpcs",
            "Slice of one GPU, in TPCs",
            0,
            limits.tpcs,
            chosen.tpcs,
            _bound("TPC", "TPCs", limits.tpcs) + " Instead of whole GPUs; 1 TPC is 2 SMs.",
        )
    }
{
        _text(
            "memory",
            "GPU memory on each device",
            show_size(chosen.memory) if chosen.memory else "",
            limits.gpus == 0 and limits.tpcs == 0,
            f"For example 20G{most}. Empty: all of a whole GPU, or a slice's share.",
        )
    }
{_text("model", "GPU model", chosen.model, limits.gpus == 0 and limits.tpcs == 0, "Empty: any model.")}
{_images(limits.images, chosen.image)}
</fieldset>"""


def _images(images: tuple[str, ...], chosen: str) -> str:
    """Nothing where there is nothing to choose."""
    if not images:
        return ""
    options = "".join(
        f'<option value="{escape(image, quote=True)}"{" selected" if image == chosen else ""}>{escape(text)}</option>'
        for image, text in [("", "the hosts' own"), *((image, image) for image in images)]
    )
    text = "The software that kernels find. A host that does not have it yet gets it at the kernel's first start."
    return _CHOICE.format(name="image", label="Image", options=options, help=escape(text))


def _bound(one: str, many: str, limit: int) -> str:
    if limit == 0:
        return f"You may not use {many}; ask your administrator if you need them."
    return f"0 to {limit}; 0 means no {one} unless the cell asks."


def _number(name: str, label: str, low: int, high: int, value: int, text: str) -> str:
    return _NUMBER.format(
        name=name,
        label=escape(label),
        low=low,
        high=high,
        value=min(max(value, low), high),
        help=escape(text),
        disabled=" disabled" if high == 0 else "",
    )


def _text(name: str, label: str, value: str, disabled: bool, text: str) -> str:
    return _TEXT.format(
        name=name,
        label=escape(label),
        value=escape(value, quote=True),
        help=escape(text),
        disabled=" disabled" if disabled else "",
    )
