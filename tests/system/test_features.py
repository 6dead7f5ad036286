"""Everything that plain ipykernel does in JupyterLab, on the NBOS kernel of a real `nbos up`, over the websocket.

Each test leaves one busy, one reply and one idle for every cell it ran: `notebook` looks when it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook
from tests.system.debugger import Debugger
from tests.system.widgets import moved, sent, slider

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("features") / "state")
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(cluster: Cluster) -> AsyncIterator[Notebook]:
    opened = await Notebook.open(cluster, "ada")
    yield opened
    await opened.close()


@pytest_asyncio.fixture(loop_scope="module")
async def notebook(opened: Notebook) -> AsyncIterator[Notebook]:
    yield opened
    await opened.run("None")
    assert opened.channels.unaccounted() == []


def types(result: Result) -> list[str]:
    return [message.type for message in result.messages if message.type != "status"]


# -- outputs


async def test_rich_output_updates_and_results_come_in_order(notebook: Notebook) -> None:
    result = await notebook.channels.execute(
        "from IPython.display import HTML, Image, clear_output, display, update_display\n"
        "handle = display(HTML('<b>one</b>'), display_id='first')\n"
        "update_display(HTML('<b>two</b>'), display_id='first')\n"
        "handle.update(HTML('<b>three</b>'))\n"
        "display(Image(data=b'\\x89PNG\\r\\n', format='png'))\n"
        "clear_output(wait=True)\n"
        "print('after')\n"
        "HTML('<i>value</i>')"
    )
    updates = ["update_display_data"] * 2
    order = ["execute_input", "display_data", *updates, "display_data", "clear_output", "stream", "execute_result"]
    assert types(result) == order
    shown, *updated = result.outputs[:3]
    assert [m.content["transient"]["display_id"] for m in (shown, *updated)] == ["first"] * 3
    assert updated[-1].content["data"]["text/html"] == "<b>three</b>"
    assert "image/png" in result.outputs[3].content["data"]
    assert result.outputs[4].content == {"wait": True}
    value = result.outputs[-1].content
    assert value["data"]["text/html"] == "<i>value</i>"
    assert value["execution_count"] == result.reply["execution_count"]


async def test_a_display_is_updated_by_a_later_cell(notebook: Notebook) -> None:
    await notebook.run("h = display('before', display_id=True)")
    result = await notebook.channels.execute("h.update('later')")
    assert types(result) == ["execute_input", "update_display_data"]
    assert result.outputs[0].content["transient"]["display_id"] == await notebook.run("print(h.display_id, end='')")


async def test_streams_errors_and_output_of_children_and_threads(notebook: Notebook) -> None:
    result = await notebook.channels.execute(
        "import os, sys, threading\n"
        "print('out'); print('err', file=sys.stderr)\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "os.write(1, b'raw\\n'); 1 / 0"
    )
    assert (result.status, result.reply["ename"]) == ("error", "ZeroDivisionError")
    assert "out\n" in result.stdout
    assert "thread\n" in result.stdout
    assert "err\n" in result.stderr
    error = next(m.content for m in result.outputs if m.type == "error")
    assert (error["ename"], error["traceback"]) == ("ZeroDivisionError", result.reply["traceback"])


async def test_a_figure_is_shown(notebook: Notebook) -> None:
    result = await notebook.channels.execute(
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()", 60
    )
    assert "image/png" in next(m.content["data"] for m in result.outputs if m.type == "display_data")


# -- stdin


async def test_input_and_getpass(notebook: Notebook) -> None:
    cell = await notebook.channels.submit("a = input('who? ')\nimport getpass\nb = getpass.getpass('how? ')\n(a, b)")
    first = await cell.asked()
    assert first.content == {"prompt": "who? ", "password": False}
    await notebook.channels.answer(first, "ada")
    second = await cell.asked(2)
    assert second.content == {"prompt": "how? ", "password": True}
    await notebook.channels.answer(second, "secret")
    assert (await cell.result()).value == "('ada', 'secret')"


async def test_input_can_be_interrupted_and_be_refused(notebook: Notebook) -> None:
    cell = await notebook.channels.submit("input('who? ')")
    await cell.asked()
    await notebook.server.interrupt(notebook.kernel)
    assert (await cell.result()).reply["ename"] == "KeyboardInterrupt"
    refused = await notebook.channels.execute("input('who? ')", allow_stdin=False)
    assert refused.reply["ename"] == "StdinNotImplementedError"


# -- interrupts


LONG = {
    "python": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "async": "import asyncio; await asyncio.sleep(60)",
    "lock": "import threading; threading.Event().wait(60)",
    "child": "import subprocess; subprocess.run(['sleep', '60'])",
    "shell": "!sleep 60; echo over",
}
ENDS = {code: ["KeyboardInterrupt"] for code in LONG.values()}
ENDS[LONG["async"]] = ["CancelledError"]  # as in plain ipykernel
ENDS[LONG["shell"]] = ["nothing", "KeyboardInterrupt"]  # IPython hands it to the child, the cell goes on


@pytest.mark.parametrize("code", LONG.values(), ids=LONG.keys())
async def test_interrupt(notebook: Notebook, code: str) -> None:
    cell = await notebook.channels.submit(f"print('begun', flush=True)\n{code}")
    await cell.text("begun")
    await asyncio.sleep(0.1)  # into the second line, of which nothing is heard
    await notebook.server.interrupt(notebook.kernel)
    result = await cell.result(10)
    assert "over" not in result.stdout
    assert result.reply.get("ename", "nothing") in ENDS[code]


async def test_an_interrupt_between_cells_changes_nothing(notebook: Notebook) -> None:
    for _ in range(3):
        await notebook.server.interrupt(notebook.kernel)
        assert await notebook.run("6 * 7") == "42"


# -- comms and widgets


async def test_a_comm_opened_by_the_front_end(notebook: Notebook) -> None:
    await notebook.run(
        "def opened(comm, message):\n"
        "    comm.on_msg(lambda m: comm.send({'echo': m['content']['data'], 'bytes': len(m['buffers'][0])}))\n"
        "    comm.send({'hello': message['content']['data']})\n"
        "get_ipython().kernel.comm_manager.register_target('front', opened)"
    )
    comm, opening = await notebook.channels.comm_open("front", {"n": 1})
    await opening.wait(lambda cell: cell.idle is not None, "idle", 10)
    assert [content["data"] for content in sent(opening, "comm_msg")] == [{"hello": {"n": 1}}]
    message = await notebook.channels.comm_msg(comm, {"x": 2}, [b"12345"])
    await message.wait(lambda cell: cell.idle is not None, "idle", 10)
    assert [content["data"] for content in sent(message, "comm_msg")] == [{"echo": {"x": 2}, "bytes": 5}]
    known = await notebook.channels.request("comm_info_request", {"target_name": "front"})
    assert known["comms"] == {comm: {"target_name": "front"}}


async def test_a_comm_opened_by_the_kernel(notebook: Notebook) -> None:
    result = await notebook.channels.execute(
        "from comm import create_comm\n"
        "back = create_comm(target_name='back', data={'n': 1}); heard = []\n"
        "back.on_msg(lambda m: heard.append(m['content']['data']))"
    )
    opening = next(m.content for m in result.messages if m.type == "comm_open")
    assert (opening["target_name"], opening["data"]) == ("back", {"n": 1})
    message = await notebook.channels.comm_msg(opening["comm_id"], {"x": 3})
    await message.wait(lambda cell: cell.idle is not None, "idle", 10)
    assert await notebook.run("heard") == "[{'x': 3}]"
    closing = await notebook.channels.execute("back.close()")
    assert next(m.content["comm_id"] for m in closing.messages if m.type == "comm_close") == opening["comm_id"]


async def test_a_widget_follows_the_user_and_tells_its_observers(notebook: Notebook) -> None:
    model, _ = await slider(notebook, "w")
    await notebook.run("w.observe(lambda change: print('moved to', change['new']), 'value')")
    cell = await moved(notebook, model, 9)
    assert "moved to 9" in cell.written()
    assert await notebook.run("w.value") == "9"
    shown = await notebook.channels.execute("w.value = 5")
    updates = [m.content["data"] for m in shown.messages if m.type == "comm_msg"]
    assert any(update.get("state", {}).get("value") == 5 for update in updates)


# -- questions


async def test_completion_inspection_and_completeness(notebook: Notebook) -> None:
    await notebook.run("class Ship:\n    'A vessel.'\n    mast = 1\nship = Ship(); table = {'quince': 1}")
    assert (
        "ship.mast" in (await notebook.channels.complete("ship.m"))["matches"]
        or "mast" in (await notebook.channels.complete("ship.m"))["matches"]
    )
    assert "path" in " ".join((await notebook.channels.complete("import os.pa"))["matches"])
    assert any("quince" in match for match in (await notebook.channels.complete("table['"))["matches"])
    assert any("%matplotlib" in match for match in (await notebook.channels.complete("%matpl"))["matches"])
    assert "A vessel." in (await notebook.channels.inspect("ship"))["data"]["text/plain"]
    assert (await notebook.channels.inspect("nothing_of_the_kind"))["found"] is False
    asked = await notebook.channels.request("is_complete_request", {"code": "for i in range(3):"})
    assert asked["status"] == "incomplete"
    assert (await notebook.channels.request("is_complete_request", {"code": "x = 1"}))["status"] == "complete"


async def test_history(notebook: Notebook) -> None:
    first = await notebook.channels.execute("'heron'")
    await notebook.run("egret = 'egret'", store_history=False)
    asked = {"output": True, "raw": True, "hist_access_type": "range", "session": 0}
    count = first.reply["execution_count"]
    found = await notebook.channels.request("history_request", {**asked, "start": count, "stop": count + 1})
    assert [(line, source) for _, line, source in found["history"]] == [(count, ["'heron'", "'heron'"])]
    tail = {"output": False, "raw": True, "hist_access_type": "tail", "n": 1000}
    sources = [source for _, _, source in (await notebook.channels.request("history_request", tail))["history"]]
    assert "'heron'" in sources
    assert "egret = 'egret'" not in sources


async def test_kernel_info_and_connect(notebook: Notebook) -> None:
    info = await notebook.channels.info()
    assert (info["status"], info["language_info"]["name"]) == ("ok", "python")
    assert set(info["supported_features"]) >= {"kernel subshells", "debugger"}
    connect = await notebook.channels.request("connect_request", {})
    assert {"shell_port", "iopub_port", "stdin_port", "hb_port"} <= {
        key if key.endswith("_port") else f"{key}_port" for key in connect
    }


async def test_user_expressions_silent_and_history_kept_out(notebook: Notebook) -> None:
    asked = {"six": "2 * 3", "bad": "1 / 0"}
    result = await notebook.channels.execute("x = 2", user_expressions=asked)
    assert result.reply["user_expressions"]["six"]["data"]["text/plain"] == "6"
    assert result.reply["user_expressions"]["bad"]["ename"] == "ZeroDivisionError"
    count = result.reply["execution_count"]
    silent = await notebook.channels.execute("y = 3; 7", silent=True)
    assert types(silent) == []
    unstored = await notebook.channels.execute("z = 4; 8", store_history=False)
    assert unstored.value == "8"
    after = await notebook.channels.execute("(x, y, z)")
    assert (after.value, after.reply["execution_count"]) == ("(2, 3, 4)", count + 1)


async def test_payloads_of_help_next_input_and_exit(notebook: Notebook) -> None:
    page = await notebook.channels.execute("len?")
    assert page.reply["payload"][0]["source"] == "page"
    following = await notebook.channels.execute("get_ipython().set_next_input('later')")
    assert [p["text"] for p in following.reply["payload"]] == ["later"]
    await notebook.run("kept = 11")
    left = await notebook.channels.execute("exit")
    assert [p["source"] for p in left.reply["payload"]] == ["ask_exit"]
    assert "does not end" in left.stderr
    assert await notebook.run("kept") == "11"


# -- how cells run


async def test_async_cells(notebook: Notebook) -> None:
    assert await notebook.run("import asyncio\nawait asyncio.sleep(0.01)\n5") == "5"
    await notebook.run(
        "done = []\nasync def later():\n    await asyncio.sleep(0.2); done.append(1)\n"
        "task = asyncio.create_task(later())"
    )
    assert await notebook.run("await task; done") == "[1]"
    await notebook.run("async def count():\n    for i in range(3):\n        yield i")
    assert await notebook.run("[i async for i in count()]") == "[0, 1, 2]"


async def test_a_subshell_answers_while_a_cell_runs(notebook: Notebook) -> None:
    made = await notebook.channels.request("create_subshell_request", {}, channel="control")
    subshell = made["subshell_id"]
    long = await notebook.channels.submit("import time; print('begun', flush=True); time.sleep(3); q = 1")
    await long.text("begun")
    aside = await notebook.channels.execute("aside = 12; print('aside'); aside", 10, subshell_id=subshell)
    assert (aside.value, aside.stdout) == ("12", "aside\n")
    assert long.reply is None
    assert (await long.result()).status == "ok"
    assert await notebook.run("(q, aside)") == "(1, 12)"
    known = await notebook.channels.request("list_subshell_request", {}, channel="control")
    assert subshell in known["subshell_id"]
    gone = await notebook.channels.request("delete_subshell_request", {"subshell_id": subshell}, channel="control")
    assert gone["status"] == "ok"


async def test_run_all_with_an_error_in_the_middle(notebook: Notebook) -> None:
    codes = [f"print({n})" for n in range(5)] + ["1 / 0"] + [f"ran = {n}" for n in range(5)]
    await notebook.run("ran = None")
    cells = [await notebook.channels.submit(code) for code in codes]
    results = [await cell.result() for cell in cells]
    assert [r.status for r in results] == ["ok"] * 5 + ["error"] + ["aborted"] * 5
    assert [r.stdout for r in results[:5]] == [f"{n}\n" for n in range(5)]
    assert await notebook.run("print(ran)") == "None\n"


async def test_stop_on_error_false_lets_the_rest_run(notebook: Notebook) -> None:
    codes = ["import time; time.sleep(0.3); 1 / 0", "ran = 1", "ran += 1"]
    cells = [await notebook.channels.submit(code, stop_on_error=False) for code in codes]
    assert [(await cell.result()).status for cell in cells] == ["error", "ok", "ok"]
    assert await notebook.run("ran") == "2"


async def test_magics_and_shells(notebook: Notebook, tmp_path: Path) -> None:
    assert await notebook.run("!echo $((40 + 2))") in ("42\n", "42\r\n")
    assert await notebook.run("lines = !printf 'a\\nb\\n'\nlines") == "['a', 'b']"
    assert await notebook.run("%%bash\nfor i in 1 2; do echo $i; done") == "1\n2\n"
    assert "Wall time" in await notebook.run("%time 1 + 1")
    assert "Wall time" in await notebook.run("%%time\nx = 1")
    (tmp_path / "script.py").write_text("import sys\nfrom_script = sys.argv[1:]\nprint('ran', __name__)\n")
    assert await notebook.run(f"%run {tmp_path}/script.py a b") == "ran __main__\n"
    assert await notebook.run("from_script") == "['a', 'b']"
    assert await notebook.run("%%capture got\nprint('hidden')") == ""
    assert await notebook.run("got.stdout") == "'hidden\\n'"
    await notebook.run(f"%cd {tmp_path}\n%env HERON=grey")
    assert await notebook.run("import os; (os.getcwd(), os.environ['HERON'])") == repr((str(tmp_path), "grey"))
    syntax = await notebook.channels.execute("def broken(:")
    assert syntax.reply["ename"] == "SyntaxError"


async def test_metadata_as_jupyterlab_sends_it(notebook: Notebook) -> None:
    plain = {"cellId": "8a7c", "deletedCells": ["1", "2"], "recordTiming": True, "trusted": True}
    assert await notebook.run("import nbos_kernel; nbos_kernel.grant()", metadata=plain) == ""
    asked = {**plain, "nbos": {"resources": {"tpcs": 4, "memory": 2**30}}}
    assert await notebook.run("nbos_kernel.grant().tpcs", metadata=asked) == "4"
    wrong = await notebook.channels.execute("1", metadata={**plain, "nbos": {"resources": {"tpcs": "many"}}})
    assert "tpcs must be a whole number" in wrong.error


# -- the debugger


async def test_the_debugger_stops_at_a_breakpoint_and_goes_on(notebook: Notebook) -> None:
    debug = Debugger(notebook.channels)
    code = "def double(n):\n    twice = 2 * n\n    return twice\nanswer = double(21)\nprint(answer)"
    assert (await debug("debugInfo"))["isStarted"] is False
    await debug("initialize", clientID="jupyterlab", adapterID="", pathFormat="path", linesStartAt1=True)
    await debug("attach")
    await debug.event("initialized")
    source = (await debug("dumpCell", code=code))["sourcePath"]
    set_to = await debug("setBreakpoints", source={"path": source}, breakpoints=[{"line": 3}], sourceModified=False)
    assert [b["verified"] for b in set_to["breakpoints"]] == [True]
    await debug("configurationDone")
    cell = await notebook.channels.submit(code)
    stopped = (await debug.event("stopped"))["body"]
    assert stopped["reason"] == "breakpoint"
    frames = (await debug("stackTrace", threadId=stopped["threadId"]))["stackFrames"]
    assert (frames[0]["name"], frames[0]["line"]) == ("double", 3)
    scopes = (await debug("scopes", frameId=frames[0]["id"]))["scopes"]
    variables = (await debug("variables", variablesReference=scopes[0]["variablesReference"]))["variables"]
    assert {v["name"]: v["value"] for v in variables}["twice"] == "42"
    assert cell.reply is None
    await debug("continue", threadId=stopped["threadId"])
    assert (await cell.result()).stdout == "42\n"
    assert "answer" in {v["name"] for v in (await debug("inspectVariables"))["variables"]}
    await debug("disconnect", restart=False, terminateDebuggee=True)
    assert await notebook.run("double(4)") == "8"


# -- restart, last: it empties the namespace


async def test_restart(notebook: Notebook) -> None:
    await notebook.run("gone = 1")
    await notebook.server.restart(notebook.kernel)
    again = await notebook.channels.execute("1 + 1")
    assert (again.value, again.reply["execution_count"]) == ("2", 1)
    assert (await notebook.channels.execute("gone")).reply["ename"] == "NameError"
