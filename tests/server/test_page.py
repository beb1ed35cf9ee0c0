"""What the page says of a fleet on record and of a run's directory: words that rest on figures, hostile words."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from link_world import ToyDevice, page_served, start_run, until
from prometheus_client.parser import text_string_to_metric_families

from fedspine_server.link.tables import RolloutDeviceRow, RolloutRow
from fedspine_server.page import metrics
from fedspine_server.page.app import create_page
from fedspine_server.page.diagnosis import BAD, GOOD, WARN, diagnose, slow_devices
from fedspine_server.page.directory_source import DirectorySource
from fedspine_server.page.drawing import runs_of_level, time_ticks, value_ticks
from fedspine_server.page.fleet_source import FleetSource
from fedspine_server.page.render import View, parts_of, round_html
from fedspine_server.page.story import Story
from fedspine_server.page.stream import Watches
from fedspine_server.page.views import (
    PENDING,
    SILENT,
    WAITING,
    WORKING,
    Device,
    Fleet,
    ModelFile,
    Rollout,
    RolloutPart,
    Run,
)

HOSTILE = "\"><img src=x onerror=hit()><script>hit()</script>'&{{7*7}}"


def device(name, *, compute=10.0, state="merged", detail=None, ratio=0.25, **more):
    return {
        "device_id": name, "board": "TX2", "power_mode": 0, "pruning_ratio": ratio, "rank": 8, "num_steps": 10,
        "reason": "first", "compute_seconds": compute, "download_seconds": 1.0, "upload_seconds": 1.0,
        "waiting_seconds": 0.0, "download_bytes": 100, "upload_bytes": 50, "state": state, "detail": detail,
        "loss_before": 2.0, "loss_after": 1.0, "num_examples": 10, "reward": 0.5, **more,
    }  # fmt: skip


def record(index, devices, **more):
    return {
        "round_index": index, "virtual_start_seconds": 20.0 * index, "virtual_end_seconds": 20.0 * (index + 1),
        "deadline_seconds": None, "schedule_ratio": 0.2, "loss_before": 2.0, "loss_after": 1.0 / (index + 1),
        "accuracy": None, "num_merged": sum(d["state"] == "merged" for d in devices), "late": [], "devices": devices,
        **more,
    }  # fmt: skip


def fleet_of(rounds, devices=(), **more):
    run = Run("run-a", "running", len(rounds), 10, story=Story(tuple(rounds)), **more)
    return Fleet(1000.0, tuple(devices), (run,))


def answers(fleet):
    return [answer.answer for answer in diagnose(fleet).answers]


def write_run(folder, rounds, **summary):
    folder.mkdir(exist_ok=True)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return DirectorySource(folder)


# --- what it concludes ----------------------------------------------------------------------------------------------


def test_a_run_in_which_all_is_well_is_healthy_and_asks_for_nothing():
    fleet = fleet_of([record(0, [device("a"), device("b")])], [Device("a", WAITING), Device("b", WORKING)])
    found = diagnose(fleet)
    assert (found.level, found.findings) == (GOOD, ())
    assert answers(fleet) == ["Healthy", "Nobody", "loss 1.00", "25 % pruned, rank 8", "Nothing"]


def test_a_slow_device_is_named_with_its_factor_and_what_takes_it_so_long():
    rounds = [record(i, [device("a"), device("b"), device("c", compute=34.0)]) for i in range(2)]
    assert slow_devices(Story(tuple(rounds))) == [("c", 3.0, "computing takes 3.4× the median, 3.40 s a step")]
    because = diagnose(fleet_of(rounds)).answers[1]
    assert (because.answer, because.because[:11]) == ("c", "3.0× the me")


def test_a_device_slow_by_its_link_is_not_told_to_compute_slowly():
    rounds = [record(i, [device("a"), device("b"), device("c", upload_seconds=30.0)]) for i in range(2)]
    assert slow_devices(Story(tuple(rounds)))[0][2] == "upload takes 30.0× the median"


def test_one_slow_round_among_others_makes_nobody_slow():
    rounds = [record(i, [device("a"), device("b"), device("c", compute=34.0 if i == 1 else 10.0)]) for i in range(3)]
    assert slow_devices(Story(tuple(rounds))) == []


def test_a_round_that_merged_less_than_half_is_trouble_and_comes_first():
    lost = [device("a"), *(device(name, state="dropped", detail="no answer") for name in "bcd")]
    found = diagnose(fleet_of([record(0, lost)], [Device("e", PENDING)]))
    assert (found.level, found.findings[0].title) == (BAD, "round 1 merged 1 of 4 updates")
    assert found.answers[0].answer == "In trouble"


def test_who_is_silent_pending_hot_or_short_of_memory_is_named():
    fleet = fleet_of(
        [record(0, [device("a")])],
        [
            Device("gone", SILENT, seen_at=880.0),
            Device("new", PENDING),
            Device("hot", WORKING, temperature_celsius=90.0, throttled_by=("cpu-thermal",)),
            Device("full", WAITING, memory_bytes=8 << 30, memory_available_bytes=100 << 20),
        ],
    )
    found = diagnose(fleet)
    said = " ".join(f"{finding.title} {finding.why}" for finding in found.findings)
    assert found.level == WARN
    for words in ("gone, silent for up to 2 min 00 s", "new", "hot is throttled at 90 °C", "full is short of memory"):
        assert words in said


def test_an_accuracy_that_fell_and_a_loss_that_rises_are_said():
    rounds = [record(i, [device("a")], accuracy=0.8 if i == 0 else 0.7) for i in range(2)]
    assert diagnose(fleet_of(rounds)).findings[0].title == "accuracy fell 10.0 points below its best"
    rounds = [record(i, [device("a")], loss_after=1.0 + i) for i in range(4)]
    assert diagnose(fleet_of(rounds)).findings[0].title == "loss rose 3 rounds in a row"


def test_a_run_that_waits_says_for_what():
    found = diagnose(fleet_of([], detail="waiting for 6 devices with this base model, found 2"))
    assert (found.findings[0].level, found.findings[0].why[:21]) == (WARN, "waiting for 6 devices")


# --- how it is drawn ------------------------------------------------------------------------------------------------


def test_a_lane_holds_download_compute_and_upload_in_per_cent_of_the_longest():
    lanes = Story((record(0, [device("a"), device("b", compute=18.0)]),)).round_view(0).lanes
    assert [lane.device_id for lane in lanes] == ["b", "a"]
    assert lanes[0].segments == (("download", 0.0, 5.0), ("compute", 5.0, 90.0), ("upload", 95.0, 5.0))


def test_the_matrix_has_a_letter_a_round_and_a_device_that_joined_late_was_away():
    story = Story((record(0, [device("a")]), record(1, [device("a", state="late"), device("b", ratio=0.5)])))
    found = story.matrix()
    assert (found["devices"], found["states"], found["ratios"]) == (["a", "b"], ["ml", "am"], [[25, 25], [0, 50]])


def test_ticks_are_round_and_equal_cells_are_one_piece():
    assert [tick.label for tick in time_ticks(250)] == ["0", "1 min", "2 min", "3 min", "4 min"]
    assert value_ticks(0.52, 0.93) == pytest.approx((0.4, 0.6, 0.8, 1.0))
    assert runs_of_level([1.0, 1.0, 0.0, 0.5]) == ((0.0, 50.0, 8), (50.0, 25.0, 0), (75.0, 25.0, 4))


VIEWS = [View("fleet"), View("run", "run-a"), View("model", "run-a"), View("device", "a")]


def hostile_fleet():
    records = [record(0, [device("a", board=HOSTILE, reason=HOSTILE, state="rejected", detail=HOSTILE)])] * 2
    shown = Device(
        "a", WORKING, board=HOSTILE, l4t=HOSTILE, reason=HOSTILE, problem=HOSTILE, throttled_by=(HOSTILE,),
        facts={"board": HOSTILE, "cpu_features": [HOSTILE], HOSTILE: "x"}, sample={"paused": HOSTILE}, run_id="run-a",
    )  # fmt: skip
    export = {"path": f"models/{HOSTILE}", "quant": HOSTILE, "size_bytes": 1, "accuracy": None, "top1_agreement": None}
    summary = {"exports": [{**export, "mean_kl": None, "dense": False}]}
    return fleet_of(records, [shown, Device("b", PENDING, board=HOSTILE)], detail=HOSTILE, summary=summary)


class Nothing:
    writable = True

    def structure(self, run_id):
        return ()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.page)
def test_hostile_words_of_a_device_stay_words(view):
    html = "".join(part.html for part in parts_of(view, hostile_fleet(), Nothing()))
    html += round_html(hostile_fleet().runs[0], 0)
    assert "&lt;script&gt;" in html
    assert not re.search(r"<(script|img)\b", html)
    assert "onerror=hit()" in html.replace("&#34;", "")  # there, as text; never within a tag of its own
    for tag in re.findall(r"<[^>]*>", html):
        assert "onerror" not in re.sub(r'"[^"]*"', "", tag)
    assert "49" not in re.findall(r"\{\{.*?\}\}", html)


def test_the_page_of_a_device_shows_the_release_of_its_image_and_the_slot():
    def html(**facts):
        parts = parts_of(View("device", "a"), fleet_of([], [Device("a", WAITING, facts=facts)]), Nothing())
        return next(part.html for part in parts if part.id == "device-head")

    shown = html(image_release=1764000000, image_slot="b")
    assert re.search(r"<dt>Release</dt><dd[^>]*>1764000000<small>slot b</small></dd>", shown)
    assert re.search(r"<dt>Release</dt><dd[^>]*>1764000000</dd>", html(image_release=1764000000, image_slot=None))
    assert "Release" not in html(board="x")


def test_a_part_is_new_only_when_more_than_an_age_has_changed():
    fleet = fleet_of([record(0, [device("a")])], [Device("a", WAITING, seen_at=990.0)])
    later = Fleet(1003.0, fleet.devices, fleet.runs)
    before, after = (parts_of(View("fleet"), f, Nothing()) for f in (fleet, later))
    assert [part.signature for part in before] == [part.signature for part in after]


def test_the_page_and_the_report_of_a_run_have_one_palette():
    root = Path(__file__).parents[2]
    report = (root / "python/fedspine_edge/report/palette.css").read_text()
    style = (root / "server/fedspine_server/page/assets/page.css").read_text()
    for mark in ("palette", "dark palette"):
        own = re.search(rf"/\* {mark} \*/\s*(.*?)\s*/\* end of {mark} \*/", style, re.DOTALL)[1]
        assert " ".join(own.split()) in " ".join(report.split())


# --- where it comes from --------------------------------------------------------------------------------------------


def test_a_directory_shows_its_run_and_what_a_simulation_notes(tmp_path):
    source = write_run(tmp_path / "run-a", [record(0, [device("a"), device("b", state="away")])])
    fleet = source.fleet()
    assert [(d.device_id, d.condition) for d in fleet.devices] == [("a", WAITING), ("b", SILENT)]
    assert (fleet.current.status, fleet.current.simulated) == ("stopped", True)
    live = {"at": source._clock(), "over": False, "phase": "", "rounds": 5, "deadline_seconds": 9.0, "wall": {"0": 3.5}}
    live["devices"] = {"a": {"state": "tuning", "board": "NX", "rank": 4, "pruning_ratio": 0.5, "reason": "why"}}
    before = source.stamp()
    (tmp_path / "run-a" / "live.json").write_text(json.dumps(live))
    assert source.stamp() != before
    fleet = source.fleet()
    assert (fleet.current.status, fleet.current.rounds, fleet.current.story.wall) == ("running", 5, (3.5,))
    assert (fleet.device("a").condition, fleet.device("a").rank) == (WORKING, 4)


def test_a_directorys_half_written_file_shows_what_was_there_before(tmp_path):
    source = write_run(tmp_path / "run-a", [record(0, [device("a")])])
    assert len(source.fleet().current.story.rounds) == 1
    (tmp_path / "run-a" / "rounds.jsonl").write_text('{"round_index": 0, "dev')
    assert len(source.fleet().current.story.rounds) == 1


def test_only_files_the_summary_names_leave_a_directory(tmp_path):
    source = write_run(tmp_path / "run-a", [record(0, [device("a")])], exports=[{"path": "a.gguf"}, {"path": "../b"}])
    models = tmp_path / "run-a" / "models"
    models.mkdir()
    for path in (models / "a.gguf", models / "other.gguf", tmp_path / "b"):
        path.write_text("x")
    assert source.file("run-a", "a.gguf") == models / "a.gguf"
    for name in ("other.gguf", "../b", "../../b", "experiment.json"):
        assert source.file("run-a", name) is None


def test_a_run_over_the_link_is_shown_with_its_choices_and_its_model(tmp_path, settings):
    with page_served(tmp_path) as world:
        start_run(world, settings, min_devices=2)
        source = FleetSource(world.hub)
        devices = [ToyDevice(world, name) for name in ("a", "b")]
        waits = until(lambda: (run := source.fleet().current).detail and run)
        assert waits.detail.startswith("waiting for 2 devices")
        for one in devices:
            one.hello()
        tasks = [until(one.task) for one in devices]
        fleet = source.fleet()
        assert {d.condition for d in fleet.devices} == {WORKING}
        assert (fleet.current.asked, fleet.current.answered) == (2, 0)
        assert fleet.device("a").reason
        progress = {"attempt": 1, "step": 2, "num_steps": 8, "sample": {"temperature_celsius": 61.5}}
        devices[0].link.progress(tasks[0]["task_id"], progress)
        shown = source.fleet().device("a")
        assert (shown.step, shown.num_steps, shown.temperature_celsius) == (2, 8, 61.5)
        for one, task in zip(devices, tasks, strict=True):
            one.work(task, tmp_path)
        run = until(lambda: (found := source.fleet().current).story.rounds and found)
        assert [mark.state for mark in run.story.marks("a")] == ["merged"]
        assert run.story.wall[0] > 0
        assert {group.kind for group in source.structure("run-a")} == {"heads", "ffn"}
        silent = world.hub.clock() + 3600
        world.hub.clock = lambda: silent
        assert {d.condition for d in source.fleet().devices} == {SILENT}


def test_a_change_reaches_everybody_who_looks_and_only_what_changed(tmp_path):
    source = write_run(tmp_path / "run-a", [record(0, [device("a"), device("b")])])
    watches = Watches(source, lambda: False)

    async def look():
        streams = [watches.messages(View("fleet")) for _ in range(3)]
        first = [json.loads(await stream.__anext__()) for stream in streams]
        write_run(tmp_path / "run-a", [record(0, [device("a"), device("b")]), record(1, [device("a"), device("b")])])
        second = [json.loads(await asyncio.wait_for(stream.__anext__(), 5)) for stream in streams]
        for stream in streams:
            await stream.aclose()
        return first, second

    first, second = asyncio.run(look())
    assert "fleet" in {part for part, _ in first[0]["parts"]}
    changed = {part for part, _ in second[0]["parts"]}
    assert {"device-a", "device-b", "answers"} <= changed
    assert "fleet" not in changed
    assert second[1] == second[0]
    assert not watches._watches


def test_a_directorys_page_is_for_this_machine_and_changes_nothing(tmp_path):
    app = create_page(write_run(tmp_path / "run-a", [record(0, [device("a")])]))
    assert asyncio.run(status(app, "/", "127.0.0.1:80")) == 200
    assert asyncio.run(status(app, "/", "evil.example:80")) == 421
    assert asyncio.run(status(app, "/devices/a/revoke", "localhost")) == 404
    assert asyncio.run(status(app, "/login", "localhost")) == 404


async def status(app, path, host):
    sent = []
    headers = [(b"host", host.encode()), (b"accept", b"text/html")]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http"}

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    await app(scope | {"http_version": "1.1", "root_path": ""}, receive, send)
    return sent[0]["status"]


# --- metrics --------------------------------------------------------------------------------------------------------


def samples(fleet):
    families = text_string_to_metric_families(metrics.exposition(fleet).decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def test_metrics_have_the_documented_names_and_the_historys_figures():
    rounds = [
        record(0, [device("a"), device("b", state="rejected", detail="expected finite values in x, found NaN or Inf")]),
        record(1, [device("a"), device("b", state="late")], accuracy=0.75),
    ]
    shown = Device(
        "a", WORKING, seen_at=990.0, energy_joules=12.5, memory_available_bytes=1 << 30, pruning_ratio=0.25, rank=8
    )
    found = samples(fleet_of(rounds, [shown, Device("b", SILENT, seen_at=500.0)]))
    run = ("run", "run-a")
    assert found["fedspine_round", run] == 2
    assert found["fedspine_rounds_total", ("outcome", "merged"), run] == 2
    assert found["fedspine_round_duration_seconds_sum", run] == 40
    assert found["fedspine_round_duration_seconds_bucket", ("le", "30"), run] == 2
    assert found["fedspine_device_up", ("device", "a")] == 1
    assert found["fedspine_device_up", ("device", "b")] == 0
    assert found["fedspine_device_last_seen_timestamp_seconds", ("device", "a")] == 990
    assert found["fedspine_device_energy_joules_total", ("device", "a"), ("rail", "input")] == 12.5
    assert found["fedspine_device_memory_bytes", ("device", "a"), ("kind", "available")] == 1 << 30
    assert found["fedspine_transfer_bytes_total", ("device", "a"), ("direction", "download")] == 200
    assert found["fedspine_updates_rejected_total", ("reason", "not_finite")] == 1
    assert found["fedspine_controller_pruning_ratio", ("device", "a")] == 0.25
    assert found["fedspine_controller_lora_rank", ("device", "a")] == 8
    assert found["fedspine_eval_accuracy_ratio", run, ("split", "validation")] == 0.75
    assert not [key for key in found if key[0] == "fedspine_device_throttled_ratio"]  # nobody measured it


def test_a_throttled_board_has_lost_the_share_its_clock_lacks():
    shown = Device("a", WORKING, throttled_by=("cpu",), sample={"throttled_by": ["cpu"], "clock_ratio": 0.6})
    assert samples(fleet_of([], [shown]))["fedspine_device_throttled_ratio", ("device", "a")] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ("expected finite values in lora_a/x, found NaN or Inf", "not_finite"),
        ("expected an update of x of norm up to 4, found 9.1", "norm"),
        ("expected keep/layers.0.ffn within the assigned candidates, found others", "mask"),
        ("expected base_sha256 abc, found def", "base"),
        ("expected lora_a/x float16 [2, 3], found float32 [9]", "shape"),
        ("expected num_steps in 1..4, found 9", "report"),
        ("something nobody foresaw", "other"),
    ],
)
def test_reasons_of_refusals_are_few(detail, reason):
    assert metrics.reason_of(detail) == reason


def test_hostile_labels_stay_within_their_quotes():
    found = samples(fleet_of([], [Device("a", WAITING, board=HOSTILE + '\n"} 1\nfedspine_round 7')]))
    assert [key for key in found if key[0] == "fedspine_round"] == [("fedspine_round", ("run", "run-a"))]


# --- rollouts -----------------------------------------------------------------------------------------------------


def rollout(status="rolling", **more):
    parts = (
        RolloutPart("a", True, "committed", figures={"ppl": 20.0, "tokens_per_second": 9.0}, base={"ppl": 19.0}),
        RolloutPart("b", False, "failed", reason=HOSTILE),
        RolloutPart("c", False, "downloading", received_bytes=500),
    )
    counts = {"committed": 1, "failed": 1, "downloading": 1}
    fields = {"model": "m.gguf", "model_bytes": 1000, "gate": "ppl<=1.1*base", "created_at": 1.0}
    return Rollout(3, status, counts=counts, parts=parts, **{**fields, **more})


class Still:
    writable = True


def rollout_html(*rollouts, models=()):
    fleet = Fleet(1000.0, (), (), (), rollouts, models)
    return {part.id: part.html for part in parts_of(View("rollouts"), fleet, Still())}


def test_a_rollout_shows_each_device_with_its_figures_beside_those_before_and_escapes_its_words():
    html = rollout_html(rollout(), rollout("superseded", gate=""))
    for words in ("Rollout 3: rolling", "before 19", "50 % of 1 kB", "canary", "1</dd>", "/rollouts/3/rollback"):
        assert words in html["rollout-now"]
    assert "<script" not in html["rollout-now"]
    assert "&lt;script&gt;" in html["rollout-now"]
    assert "superseded" in html["rollout-history"]
    assert "it has to run" in html["rollout-history"]
    assert "/rollouts/new" not in html["rollout-now"], "while one is under way no other is offered"
    over = rollout_html(rollout("finished"), models=(ModelFile("a" * 64, "m.gguf", 1000, 1.0),))
    assert "/rollouts/new" in over["rollout-now"]
    assert "/rollouts/new" in over["models"]
    assert "No model was rolled out yet" in rollout_html()["rollout-now"]


def test_a_stopped_rollout_and_devices_that_failed_deserve_a_look():
    stopped = diagnose(Fleet(1000.0, (), (), (), (rollout("stopped", detail="canary b failed: ppl"),)))
    assert [(found.title, found.why) for found in stopped.findings] == [
        ("rollout 3 of m.gguf stopped", "canary b failed: ppl")
    ]
    assert diagnose(Fleet(1000.0, (), (), (), (rollout(),))).findings[0].title == "1 device did not take m.gguf"
    assert diagnose(Fleet(1000.0, (), (), (), (rollout("rolled_back"),))).findings == ()


def test_a_rollout_that_waits_for_who_is_away_says_so_where_one_looks_and_another_may_begin():
    away = rollout("awaiting", detail="finished but for 2 that are away: x, y")
    html = rollout_html(away, models=(ModelFile("a" * 64, "m.gguf", 1000, 1.0),))
    assert "Rollout 3: finished but for 2 that are away: x, y" in html["rollout-now"]
    assert "/rollouts/new" in html["rollout-now"]
    found = diagnose(Fleet(1000.0, (), (), (), (away,)))
    assert [(finding.level, finding.why) for finding in found.findings][-1] == ("note", away.detail)
    fleet = {part.id: part.html for part in parts_of(View("fleet"), Fleet(1000.0, (), (), (), (away,)), Still())}
    assert "of m.gguf: finished but for 2 that are away: x, y" in fleet["rollout"]


def test_metrics_tell_the_newest_rollouts_status_its_devices_and_what_was_measured():
    text = metrics.exposition(Fleet(1000.0, (), (), (), (rollout(), rollout("superseded")))).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["fedspine_rollout_status", "3", "m.gguf", "rolling"] == 1
    assert samples["fedspine_rollout_devices", "3", "failed"] == 1
    assert samples["fedspine_rollout_perplexity", "a"] == 20
    assert samples["fedspine_rollout_tokens_per_second", "a"] == 9
    assert "superseded" not in text


def test_the_fleet_page_tells_a_rollout_under_way_and_each_devices_model(tmp_path):
    with page_served(tmp_path) as world:
        ToyDevice(world, "a").hello()
        with world.hub.database.write() as session:
            row = {"model_name": "m.gguf", "model_bytes": 9, "created_at": 1.0, "detail": ""}
            targets = {"canaries": ["a"], "devices": None}
            gate = {"text": "", "conditions": []}
            for number, status in ((1, "finished"), (2, "canary")):
                sha256 = f"{number}" * 64
                session.add(
                    RolloutRow(rollout_id=number, status=status, model_sha256=sha256, gate=gate, targets=targets, **row)
                )
                session.flush()
            for number, state in ((1, "committed"), (2, "checking")):
                report = {"reason": "", "figures": None, "base": None, "current": "1" * 64, "received_bytes": 0}
                session.add(
                    RolloutDeviceRow(rollout_id=number, device_id="a", state=state, report=report, reported_at=2.0)
                )
        source = FleetSource(world.hub)
        fleet = source.fleet()
        assert [(found.model, found.rollout_state) for found in fleet.devices] == [("m.gguf", "checking")]
        assert [(found.rollout_id, found.counts) for found in fleet.rollouts] == [
            (2, {"checking": 1}), (1, {"committed": 1}),
        ]  # fmt: skip
        html = {part.id: part.html for part in parts_of(View("fleet"), fleet, source)}
        assert "Rollout 2" in html["rollout"]
        assert "m.gguf · checking" in html["device-a"]
        html = {part.id: part.html for part in parts_of(View("device", "a"), fleet, source)}
        assert "rollout: checking" in html["device-head"]
