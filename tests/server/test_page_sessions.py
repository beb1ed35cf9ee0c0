"""Who may look at the page and who may change something from it: every address without a session, and every trick."""

import re
import urllib.parse

import pytest
import urllib3
from link_world import ToyDevice, page_served, start_run

from fedspine_server.link import rollout_views
from fedspine_server.link.credentials import RateLimit
from fedspine_server.link.tables import ACCEPTED, PENDING, REVOKED, CredentialRow, DeviceRow, ModelRow
from fedspine_server.page import sessions
from fedspine_server.page.actions import ACTIONS

ADDRESSES = [
    "/", "/runs/run-a", "/runs/run-a/model", "/runs/run-a/rounds/0", "/runs/run-a/matrix.json", "/devices/a", "/stream",
    "/runs/run-a/files/state.safetensors", "/devices/a/accept", "/devices/a/revoke", "/runs/run-a/stop",
    "/rollouts", "/rollouts/new", "/rollouts/1/rollback",
]  # fmt: skip


@pytest.fixture
def world(tmp_path):
    with page_served(tmp_path) as world:
        yield world


def call(world, method, path, *, cookie="", form=None, **headers):
    fields = {"Accept": "text/html", "Cookie": cookie, **{k.replace("_", "-"): v for k, v in headers.items()}}
    body = urllib.parse.urlencode(form) if form is not None else None
    return urllib3.request(
        method, world.url + path, headers=fields, body=body, timeout=10, retries=False, redirect=False
    )


def sign_in(world, said=None):
    reply = call(world, "POST", "/login", form={"password": said or world.password})
    assert reply.status == 303, reply.data
    return reply.headers["set-cookie"].split(";")[0]


def csrf_of(world, cookie, path="/"):
    return re.search(rb'data-csrf="([0-9a-f]{64})"', call(world, "GET", path, cookie=cookie).data)[1].decode()


def status_of(world, name):
    with world.hub.database.read() as session:
        return session.get(DeviceRow, name).status


@pytest.mark.parametrize("path", ADDRESSES)
def test_a_stranger_is_sent_to_the_door_and_a_program_refused(world, path):
    reply = call(world, "GET", path)
    assert (reply.status, reply.headers["location"][:7]) == (303, "/login?")
    assert call(world, "GET", path, Accept="*/*").status == 401
    assert call(world, "GET", path, cookie=f"{sessions.COOKIE}={'x' * 43}", Accept="*/*").status == 401


def test_every_action_without_a_session_changes_nothing(world):
    ToyDevice(world, "a", accept=False)
    for action in ACTIONS:
        reply = call(world, "POST", f"/{action.kind}/a/{action.name}", form={"confirmed": "yes"})
        assert reply.status == 401
    assert status_of(world, "a") == PENDING


def test_the_password_and_the_operators_token_open_a_session_and_nothing_else_does(world, settings):
    start_run(world, settings)
    for said in (world.password, world.password.replace("-", "").upper(), world.operator):
        cookie = sign_in(world, said)
        assert call(world, "GET", "/", cookie=cookie).status == 200
    device = ToyDevice(world, "a")
    for said in ("", "x", world.claim, f"a.{device.identity.secret}", cookie.split("=")[1], "x" * 3000):
        world.desk.logins = RateLimit(1000, 1.0)
        assert call(world, "POST", "/login", form={"password": said}).status == 403


def test_a_cookie_is_out_of_reach_of_scripts_other_sites_and_plain_http(world):
    reply = call(world, "POST", "/login", form={"password": world.password})
    parts = [part.strip() for part in reply.headers["set-cookie"].split(";")]
    assert parts[0].startswith("__Host-")
    assert {"HttpOnly", "Secure", "SameSite=Strict", "Path=/"} <= set(parts)
    with world.hub.database.read() as session:  # the secret itself is nowhere on record
        assert not session.get(CredentialRow, parts[0].split("=")[1])


def test_a_session_ends_by_signing_out_by_a_new_password_and_by_its_age(world):
    cookie = sign_in(world)
    reply = call(world, "POST", "/logout", cookie=cookie, form={"csrf": csrf_of(world, cookie)})
    assert "Max-Age=0" in reply.headers["set-cookie"]
    assert call(world, "GET", "/", cookie=cookie).status == 303
    cookie = sign_in(world)
    world.password, old = sessions.new_password(world.hub), world.password
    assert call(world, "GET", "/", cookie=cookie).status == 303
    assert call(world, "POST", "/login", form={"password": old}).status == 403
    cookie, now = sign_in(world), world.hub.clock()
    world.hub.clock = lambda: now + sessions.SESSION_SECONDS + 1
    assert call(world, "GET", "/", cookie=cookie).status == 303


def test_a_session_is_no_token_of_the_link_and_a_metrics_token_opens_no_page(world):
    secret = sign_in(world).split("=")[1]
    assert call(world, "GET", "/v1/devices", Authorization=f"Bearer {secret}").status == 401
    token = sessions.new_metrics_token(world.hub)
    assert call(world, "GET", "/metrics", Authorization=f"Bearer {token}").status == 200
    assert call(world, "GET", "/v1/devices", Authorization=f"Bearer {token}").status == 401
    assert call(world, "GET", "/overview.json", Authorization=f"Bearer {token}").status == 401
    assert call(world, "POST", "/login", form={"password": token}).status == 403
    assert call(world, "GET", "/metrics").status == 401
    assert call(world, "GET", "/metrics", cookie=f"{sessions.COOKIE}={secret}").status == 401


def test_guessing_is_throttled_and_the_right_password_waits_its_turn_too(world):
    statuses = [call(world, "POST", "/login", form={"password": str(i)}).status for i in range(8)]
    assert statuses == [403] * 6 + [429] * 2
    reply = call(world, "POST", "/login", form={"password": world.password})
    assert reply.status == 429
    assert 1 <= int(reply.headers["retry-after"]) <= 10


def test_an_action_needs_the_sessions_own_form_a_confirmation_and_this_site(world):
    ToyDevice(world, "a", accept=False)
    cookie, other = sign_in(world), sign_in(world)
    good = {"csrf": csrf_of(world, cookie), "confirmed": "yes"}
    accept = "/devices/a/accept"
    for form in ({}, {"confirmed": "yes"}, {**good, "csrf": "0" * 64}, {**good, "csrf": csrf_of(world, other)}):
        assert call(world, "POST", accept, cookie=cookie, form=form).status == 403
    assert call(world, "POST", accept, cookie=cookie, form={"csrf": good["csrf"]}).status == 400
    for site in ("cross-site", "same-site"):
        assert call(world, "POST", accept, cookie=cookie, form=good, Sec_Fetch_Site=site).status == 403
    assert call(world, "GET", accept, cookie=cookie).status == 200  # asks, and does nothing
    assert status_of(world, "a") == PENDING
    assert call(world, "POST", accept, cookie=cookie, form=good).status == 303
    assert status_of(world, "a") == ACCEPTED
    assert call(world, "POST", "/devices/a/revoke", cookie=cookie, form=good).status == 303
    assert status_of(world, "a") == REVOKED


def test_a_run_is_stopped_and_resumed_and_everybody_pending_accepted_at_once(world, settings):
    start_run(world, settings)
    for name in ("a", "b"):
        ToyDevice(world, name, accept=False)
    cookie = sign_in(world)
    form = {"csrf": csrf_of(world, cookie), "confirmed": "yes"}
    for path in ("/runs/run-a/stop", "/runs/run-a/resume", "/devices/all/accept"):
        assert call(world, "POST", path, cookie=cookie, form=form).status == 303
    with world.hub.database.read() as session:
        assert {row.status for row in session.query(DeviceRow)} == {ACCEPTED}
    for path in ("/devices/none/accept", "/devices/all/revoke", "/runs/none/stop", "/runs/run-a/delete", "/x/y/accept"):
        assert call(world, "POST", path, cookie=cookie, form=form).status == 404


@pytest.mark.parametrize(
    "target", ["https://elsewhere.org/", "//elsewhere.org", "/\\elsewhere.org", "javascript:alert(1)"]
)
def test_signing_in_leads_to_no_other_site(world, target):
    form = {"password": world.password}
    assert call(world, "POST", f"/login?next={urllib.parse.quote(target)}", form=form).headers["location"] == "/"


def test_every_answer_forbids_inline_scripts_frames_and_caches(world):
    cookie = sign_in(world)
    for path in ("/", "/login", "/assets/page.js", "/devices/none", "/metrics"):
        headers = call(world, "GET", path, cookie=cookie).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


def test_a_large_form_and_a_form_without_length_are_not_read(world):
    assert call(world, "POST", "/login", form={"password": "x" * 5000}).status == 413
    assert call(world, "POST", "/login", form={"password": "x"}, Content_Length="-1").status in (400, 413)


def test_no_file_but_the_runs_own_can_be_downloaded(world, settings):
    start_run(world, settings)
    cookie = sign_in(world)
    own = call(world, "GET", "/runs/run-a/files/state.safetensors", cookie=cookie)
    assert own.status == 200
    assert own.headers["content-disposition"].startswith("attachment")
    for name in ("operator.json", "..%2f..%2foperator.json", "fedspine.sqlite", "%2e%2e"):
        assert call(world, "GET", f"/runs/run-a/files/{name}", cookie=cookie).status == 404


def model_on(hub):
    sha256 = "a" * 64
    with hub.database.write() as session:
        session.add(ModelRow(sha256=sha256, name="m.gguf", num_bytes=1000, added_at=hub.clock()))
    return sha256


def test_a_rollout_needs_the_sessions_own_form_and_a_second_yes(world):
    device, sha256 = ToyDevice(world, "a"), model_on(world.hub)
    device.hello()
    cookie, other = sign_in(world), sign_in(world)
    form = {"model": sha256, "canaries": "1", "gate": "ppl<=base", "csrf": csrf_of(world, cookie)}
    new = "/rollouts/new"
    for bad in ({**form, "csrf": ""}, {**form, "csrf": csrf_of(world, other)}):
        assert call(world, "POST", new, cookie=cookie, form={**bad, "confirmed": "yes"}).status == 403
    assert call(world, "POST", new, cookie=cookie, form=form, Sec_Fetch_Site="cross-site").status == 403
    assert call(world, "POST", new, form={**form, "confirmed": "yes"}).status == 401
    asked = call(world, "POST", new, cookie=cookie, form=form)
    assert asked.status == 200
    assert b"perplexity at most 1 times that of its present model" in asked.data
    own = call(world, "POST", new, cookie=cookie, form={**form, "passage": "<script>" + "x" * 5000})
    assert b", on your text, and keeps it if" in own.data
    assert b"<script>" not in own.data
    back = call(
        world, "POST", new, cookie=cookie, form={**form, "passage": "mine", "change": "yes", "confirmed": "yes"}
    )
    assert b">mine</textarea>" in back.data
    assert call(world, "POST", new, cookie=cookie, form={**form, "passage": "x" * 20_000}).status == 413
    assert rollout_views.views(world.hub) == []
    reply = call(world, "POST", new, cookie=cookie, form={**form, "confirmed": "yes"})
    assert (reply.status, reply.headers["location"]) == (303, "/rollouts")
    assert [(found.rollout_id, found.gate, found.canaries) for found in rollout_views.views(world.hub)] == [
        (1, "ppl<=1*base", ["a"])
    ]
    again = call(world, "POST", new, cookie=cookie, form={**form, "confirmed": "yes"})
    assert again.status == 422
    assert b"rollout 1 is under way" in again.data
    yes = {"csrf": form["csrf"], "confirmed": "yes"}
    for name in ("2", "none", "-1", "9" * 40):
        assert call(world, "POST", f"/rollouts/{name}/rollback", cookie=cookie, form=yes).status in (404, 409)
    assert call(world, "POST", "/rollouts/1/rollback", cookie=cookie, form={"csrf": form["csrf"]}).status == 400
    assert call(world, "POST", "/rollouts/1/rollback", cookie=cookie, form=yes).headers["location"] == "/rollouts"
    assert rollout_views.views(world.hub)[0].status == "rolled_back"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"gate": "ppl"}, b"expected a condition"), ({"gate": "ppl<3\nx"}, b"one line"),
     ({"canaries": "0"}, b"one line"), ({"canaries": "x"}, b"one line"),
     ({"canaries": "5"}, b"expected 5 devices"), ({"model": ""}, b"expected a model")],
)  # fmt: skip
def test_a_form_with_a_mistake_comes_back_with_it_and_with_what_was_said(world, change, words):
    ToyDevice(world, "a")
    sha256, cookie = model_on(world.hub), sign_in(world)
    good = {"model": sha256, "canaries": "1", "gate": "ppl<=3", "csrf": csrf_of(world, cookie)}
    reply = call(world, "POST", "/rollouts/new", cookie=cookie, form={**good, **change})
    assert reply.status == 422
    assert words in reply.data
    assert b'role="alert"' in reply.data
    if "canaries" not in change:
        assert b'value="1"' in reply.data
    assert rollout_views.views(world.hub) == []


def test_without_a_model_the_form_says_how_to_send_one(world):
    assert b"fedspine rollout upload" in call(world, "GET", "/rollouts/new", cookie=sign_in(world)).data
