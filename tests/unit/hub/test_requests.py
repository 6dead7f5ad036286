"""Requests to the gateway: what is malformed, what passes a bound, what is fine."""

import json
from typing import Any

import pytest
import zmq
from zmq.utils import z85 as reference

from nbos_spawner.gateway.errors import ApiError
from nbos_spawner.gateway.requests import check_count, options_of, read_kernel_wanted
from nbos_spawner.gateway.secrets import new_secrets, z85
from nbos_spawner.limits import Limits


def read(**fields: Any) -> Any:
    return read_kernel_wanted(json.dumps({"kernel_id": "k1", **fields}).encode())


def test_a_kernel_id_alone_is_enough() -> None:
    assert options_of(read(), Limits()).replicas == 3


def test_lazy_arrives_and_a_wrong_one_is_400() -> None:
    assert options_of(read(lazy="16M"), Limits()).lazy == 16 << 20
    assert options_of(read(), Limits()).lazy == 0
    with pytest.raises(ApiError) as refused:
        options_of(read(lazy="sometimes"), Limits())
    assert (refused.value.status, refused.value.code) == (400, "malformed")


def test_what_is_asked_for_arrives() -> None:
    wanted = read(replicas=2, resources={"tpcs": 8, "memory": "4G"}, cwd="/home/a", env={"A": "b"})
    options = options_of(wanted, Limits())
    assert (options.replicas, options.tpcs, options.memory) == (2, 8, 4 << 30)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"kernel_id": 7}', b"\xff\xfe", b'{"kernel_id": "k", "what": 1}'],
)
def test_a_malformed_body_is_refused_with_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_kernel_wanted(body)
    assert (caught.value.status, caught.value.code) == (400, "malformed")


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_id": "../other"},
        {"kernel_id": "a/b"},
        {"kernel_id": ""},
        {"kernel_id": "x" * 200},
        {"kernel_id": "k\n"},
        {"replicas": "3"},
        {"resources": {"gpu": 1}},
        {"cwd": "relative"},
        {"cwd": "/a\0b"},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x\0"}},
        {"env": {f"A{i}": "" for i in range(300)}},
    ],
)
def test_a_wrong_field_is_refused_with_400(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400


def test_passing_a_bound_is_403_and_names_it() -> None:
    with pytest.raises(ApiError, match="limit is 1") as caught:
        options_of(read(resources={"gpus": 2}), Limits(gpus=1))
    assert (caught.value.status, caught.value.code) == (403, "over_limit")


def test_contradictions_are_400() -> None:
    with pytest.raises(ApiError) as caught:
        options_of(read(resources={"gpus": 1, "tpcs": 1}), Limits())
    assert caught.value.status == 400


def test_the_last_kernel_of_the_quota_is_given_and_no_more() -> None:
    check_count(1, Limits(kernels=2))
    with pytest.raises(ApiError, match="2 kernels, your limit is 2") as caught:
        check_count(2, Limits(kernels=2))
    assert caught.value.status == 403


def test_only_the_callers_images_run() -> None:
    limits = Limits(images=("lab:1", "lab:2"))
    assert options_of(read(), limits).image == ""
    assert options_of(read(image="lab:2"), limits).image == "lab:2"
    with pytest.raises(ApiError, match="there are: lab:1, lab:2") as caught:
        options_of(read(image="evil"), limits)
    assert caught.value.status == 403
    with pytest.raises(ApiError, match="name of an image") as caught:
        options_of(read(image="a b"), limits)
    assert caught.value.status == 400


def test_curve_keys_are_what_libzmq_takes_for_a_pair() -> None:
    secrets = new_secrets()
    assert zmq.curve_public(secrets.curve_secretkey.encode()) == secrets.curve_publickey.encode()


def test_z85_is_libzmqs() -> None:
    raw = bytes(range(32))
    assert z85(raw).encode() == reference.encode(raw)
    with pytest.raises(ValueError, match="multiple of 4"):
        z85(b"abc")


def test_two_kernels_share_no_secret() -> None:
    one, two = new_secrets(), new_secrets()
    assert not {one.key, one.curve_secretkey} & {two.key, two.curve_secretkey}
