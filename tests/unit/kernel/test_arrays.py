"""NumPy arrays and torch tensors on a standby: equal, and sharing what they shared."""

from __future__ import annotations

import pytest

from .pair import Pair

pytest.importorskip("numpy")

VIEWS = [
    ("v = a[10:20]", "a[15] = -1; v[5] == -1"),
    ("v = a[::-2]", "v[0] = -2; a[-1] == -2"),
    ("v = a.reshape(100, 100).T[1:, ::3]", "v[0, 0] = -3; a[1] == -3"),
    ("v = a.view('uint8')", "v[:8] = 255; a[0] == -1"),
    ("v = a[3:4].reshape(())", "a[3] = 8; v == 8"),
    ("v = {'deep': [a[5:]]}", "a[5] = 9; v['deep'][0][0] == 9"),
    ("v = np.broadcast_to(a[:3], (2, 3))", "a[0] = 4; v[1, 0] == 4 and not v.flags.writeable"),
    ("v = a[:10]; w = v[2:]; del v", "w[0] = 6; a[2] == 6"),
]


@pytest.mark.parametrize(("make", "check"), VIEWS)
def test_views_still_share_memory(make: str, check: str) -> None:
    pair = Pair()
    pair.cell("import numpy as np\na = np.arange(10_000)")
    assert pair.cell(make)["lost"] == {}
    for _ in range(2):  # and again after the standby took over
        *statements, last = check.split("; ")
        exec("\n".join(statements), pair.standby.ns)
        assert pair.on_standby(last)
        pair.switch()
        pair.cell("touched = 1")


def test_fortran_object_and_structured_arrays_keep_their_views() -> None:
    pair = Pair()
    pair.cell("import numpy as np\nf = np.asfortranarray(np.arange(12.).reshape(3, 4)); fv = f[1:]")
    pair.cell(
        "o = np.array([[], {}], dtype=object); ov = o[1:]\n"
        "s = np.zeros(3, dtype=[('a', 'i4'), ('b', 'f8')]); sa = s['a']"
    )
    exec("f[1, 0] = 99; s['a'][2] = 7", pair.standby.ns)
    assert pair.on_standby("fv[0, 0]") == 99
    assert pair.on_standby("o[1] is ov[0]")
    assert pair.on_standby("sa[2]") == 7


def test_large_arrays_travel_as_blobs_and_come_back_writable() -> None:
    pair = Pair()
    entry = pair.cell("import numpy as np\na = np.ones(100_000); r = np.ones(100_000); r.flags.writeable = False")
    assert len(pair.blobs) == 1  # equal content is stored once
    assert all("blobs" in c["frames"][-1] for c in entry["components"] if c["names"][0] in "ar")
    assert pair.on_standby("a.flags.writeable and not r.flags.writeable")


def test_an_array_that_shares_nothing_forms_a_group_of_its_own() -> None:
    pair = Pair()
    entry = pair.cell("import numpy as np\na = np.ones(3); b = np.zeros(3); c = [np.float64(1)]")
    assert sorted(c["names"] for c in entry["components"] if c["names"][0][0] != "%") == [["a"], ["b"], ["c"], ["np"]]


def test_tensors_share_storage() -> None:
    pytest.importorskip("torch")
    pair = Pair()
    pair.cell(
        "import torch\nm = torch.nn.Linear(3, 2)\nw = m.weight\nt = torch.arange(100_000.)\nv = t[10:].view(-1, 2)"
    )
    exec("t[10] = -5\nwith torch.no_grad(): w[0, 0] = 42", pair.standby.ns)
    assert pair.on_standby("v[0, 0].item()") == -5
    assert pair.on_standby("m.weight is w and w.requires_grad and isinstance(w, torch.nn.Parameter)")
    assert pair.on_standby("m.weight[0, 0].item()") == 42


def test_an_optimizer_goes_on_training_its_model() -> None:
    pytest.importorskip("torch")
    pair = Pair()
    pair.cell("import torch\nm = torch.nn.Linear(2, 1)\nopt = torch.optim.Adam(m.parameters())\nx = torch.ones(4, 2)")
    pair.cell("loss = m(x).sum(); loss.backward(); opt.step(); loss = loss.item()")
    before = "before = m.weight.detach().clone(); m(x).sum().backward(); opt.step()"
    exec(before, pair.standby.ns)
    assert pair.on_standby("bool((m.weight != before).any())")
    assert pair.on_standby("opt.param_groups[0]['params'][0] is m.weight")


def test_frames_of_pandas_keep_their_values() -> None:
    pytest.importorskip("pandas")
    pair = Pair()
    assert (
        pair.cell("import pandas as pd\ndf = pd.DataFrame({'a': range(1000), 'b': 'x'})\nser = df['a']")["lost"] == {}
    )
    assert pair.on_standby("df.equals(pd.DataFrame({'a': range(1000), 'b': 'x'})) and ser.sum() == 499500")
