"""A host learns what its kernels import, and imports it ahead: real daemons, a real etcd, real packages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

from nbos_cluster.etcd import Etcd
from tests.system.etcdserver import eventually
from tests.system.test_warm import MakeHost, attach, client, host, parents, pid, start, waits, warm

__all__ = ["client", "host"]
run = asyncio.to_thread

AHEAD = "__import__('nbos_kernel.warm.ahead').warm.ahead.current"


async def learnt(client: Etcd, *modules: str) -> None:
    async def there() -> bool:
        return (await warm(client)).modules == modules

    await eventually(there, f"{modules} are imported ahead", 180.0)


async def test_what_one_kernel_imports_is_there_for_the_next_and_out_of_sight(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    one = host(learn=True, learn_patience=0.0)
    await waits(client)
    first = await start(client, one, "k1")
    await run(first.run, "import sys, numpy as np, this, os", 1)
    await learnt(client, "numpy")
    await waits(client)
    second = await start(client, one, "k2")
    await run(second.run, "import sys\nbefore = 'numpy' in sys.modules\n" + f"hidden = 'numpy' in {AHEAD}.names", 1)
    await run(second.run, "import numpy; import numpy.linalg as la", 2)
    assert await run(second.value, f"before, hidden, 'numpy' in {AHEAD}.names", 3) == "(False, True, False)"
    assert await run(second.value, "float(la.norm(numpy.ones(4))), numpy.random.rand() != 0", 4) == "(2.0, True)"

    # The parent of the first kernel is kept, to tell how it ends.
    assert len(parents(one)) == 2
    os.kill(pid(one, "k1"), signal.SIGSEGV)
    await eventually(lambda: "SIGSEGV" in one.log.read_text(), "the segmentation fault is told")
    await eventually(lambda: len(parents(one)) == 1, "the old parent has nothing left to do")
    again = await attach(client, one, "k1")
    assert await run(again.value, "np.arange(3).sum()", 2) == "np.int64(3)"

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "numpy.py").write_text("mine = True\n")
    third = await start(client, one, "k3", cwd=str(mine))
    await run(third.run, "import numpy", 1)
    assert await run(third.value, "numpy.mine", 2) == "True"
    assert "its numpy.py goes before the module of that name" in one.log.read_text()
    for opened in (first, second, again, third):
        opened.close()


async def test_what_was_learnt_is_there_after_a_restart_and_goes_when_it_is_not_to_be(
    client: Etcd, host: MakeHost
) -> None:
    one = host(learn=True, learn_patience=0.0)
    await waits(client)
    kernel = await start(client, one)
    await run(kernel.run, "import numpy", 1)
    await learnt(client, "numpy")
    kept = one.run_dir / "warm" / "imported.json"
    (saved,) = json.loads(kept.read_text())["kernels"]
    assert (saved["kernel"], saved["modules"]) == ("k", ["numpy"])
    assert kept.stat().st_mode & 0o777 == 0o600
    one.kill()
    one.start()
    await learnt(client, "numpy")
    kernel.close()


async def test_a_module_that_does_not_pass_is_said_with_its_reason(client: Etcd, host: MakeHost) -> None:
    one = host(learn=True, learn_patience=0.0)
    await waits(client)
    kernel = await start(client, one)
    await run(kernel.run, "import ipywidgets", 1)

    async def refused() -> bool:
        return "whether it runs in a notebook" in (await warm(client)).refused.get("ipywidgets", "")

    await eventually(refused, "its reason is told", 180.0)
    assert (await warm(client)).modules == ()
    kernel.close()
