"""Nobody gets in: every call of the published API without a token, with another's, with an old one."""

import dataclasses
import json
import re

import pytest
import urllib3
from link_world import QUICK, ToyDevice, served, start_run, until

from fedspine_edge.agent.link import LINK_NEWEST, LINK_OLDEST, DismissedError, NotTakenError, UnreachableError
from fedspine_server.link import gate, schemas
from fedspine_server.link.credentials import CLAIM, RateLimit, hashed, issue, principal_of
from fedspine_server.link.tables import CredentialRow, DeviceRow

PARTS = {
    "sha256": "0" * 64,
    "task_id": "0" * 32,
    "index": "0",
    "device_id": "a",
    "run_id": "run-a",
    "rollout_id": "1",
    "action": "stop",
}
OPEN = {("GET", "/v1/health"), ("POST", "/v1/enroll")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server")) as world:
        yield world


def call(world, method, path, *, token=None, body=None, headers=None):
    fields = dict(headers or {})
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    if isinstance(body, dict):
        body, fields["Content-Type"] = json.dumps(body), "application/json"
    return urllib3.request(method, world.url + path, body=body, headers=fields, timeout=10, retries=False)


def document(world):
    return call(world, "GET", "/v1/openapi.json", token=world.operator).json()


def calls(world):
    """Every (method, path) of the OpenAPI document, with plausible values in the path."""
    for path, methods in document(world)["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"\{(\w+)\}", lambda part: PARTS[part[1]], path)


def test_no_call_without_a_token_reaches_anything_but_enrol_and_health(world):
    found = list(calls(world))
    assert len(found) >= 20
    for method, path in found:
        status = call(world, method, path, body={} if method in ("POST", "PUT") else None).status
        assert (status != 401) == ((method, path) in OPEN), (method, path, status)
    assert gate.OPEN - {("HEAD", "/v1/health")} == OPEN


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/v1/openapi.json", "/v1/none", "/v1/health/", "//v1/health"]
)
def test_nothing_beside_the_document_answers_a_stranger(world, path):
    assert call(world, "GET", path).status == 401


@pytest.mark.parametrize(
    "token", ["", "x", "a.b", ".", "a." + "s" * 300, "b" * 43, "ü", "a'--.x", "device-00." + "s" * 43]
)
def test_a_wrong_token_is_nobodys(world, token):
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")}
    assert call(world, "GET", "/v1/devices", headers=headers).status == 401


def test_a_device_cannot_do_what_is_the_operators_nor_the_other_way_round(world):
    device = ToyDevice(world, "insider")
    device.hello()
    own = f"insider.{device.identity.secret}"
    for path, methods in document(world)["paths"].items():
        for method, described in methods.items():
            place = re.sub(r"\{(\w+)\}", lambda part: PARTS[part[1]], path)
            if "operator" in described["tags"]:
                assert call(world, method.upper(), place, token=own).status == 403, (method, path)
            elif "open" not in described["tags"]:
                assert call(world, method.upper(), place, token=world.operator, headers={"X-Boot": "0"}).status == 403


def test_a_pending_device_may_wait_and_nothing_else(world):
    device = ToyDevice(world, "stranger", accept=False)
    assert device.hello()["status"] == "pending"
    assert device.task(0.01) is None
    with pytest.raises(NotTakenError, match="stranger is pending: the operator has to accept it"):
        device.link.progress("0" * 32, {"attempt": 1})


def test_a_device_sees_neither_tasks_nor_blobs_of_others(tmp_path, settings):
    with served(tmp_path) as world:
        start_run(world, settings)
        owner, other = ToyDevice(world, "a"), ToyDevice(world, "b")
        owner.hello()
        other.hello(base="1" * 64)
        task = until(owner.task)
        with pytest.raises(NotTakenError, match="404"):
            other.link.download(task["blob"]["sha256"], task["blob"]["num_bytes"], tmp_path / "stolen")
        for steal in (
            lambda: other.link.progress(task["task_id"], {"attempt": 1}),
            lambda: other.link.result(task["task_id"], {"attempt": 1, "failure": "mine now"}),
            lambda: other.link._put(f"/v1/upload/{task['task_id']}/0?attempt=1", b"x"),
        ):
            with pytest.raises(NotTakenError, match="device b has no task"):
                steal()


def test_a_claim_token_expires_and_a_name_belongs_to_whoever_had_it_first(world):
    with world.hub.database.write() as session:
        old = issue(session, CLAIM, now=world.hub.clock() - 100, seconds=99)
    body = {"claim": old, "device_id": "late", "secret": "s" * 43}
    assert call(world, "POST", "/v1/enroll", body=body).status == 403
    body["claim"] = world.claim
    assert call(world, "POST", "/v1/enroll", body=body).status == 201
    assert call(world, "POST", "/v1/enroll", body=body).status == 201  # its answer was lost: the same again
    assert call(world, "POST", "/v1/enroll", body={**body, "secret": "t" * 43}).status == 409


def test_an_operators_token_lets_no_device_in(world):
    body = {"claim": world.operator, "device_id": "trick", "secret": "s" * 43}
    assert call(world, "POST", "/v1/enroll", body=body).status == 403


def test_enrolments_from_one_address_are_limited(tmp_path):
    settings = dataclasses.replace(QUICK, enroll_tries=2, enroll_seconds=1000.0)
    with served(tmp_path, settings) as world:
        body = {"claim": "wrong", "device_id": "x", "secret": "s" * 43}
        found = [call(world, "POST", "/v1/enroll", body=body) for _ in range(3)]
        assert [reply.status for reply in found] == [403, 403, 429]
        assert int(found[-1].headers["Retry-After"]) > 0


def test_a_rate_limit_gives_tries_back_and_its_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("fedspine_server.link.credentials.MAX_ADDRESSES", 3)
    limit = RateLimit(2, 10.0)
    assert [limit.wait_seconds("a", now) for now in (0.0, 0.0, 0.0, 10.0)] == [0.0, 0.0, 10.0, 0.0]
    for number in range(100):
        limit.wait_seconds(f"flood-{number}", 10.0)
    assert len(limit._spent) <= 4


def test_only_hashes_of_secrets_are_kept(world):
    ToyDevice(world, "careful")
    with world.hub.database.read() as session:
        row = session.get_one(DeviceRow, "careful")
        assert row.secret_sha256 == hashed("s" * 43)
        assert session.get(CredentialRow, hashed(world.claim)).kind == CLAIM
        assert principal_of(session, "careful." + "t" * 43, now=0.0) is None
    database = world.hub.blobs._blobs.parent
    for file in database.glob("fedspine.sqlite*"):
        content = file.read_bytes()
        assert b"s" * 43 not in content
        assert world.claim.encode() not in content
        assert world.operator.encode() not in content


def test_a_body_past_its_limit_is_refused_before_it_is_read(world):
    device = ToyDevice(world, "talker")
    token = f"talker.{device.identity.secret}"
    huge = {"Content-Length": str(1 << 40), "Content-Type": "application/json"}
    assert call(world, "POST", "/v1/hello", token=token, headers=huge).status == 413
    lying = iter([b"x" * 10_000] * 10)
    assert call(world, "POST", "/v1/hello", token=token, body=lying).status == 413
    assert call(world, "POST", "/v1/enroll", body=b"x" * 70_000).status == 413


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boot_id", "not hexadecimal"),
        ("num_examples", -1),
        ("num_examples", 1 << 60),
        ("memory_bytes", "much"),
        ("base_sha256", "0"),
        ("facts", {"board": "a\u0000b"}),
        ("facts", {"unknown": 1}),
        ("facts", {"board": "\ud800"}),
        ("more", 1),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(world, field, value):
    device = ToyDevice(world, "sloppy")
    good = {
        "boot_id": "0" * 32,
        "link_oldest": 1,
        "link_newest": 1,
        "facts": {},
        "num_examples": 1,
        "memory_bytes": 1,
        "base_sha256": "0" * 64,
    }
    token = f"sloppy.{device.identity.secret}"
    reply = call(world, "POST", "/v1/hello", token=token, body={**good, field: value})
    assert reply.status == 422
    assert field in json.dumps(reply.json())
    assert call(world, "POST", "/v1/hello", token=token, body=good).status == 200


def test_versions_that_do_not_meet_are_told_so(world):
    device = ToyDevice(world, "future")
    said = {
        "facts": {},
        "num_examples": 1,
        "memory_bytes": 1,
        "base_sha256": "0" * 64,
        "link_oldest": 7,
        "link_newest": 9,
    }
    with pytest.raises(NotTakenError, match="device speaks link 7 to 9, server 1 to 1: upgrade the older side"):
        device.link.hello(said, None)
    assert (LINK_OLDEST, LINK_NEWEST) == (schemas.LINK_OLDEST, schemas.LINK_NEWEST)


def test_a_server_that_is_not_there_is_to_be_tried_again(world):
    device = ToyDevice(world, "lonely")
    device.link._url = "http://127.0.0.1:9"
    with pytest.raises(UnreachableError, match=r"expected an answer of http://127\.0\.0\.1:9"):
        device.hello()


def test_the_wrong_secret_dismisses_a_device(world):
    device = ToyDevice(world, "forger")
    device.link._headers["Authorization"] = "Bearer forger." + "t" * 43
    with pytest.raises(DismissedError, match="server answered 401: expected a valid bearer token"):
        device.hello()


def test_a_long_poll_may_take_longer_than_connecting(world, monkeypatch):
    monkeypatch.setattr("fedspine_edge.agent.link.CONNECT_SECONDS", 0.2)
    device = ToyDevice(world, "patient")
    device.hello()
    assert device.task(0.5) is None
