"""The front end of ipywidgets: a slider is shown, and the user drags it."""

from __future__ import annotations

from tests.system.channels import Cell
from tests.system.cluster import Notebook
from tests.system.messages import Json


def sent(cell: Cell, kind: str) -> list[Json]:
    return [message.content for message in cell.messages if message.type == kind]


async def moved(notebook: Notebook, model: str, value: int) -> Cell:
    """The user drags the slider."""
    cell = await notebook.channels.comm_msg(model, {"method": "update", "state": {"value": value}, "buffer_paths": []})
    await cell.wait(lambda cell: cell.idle is not None, "idle", 10)
    return cell


async def slider(notebook: Notebook, name: str) -> tuple[str, str]:
    """A new slider: its model's id, and what the cell wrote to stderr."""
    result = await notebook.channels.execute(f"import ipywidgets; {name} = ipywidgets.IntSlider(value=3); {name}")
    view = next(m.content["data"] for m in result.outputs if m.type in ("display_data", "execute_result"))
    model = view["application/vnd.jupyter.widget-view+json"]["model_id"]
    opened = [m.content["comm_id"] for m in result.messages if m.type == "comm_open"]
    assert model in opened
    return str(model), result.stderr
