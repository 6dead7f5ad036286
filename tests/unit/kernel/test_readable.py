"""Values that show all they hold are made again from it; those that do not just now are refused with the reason."""

from __future__ import annotations

import re

import pytest

from nbos_kernel.capture import readable

from .pair import Pair


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize(
    ("make", "look", "expected"),
    [
        ("import re; v = re.compile('b').search('abab', 2)", "v.span(), v.pos", ((3, 4), 2)),
        ("import re; v = list(re.finditer('(?P<x>a.)', 'abac'))[1]", "v['x'], v.span(), v.pos", ("ac", (2, 4), 0)),
        ("import re; v = re.fullmatch('a|ab', 'ab')", "v.group()", "ab"),
        ("import json; v = json.JSONDecoder(parse_float=str)", "v.decode('[1, 1.5]')", [1, "1.5"]),
        ("import json\nclass D(json.JSONDecoder): pass\nv = D()", "v.decode('{\"a\": []}')", {"a": []}),
        ("import queue; v = queue.SimpleQueue()", "v.put(1), v.get()", (None, 1)),
        ("b = bytearray(8); v = memoryview(b).cast('i')[1:]", "v.format, v.nbytes, v.obj is b", ("i", 4, True)),
    ],
)
def test_what_can_be_read_is_made_again(pair: Pair, make: str, look: str, expected: object) -> None:
    pair.cell(make)
    assert pair.standby.replica.lost == {}
    assert pair.on_standby(look) == expected


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("import queue; v = queue.SimpleQueue(); v.put(1)", "with something in it"),
        ("v = memoryview(bytearray(8))[::2]", "gaps"),
    ],
)
def test_what_cannot_be_read_now_is_lost_and_comes_back_when_it_can(pair: Pair, make: str, reason: str) -> None:
    pair.cell(make)
    assert reason in pair.standby.replica.lost["v"]
    pair.cell("v = v.get() if hasattr(v, 'get') else v.obj")
    assert pair.standby.replica.lost == {}


def test_a_pool_of_threads_is_one_while_nothing_runs_in_it(pair: Pair) -> None:
    pair.cell("import threading\nfrom concurrent.futures import ThreadPoolExecutor\ngo = threading.Event()")
    pair.cell("pool = ThreadPoolExecutor(2, 'worker'); r = pool.submit(abs, -1).result()")
    assert pair.on_standby("(pool.submit(abs, -3).result(), pool._max_workers, r)") == (3, 2, 1)
    pair.cell("running = [pool.submit(go.wait)]")
    assert "work under way" in pair.standby.replica.lost["pool"]
    pair.cell("go.set(); running = running.pop().result()")
    assert "pool" not in pair.standby.replica.lost
    pair.cell("pool.shutdown()")
    with pytest.raises(RuntimeError, match="after shutdown"):
        pair.on_standby("pool.submit(abs, -3)")


def test_a_match_that_its_pattern_does_not_find_any_more_is_refused() -> None:
    held = bytearray(b"xab")
    match = re.search(b"ab", held)
    assert match is not None
    held[:] = b"xyz"
    with pytest.raises(Exception, match="cannot be found again"):
        readable.reduce_match(match)


def test_a_cached_function_says_that_its_cache_does_not_travel(pair: Pair) -> None:
    pair.cell("import functools\n@functools.lru_cache\ndef f(n): return [n]\nfirst = f(1)")
    (note,) = [row["note"] for row in pair.executor.replica.capture.report() if "f" in row["names"]]
    assert note == "f: the cache is empty after a failover"
    assert pair.on_standby("(f.cache_info().currsize, f(1))") == (0, [1])
