"""Rollouts on the server: pure functions, then the calls, with devices that are honest, lie, vanish or are revoked."""

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from link_world import QUICK, ToyDevice, served, start_run, until
from sqlalchemy import update as change

from fedspine_edge.agent.link import NotTakenError, UnreachableError
from fedspine_edge.rollout_gate import parse
from fedspine_server import rollout as law
from fedspine_server.link import models, rollout_views, rollouts, runs
from fedspine_server.link.database import Database
from fedspine_server.link.devices import set_status
from fedspine_server.link.hub import open_hub
from fedspine_server.link.rollout_schemas import ModelRequest, RolloutRequest
from fedspine_server.link.sweeping import sweep
from fedspine_server.link.tables import REVOKED, SCHEMA_VERSION, DeviceRow, RolloutRow, SchemaRow
from fedspine_server.rollout import (
    AWAITING,
    CANARY,
    COMMITTED,
    FAILED,
    FINISHED,
    INSTALL,
    RESTORE,
    ROLLED_BACK,
    ROLLING,
    STOPPED,
)

CONTENT = b"GGUF" + bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GOOD = {"ppl": 10.0, "tokens_per_second": 9.0, "prompt_tokens_per_second": 90.0, "peak_memory_bytes": 1 << 30}
NAMES = ["a", "b", "c", "d"]

ROLLOUTS = st.builds(
    law.Rollout,
    rollout_id=st.just(1),
    status=st.sampled_from([CANARY, ROLLING, AWAITING, FINISHED, STOPPED, ROLLED_BACK]),
    model_sha256=st.just(SHA256),
    conditions=st.just(parse("ppl<=12")),
    canaries=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True).map(tuple),
    devices=st.one_of(st.none(), st.just(tuple(NAMES))),
)
ACCEPTED = st.sets(st.sampled_from(NAMES))
STATES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["downloading", "checking", COMMITTED, FAILED]))


# --- pure ---------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=300, deadline=None)
@given(rollout=ROLLOUTS, states=STATES, accepted=ACCEPTED, away=ACCEPTED)
def test_a_rollout_goes_back_for_who_was_away_alone_and_settling_twice_changes_nothing(rollout, states, accepted, away):
    status, detail = law.settled(rollout, states, {}, accepted, away)
    rolled = {ROLLING, AWAITING, FINISHED}
    allowed = {CANARY: {CANARY, STOPPED, *rolled}, ROLLING: rolled, AWAITING: rolled}
    assert status in allowed.get(rollout.status, {rollout.status})
    again = dataclasses.replace(rollout, status=status)
    if status != STOPPED:
        assert law.settled(again, states, {}, accepted, away) == (status, detail)
    undecided = {name for name in accepted if rollout.is_for(name) and states.get(name) not in (COMMITTED, FAILED)}
    if status in rolled and rollout.status != FINISHED:
        assert status == (FINISHED if not undecided else AWAITING if undecided <= away else ROLLING)
    if rollout.status == CANARY:
        left = [name for name in rollout.canaries if name in accepted]
        if any(states.get(name) == FAILED for name in rollout.canaries):
            assert status == STOPPED
        elif left and any(states.get(name) != COMMITTED for name in left):
            assert status == CANARY


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    rollout=ROLLOUTS, name=st.sampled_from([*NAMES, "stranger"]), state=st.sampled_from([None, "checking", COMMITTED])
)
def test_nobody_but_canaries_is_asked_before_they_committed_and_nobody_at_all_once_it_stopped(rollout, name, state):
    kind = law.order(rollout, name, state)
    if rollout.status == CANARY:
        assert (kind == INSTALL) == (name in rollout.canaries)
    elif rollout.status == STOPPED:
        assert kind is None
    elif rollout.status == ROLLED_BACK:
        assert kind == (RESTORE if state else None)
    else:
        assert kind == (INSTALL if rollout.is_for(name) else None)


def test_devices_make_a_rollout_end_well_whatever_the_order_in_which_they_answer():
    rollout = law.Rollout(1, CANARY, SHA256, (), ("a",))
    assert law.settled(rollout, {}, {}, NAMES) == (CANARY, "")
    assert law.settled(rollout, {"a": COMMITTED}, {}, NAMES) == (ROLLING, "")
    assert law.settled(rollout, {"a": COMMITTED}, {}, ["a"]) == (FINISHED, "")
    assert law.settled(rollout, {"a": FAILED}, {"a": "ppl"}, NAMES) == (STOPPED, "canary a failed: ppl")
    assert law.settled(rollout, {}, {}, ["b"]) == (STOPPED, "no canary is left: each was revoked")


def test_who_is_away_is_named_and_a_few_names_stand_for_many():
    rollout = law.Rollout(1, ROLLING, SHA256, (), ("a",))
    committed = {"a": COMMITTED}
    assert law.settled(rollout, committed, {}, NAMES, ["b"]) == (ROLLING, "")
    assert law.settled(rollout, committed, {}, "ab", "b") == (AWAITING, "finished but for 1 that is away: b")
    assert law.settled(rollout, committed, {}, NAMES, NAMES)[1] == "finished but for 3 that are away: b, c, d"
    many = [f"orin-{i:02d}" for i in range(20)]
    assert law.settled(rollout, {}, {}, many, many)[1].endswith("away: " + ", ".join(many[:8]) + " and 12 more")
    going = dataclasses.replace(rollout, status=CANARY)
    assert law.settled(going, {}, {}, NAMES, "ab") == (CANARY, "waits for a canary that is away: a")


def test_canaries_are_those_that_are_there_the_same_when_asked_twice_others_for_another_model():
    names = [f"device-{i}" for i in range(20)]
    found = law.choose_canaries(names, ["gone"], 3, model_sha256="a" * 64)
    assert found == law.choose_canaries(names[::-1], ["gone"], 3, model_sha256="a" * 64)
    assert found != law.choose_canaries(names, ["gone"], 3, model_sha256="b" * 64)
    assert law.choose_canaries(["a"], ["gone"], 2, model_sha256="a" * 64) == ["a", "gone"]


# --- the calls ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    with served(tmp_path / "server") as world:
        add_model(world.hub)
        yield world


def add_model(hub, content=CONTENT, name="m.gguf"):
    sha256 = hashlib.sha256(content).hexdigest()
    for index in range(-(-len(content) // QUICK.chunk_bytes)):
        chunk = content[index * QUICK.chunk_bytes :][: QUICK.chunk_bytes]
        models.put_chunk(hub, sha256, index, chunk, hashlib.sha256(chunk).hexdigest())
    return models.add(hub, sha256, ModelRequest(name=name, num_bytes=len(content)))


def begin(hub, **more):
    return rollouts.start(hub, RolloutRequest(model_sha256=SHA256, **more))


def device(world, name):
    found = ToyDevice(world, name)
    found.hello()
    return found


def asked(device, done="none", wait=5.0):
    reply = device.link.task(wait, done)
    return reply["rollout"] if reply and "rollout" in reply else None


def say(device, state, number=1, **more):
    report = {"state": state, "sha256": SHA256, "current": SHA256 if state == COMMITTED else None}
    report |= {"figures": GOOD} if state == COMMITTED else {"reason": "ppl<=1: 10, limit 1"} if state == FAILED else {}
    return device.link.rollout(number, report | more)


def status(world):
    return rollout_views.views(world.hub)[0].status


def states(world):
    return {found.device_id: found.state for found in rollout_views.views(world.hub)[0].devices}


def test_canaries_first_then_everybody_and_who_joins_later_too(world, tmp_path):
    first, second = device(world, "a"), device(world, "b")
    begin(world.hub, canaries=["b"], gate="ppl<=12")
    order = asked(second)
    assert (order["rollout_id"], order["kind"]) == (1, INSTALL)
    assert order["model"] == {"sha256": SHA256, "num_bytes": len(CONTENT), "name": "m.gguf"}
    assert order["gate"] == [{"figure": "ppl", "sign": "<=", "limit": 12.0, "of_base": False}]
    assert asked(first, wait=0.1) is None
    with pytest.raises(NotTakenError, match="expected a blob"):
        first.link.download(SHA256, len(CONTENT), tmp_path / "early")
    parts = []
    second.link.download(SHA256, len(CONTENT), tmp_path / "model", parts.append)
    assert ((tmp_path / "model").read_bytes(), parts[-1]) == (CONTENT, len(CONTENT))
    assert say(second, "checking")["go_on"]
    assert say(second, COMMITTED)["go_on"]
    assert asked(second, "1:install", wait=0.1) is None
    assert asked(first)["rollout_id"] == 1  # the long poll is woken
    say(first, COMMITTED)
    until(lambda: status(world) == FINISHED)
    late = device(world, "late")
    assert asked(late)["rollout_id"] == 1
    say(late, FAILED)
    assert (status(world), states(world)) == (FINISHED, {"a": COMMITTED, "b": COMMITTED, "late": FAILED})
    assert ToyDevice(world, "pending", accept=False).hello()["status"] == "pending"
    assert "pending" not in states(world)


def test_a_text_of_the_operators_goes_with_the_order(world):
    only = device(world, "a")
    begin(world.hub, passage="Where is it?\nThere.")
    assert asked(only)["passage"] == "Where is it?\nThere."
    assert rollout_views.views(world.hub)[0].own_passage
    for passage in ("x" * 40_000, "a\x00b"):
        with pytest.raises(ValueError, match="passage"):
            begin(world.hub, passage=passage, replace=True)


def test_a_failed_canary_stops_it_and_the_others_are_asked_for_nothing(world):
    first, second, third = (device(world, name) for name in "abc")
    begin(world.hub, canaries=["a", "b"])
    say(first, "downloading", received_bytes=7)
    assert rollout_views.views(world.hub)[0].devices[0].received_bytes == 7
    say(second, FAILED)
    until(lambda: status(world) == STOPPED)
    found = rollout_views.views(world.hub)[0]
    assert found.detail == "canary b failed: ppl<=1: 10, limit 1"
    assert asked(third, wait=0.1) is None
    assert not say(first, "checking")["go_on"], "the other canary stops too"
    assert asked(second, "1:install", wait=0.1) is None


def test_rolled_back_every_device_that_took_part_goes_back_and_nobody_else_is_woken(world):
    first, second = device(world, "a"), device(world, "b")
    begin(world.hub, canaries=["a"])
    say(first, COMMITTED)
    until(lambda: status(world) == ROLLING)
    assert rollouts.roll_back(world.hub, 1) == rollouts.roll_back(world.hub) == 1
    assert asked(first, "1:install")["kind"] == RESTORE
    assert asked(second, wait=0.1) is None
    assert not say(second, "checking")["go_on"], "who was on its way to the model"
    assert asked(second)["kind"] == RESTORE
    say(first, "rolled_back")
    assert asked(first, "1:restore", wait=0.1) is None
    assert (status(world), states(world)) == (ROLLED_BACK, {"a": "rolled_back", "b": "checking"})


def test_a_second_rollout_is_refused_while_one_is_under_way_unless_it_is_to_replace_it(world):
    only = device(world, "a")
    other = add_model(world.hub, CONTENT + b"x", "other.gguf").sha256
    begin(world.hub)
    with pytest.raises(Exception, match=r"rollout 1 is under way \(canary\): wait for it, roll it back, or replace it"):
        begin(world.hub)
    rollouts.start(world.hub, RolloutRequest(model_sha256=other, replace=True))
    assert [found.status for found in rollout_views.views(world.hub)] == [CANARY, "superseded"]
    assert asked(only, "1:install")["model"]["sha256"] == other
    reply = say(only, "downloading")
    assert (reply["go_on"], reply["detail"]) == (False, "rollout 1 is superseded")
    with pytest.raises(Exception, match="only the newest rollout can be rolled back: that is 2"):
        rollouts.roll_back(world.hub, 1)


def test_a_revoked_canary_is_not_waited_for(world):
    device(world, "a")
    second = device(world, "b")
    begin(world.hub, canaries=["a", "b"])
    say(second, COMMITTED)
    set_status(world.hub, ["a"], REVOKED)
    until(lambda: status(world) == FINISHED)
    assert states(world) == {"a": REVOKED, "b": COMMITTED}


def leave(world, name, *, up_since=0.0):
    """As if a device had not been heard of for an hour, by a server that was up all the time or since a moment ago."""
    world.hub.started_at = up_since
    with world.hub.database.write() as session:
        session.get(DeviceRow, name).last_seen_at = world.hub.clock() - 3600


def test_a_rollout_is_over_but_for_who_is_away_and_the_board_takes_it_when_it_is_back(world):
    first, second = device(world, "a"), device(world, "b")
    begin(world.hub, canaries=["a"])
    say(first, COMMITTED)
    until(lambda: status(world) == ROLLING)
    leave(world, "b")
    until(lambda: status(world) == AWAITING)
    found = rollout_views.views(world.hub)[0]
    assert (found.detail, found.counts) == ("finished but for 1 that is away: b", {"committed": 1, "waiting": 1})
    assert asked(second)["rollout_id"] == 1
    say(second, "downloading")
    until(lambda: status(world) == ROLLING)
    say(second, COMMITTED)
    until(lambda: status(world) == FINISHED)
    assert rollout_views.views(world.hub)[0].detail == ""


def test_a_board_that_is_gone_for_good_keeps_no_other_rollout_waiting_and_revoked_it_ends_the_one_it_missed(world):
    first = device(world, "a")
    device(world, "b")
    begin(world.hub, canaries=["a"])
    say(first, COMMITTED)
    until(lambda: status(world) == ROLLING)
    leave(world, "b")
    until(lambda: status(world) == AWAITING)
    assert begin(world.hub, canaries=["a"]) == 2
    assert rollout_views.views(world.hub)[1].status == "superseded"
    assert rollout_views.views(world.hub)[1].detail == ("replaced by rollout 2; finished but for 1 that is away: b")
    say(first, COMMITTED, number=2)
    until(lambda: status(world) == AWAITING)
    set_status(world.hub, ["b"], REVOKED)
    until(lambda: status(world) == FINISHED)


def test_a_server_that_was_down_itself_takes_nobody_for_away_at_first(world):
    first = device(world, "a")
    device(world, "b")
    begin(world.hub, canaries=["a"])
    say(first, COMMITTED)
    until(lambda: status(world) == ROLLING)
    leave(world, "b", up_since=world.hub.clock())
    assert not rollouts.settle(world.hub)
    assert status(world) == ROLLING


def test_a_device_that_lies_is_a_failed_device_and_a_report_that_cannot_be_is_refused(world):
    first, second = device(world, "a"), device(world, "b")
    begin(world.hub, canaries=["a"], gate="ppl<=12 and tokens_per_second>=base")
    for number, more, words in (
        (1, {"state": "done"}, "422"),
        (1, {"figures": None}, "422"),
        (1, {"figures": {"ppl": -1.0}}, "422"),
        (1, {"figures": {"ppl": 1e300}}, "422"),
        (1, {"figures": {"ppl": 1.0, "magic": 1.0}}, "422"),
        (1, {"current": "0" * 64}, "422"),
        (1, {"reason": "x" * 501}, "422"),
        (1, {"sha256": "0" * 64, "current": "0" * 64}, "expected a report of model"),
        (1, {"state": "failed", "reason": ""}, "422"),
        (1, {"state": "rolled_back"}, "was not rolled back, it is canary"),
        (7, {}, "expected a rollout, found none of number 7"),
    ):
        with pytest.raises(NotTakenError, match=words):
            say(first, number=number, **{"state": COMMITTED, **more})
    with pytest.raises(NotTakenError, match="asks nothing of device b"):
        say(second, COMMITTED)
    assert states(world)["a"] == "waiting"
    say(first, COMMITTED, base=GOOD | {"tokens_per_second": 10.0})
    until(lambda: status(world) == STOPPED)
    found = rollout_views.views(world.hub)[0].devices[0]
    assert found.state == FAILED
    assert found.reason == "reported committed against its own figures: tokens_per_second>=1*base: 9, limit 10"


@pytest.mark.parametrize(
    ("request_", "words"),
    [({"gate": "ppl"}, "expected a condition such as"),
     ({"num_canaries": 3}, "expected 3 devices to go first, found 2"),
     ({"canaries": ["x"]}, "expected accepted devices, found x"), ({"devices": ["x"]}, "expected accepted devices"),
     ({"devices": ["a"], "canaries": ["b"]}, "expected canaries among the rollout's devices, found b"),
     ({"model_sha256": "0" * 64}, "found none of hash 000000000000: upload it")],
)  # fmt: skip
def test_what_cannot_be_begun_is_refused_with_the_reason(world, request_, words):
    device(world, "a"), device(world, "b")
    with pytest.raises(Exception, match=words):
        rollouts.start(world.hub, RolloutRequest(**{"model_sha256": SHA256, **request_}))
    assert rollout_views.views(world.hub) == []
    assert rollouts.head(world.hub) is None


def test_a_model_goes_on_where_its_upload_broke_off_and_anything_else_than_a_gguf_is_refused(tmp_path):
    hub = open_hub(tmp_path, settings=QUICK)
    content = CONTENT + b"more"
    sha256, size = hashlib.sha256(content).hexdigest(), QUICK.chunk_bytes
    assert models.upload_view(hub, sha256).num_chunks == 0
    models.put_chunk(hub, sha256, 0, content[:size], hashlib.sha256(content[:size]).hexdigest())
    assert models.upload_view(hub, sha256).model_dump() == {"complete": False, "num_chunks": 1, "chunk_bytes": size}
    with pytest.raises(Exception, match="expected a chunk of the announced hash"):
        models.put_chunk(hub, sha256, 1, content[:size], "0" * 64)
    with pytest.raises(Exception, match="expected chunks of at most"):
        models.put_chunk(hub, sha256, 1, bytes(size + 1), "0" * 64)
    with pytest.raises(Exception, match="send the model again"):
        models.add(hub, sha256, ModelRequest(name="m.gguf", num_bytes=len(content)))
    assert models.upload_view(hub, sha256).num_chunks == 0
    assert add_model(hub, content).sha256 == sha256
    assert models.upload_view(hub, sha256).complete
    with pytest.raises(Exception, match="expected a GGUF file, found another content"):
        add_model(hub, b"MZ" + bytes(100))
    assert [model.name for model in models.views(hub)] == ["m.gguf"]
    hub.database.close()


def test_a_model_is_kept_until_it_is_forgotten_and_the_newest_rollouts_cannot_be(tmp_path):
    hub = open_hub(tmp_path, settings=dataclasses.replace(QUICK, sweep_seconds=0.0))
    add_model(hub)
    assert sweep(hub) == 0
    with hub.database.write() as session:
        row = {"model_sha256": SHA256, "model_name": "m", "model_bytes": 1, "created_at": 0.0, "detail": ""}
        targets = {"canaries": [], "devices": None}
        session.add(
            RolloutRow(rollout_id=1, status=FINISHED, gate={"text": "", "conditions": []}, targets=targets, **row)
        )
    with pytest.raises(Exception, match="is the one of rollout 1"):
        models.forget(hub, SHA256)
    with hub.database.write() as session:
        session.delete(session.get(RolloutRow, 1))
    models.forget(hub, SHA256)
    with pytest.raises(Exception, match="expected a model, found none"):
        models.forget(hub, SHA256)
    assert sweep(hub) == 1
    hub.database.close()


def test_a_rollout_goes_on_after_the_server_was_started_anew_and_a_cut_blob_is_said(tmp_path):
    with served(tmp_path / "server") as world:
        add_model(world.hub)
        first, second = device(world, "a"), device(world, "b")
        begin(world.hub, canaries=["a"])
        say(first, COMMITTED)
        until(lambda: status(world) == ROLLING)
    with served(tmp_path / "server") as world:
        second.identity = dataclasses.replace(second.identity, url=world.url)
        second.reborn().hello()
        assert asked(second)["rollout_id"] == 1
        path = world.hub.blobs.path(SHA256)
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(NotTakenError, match="found it damaged on the server's disk"):
            second.link.download(SHA256, len(CONTENT), tmp_path / "model")
        path.write_bytes(b"x" + CONTENT[1:])
        with pytest.raises(NotTakenError, match="found other bytes, from its beginning on"):
            second.link.download(SHA256, len(CONTENT), tmp_path / "model")
        assert not models.upload_view(world.hub, SHA256).complete  # so the operator sends it again
        add_model(world.hub)
        second.link.download(SHA256, len(CONTENT), tmp_path / "model")
        assert (tmp_path / "model").read_bytes() == CONTENT


def test_an_agent_that_knows_no_rollouts_is_asked_for_tasks_alone_and_a_rollout_goes_before_a_task(world, settings):
    only = device(world, "a")
    start_run(world, settings)
    begin(world.hub)
    until(lambda: runs.views(world.hub)[0].tasks)
    assert asked(only)["kind"] == INSTALL
    assert only.task()["run_id"] == "run-a"


def test_a_database_of_the_version_before_gets_the_new_tables_and_a_later_one_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'old.sqlite'}"
    database = Database(url)
    with database.write() as session:
        session.execute(change(SchemaRow).values(version=2))
        RolloutRow.__table__.metadata.tables["rollout_devices"].drop(session.connection())
    database.close()
    database = Database(url)
    with database.read() as session:
        assert session.query(SchemaRow.version).scalar() == SCHEMA_VERSION
        assert session.query(RolloutRow).count() == 0
    with database.write() as session:
        session.execute(change(SchemaRow).values(version=SCHEMA_VERSION + 1))
    database.close()
    with pytest.raises(Exception, match="this server speaks"):
        Database(url)


def test_a_server_that_is_away_loses_no_report(world):
    only = device(world, "a")
    begin(world.hub)
    only.link.close()
    only.identity = dataclasses.replace(only.identity, url="http://127.0.0.1:9")
    with pytest.raises(UnreachableError):
        say(only.reborn(), COMMITTED)
    assert states(world) == {"a": "waiting"}
