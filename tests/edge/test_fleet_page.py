"""The fleet page in a real browser: a fleet of real agents, a long run, hostile words, and Prometheus reading it.

`make test-page` runs these; the bounds are wide, the figures are printed (`-rP`).
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from export_models import DENSE, PER_LAYER, save_decoder
from page_world import agent_process, browser, fedspine, free_port, long_run, real_fleet, seconds_until, start_agent
from tiny import questions

from fedspine_edge.agent.enrolment import enrol
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.commands.operate import Operator
from fedspine_edge.commands.page import open_page
from fedspine_edge.commands.start_run import run_request
from fedspine_edge.export.gguf import write_gguf

pytestmark = pytest.mark.page

MONITORING = Path(__file__).parents[2] / "server" / "monitoring"
ROUNDS, DEVICES = 200, 80
HOSTILE = '"><img src=x onerror=window.hit=1><script>window.hit=1</script>'
FLAT_SECONDS = float(os.environ.get("FEDSPINE_PAGE_SECONDS", "30"))


def show(words):
    """A figure where `pytest -rP` shows it."""
    sys.stdout.write(words + "\n")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("live")
    data = folder / "rows.jsonl"
    rows = questions() * 4
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    with real_fleet(folder, tiny_models["bert"], data) as fleet:
        operator = Operator(fleet["directory"] / "server" / "operator.json")
        operator.post("runs", run_request(fleet["toml"], name="live", timings=None))
        restarted = []  # agents that a test started anew live on for the tests after it
        try:
            yield {
                **fleet, "data": data, "model": tiny_models["bert"], "operator": operator, "restarted": restarted,
            }  # fmt: skip
        finally:
            for process in restarted:
                process.terminate()
                process.wait(20)


@pytest.fixture
def page(chromium):
    page = chromium.new_page()
    page.problems, page.addresses = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.addresses.append(request.url))
    yield page
    page.close()


@pytest.fixture
def signed_in(page, fleet):
    page.goto(fleet["url"] + "/")
    if "/login" in page.url:
        page.fill("#password", fleet["page_password"])
        page.click("button.do")
    page.wait_for_selector(".link.live")
    return page


def serious(page):
    """What axe-core finds that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:160]}" for v in found if v["impact"] in ("serious", "critical")]


def test_an_event_shows_on_the_page_soon_and_a_device_is_let_in_and_shut_out_from_it(signed_in, fleet):
    page, name = signed_in, "orin-nx-3"
    settings = AgentSettings(model=str(fleet["model"]), data=str(fleet["data"]), threads=1)
    enrol(fleet["url"], fleet["token"], fleet["directory"] / "devices" / name, settings, name=name)
    seconds = seconds_until(lambda: page.locator(f"#pending-{name}").count(), 60)
    show(f"an enrolled device shows after {seconds:.2f} s")
    page.click(f"#pending-{name} a.button")
    assert page.locator("dialog[open] h2").inner_text() == f"Accept {name}?"
    page.keyboard.press("Escape")
    assert fleet["operator"].get(f"devices/{name}")["status"] == "pending"
    page.click(f"#pending-{name} a.button")
    page.click("dialog .do")
    page.wait_for_selector(f"#device-{name}")
    assert fleet["operator"].get(f"devices/{name}")["status"] == "accepted"
    page.click(f"#device-{name} a")
    page.click("a.button.severe")
    page.click("dialog .do")
    page.wait_for_url(fleet["url"] + "/")
    assert fleet["operator"].get(f"devices/{name}")["status"] == "revoked"
    assert page.locator(f"#device-{name}").count() == 0
    assert not page.problems


def test_rounds_close_before_the_readers_eyes(signed_in, fleet):
    page = signed_in
    page.goto(fleet["url"] + "/runs/live")
    seconds_until(lambda: page.locator("#round .lane").count() > 3, 120)
    closed = int(page.locator(".picker").get_attribute("data-last"))
    seconds_until(lambda: int(page.locator(".picker").get_attribute("data-last")) > closed, 120)
    page.locator("[data-step='-1']").click()
    assert page.locator(".picker output").inner_text() == str(int(page.locator("#round-number").input_value()))
    assert not page.problems


def test_a_killed_agent_turns_grey_with_its_age_and_comes_back(signed_in, fleet):
    page, name = signed_in, "device-07"
    row = page.locator(f"#device-{name}")
    row.wait_for()
    os.kill(agent_process(fleet, name), signal.SIGKILL)
    seconds = seconds_until(lambda: "silent" in (row.get_attribute("class") or ""), 180)
    age = row.locator(".state time").inner_text()
    show(f"grey after {seconds:.0f} s, last seen {age}")
    grey = row.locator("a").first.evaluate("e => getComputedStyle(e).color")
    lively = page.locator("tr:not(.silent) th a").first.evaluate("e => getComputedStyle(e).color")
    seconds_until(lambda: "not heard of" in page.locator("#findings").inner_text(), 60)
    fleet["restarted"].append(start_agent(fleet, name))
    assert re.fullmatch(r"\d+ (s|min \d+ s) ago", age)
    assert grey != lively
    seconds = seconds_until(lambda: "silent" not in (row.get_attribute("class") or ""), 180)
    show(f"back after {seconds:.1f} s")
    assert not page.problems


@pytest.mark.parametrize("path", ["/", "/runs/live", "/runs/live/model", "/devices/device-00", "/rollouts"])
def test_a_page_is_accessible_fits_a_phone_stays_at_home_and_works_without_a_mouse(signed_in, fleet, path):
    page = signed_in
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.goto(fleet["url"] + path)
            page.wait_for_selector(".link.live", state="attached")
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than {width}"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert {urllib.parse.urlsplit(url)[:2] for url in page.addresses} == {urllib.parse.urlsplit(fleet["url"])[:2]}
    assert not page.problems


def test_the_door_is_accessible_and_says_what_was_wrong(page, fleet, chromium):
    chromium.clear_cookies()
    page.goto(fleet["url"] + "/runs/live")
    assert serious(page) == []
    page.fill("#password", "not it")
    page.click("button.do")
    assert "neither" in page.locator("[role=alert]").inner_text()
    page.fill("#password", fleet["page_password"])
    page.click("button.do")
    page.wait_for_selector(".link.live", state="attached")


def test_hostile_words_of_a_board_run_nothing_in_a_browser(page, tmp_path):
    made = long_run(tmp_path / "run", 3, 4)
    for record in made:
        for device in record["devices"]:
            device |= {"board": HOSTILE, "reason": HOSTILE, "detail": HOSTILE, "state": "rejected"}
    made[-1]["devices"][0]["device_id"] = HOSTILE
    (tmp_path / "run" / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    url = open_page(tmp_path / "run", 0)
    for path in ("", "runs/run", "runs/run/model", "devices/jetson-01"):
        page.goto(url + path)
        page.wait_for_selector(".link.live")
        page.mouse.move(400, 500)
        assert page.evaluate("window.hit") is None
        assert page.locator("main img").count() == 0
    assert HOSTILE in page.locator("#device-head").inner_text()


def test_a_run_of_200_rounds_and_80_devices_stays_smooth_small_and_flat(page, tmp_path):
    long_run(tmp_path / "long", ROUNDS, DEVICES)
    url = open_page(tmp_path / "long", 0)
    sizes = []
    page.on("response", lambda reply: sizes.append(int(reply.headers.get("content-length", 0))))
    page.goto(url + "runs/long")
    page.wait_for_selector(".link.live")
    # Not wait_for_function: what it does when it has to wait, the page's content security policy forbids.
    seconds_until(lambda: page.evaluate("document.querySelector('canvas').width > 300"), 60)
    show(f"page of {sum(sizes) / 1e6:.2f} MB in {len(sizes)} answers")
    assert sum(sizes) < 1e6
    times = [interaction(page, action) for action in ["round", "kind", "cell"] * 12]
    show(f"scripted interaction: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")
    cdp = page.context.new_cdp_session(page)
    before, until, n = heap(cdp), time.monotonic() + FLAT_SECONDS, 0
    while time.monotonic() < until:
        n += 1
        long_run(tmp_path / "long", ROUNDS - n % 2, DEVICES, seed=n)
        interaction(page, ("round", "kind", "cell")[n % 3])
        page.wait_for_timeout(700)
        if n == 5:  # what is kept once, such as code and closed rounds, is there by now
            before = heap(cdp)
    after = heap(cdp)
    show(f"heap {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB over {FLAT_SECONDS:.0f} s and {n} new runs")
    assert after < 1.5 * before + 4e6


def interaction(page, action):
    """Milliseconds from an action to the second frame after it, in which its effect is painted."""
    script = {
        "round": "const i = document.getElementById('round-number'); i.value = 1 + Math.floor(Math.random() * 198);"
        " i.dispatchEvent(new Event('input', {bubbles: true}));",
        "kind": "const r = [...document.querySelectorAll('[name=heat]')].find((r) => !r.checked); r.click();",
        "cell": "document.querySelector('canvas').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));",
    }[action]
    frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    return page.evaluate(
        f"async () => {{ const t = performance.now(); {script} await {frames}; return performance.now() - t; }}"
    )


def heap(cdp):
    cdp.send("HeapProfiler.collectGarbage")
    return cdp.send("Runtime.getHeapUsage")["usedSize"]


def test_prometheus_reads_a_live_fleet_and_its_rules_load(fleet, ggufs, tmp_path):
    operator = ("--operator", fleet["operator_file"], "--json")
    fedspine("rollout", "start", "--model", ggufs[0], "--device", "device-00", *operator)
    server = fleet["directory"] / "server"
    for source in (MONITORING / "alerts.yml", server / "ca.pem", server / "metrics.token"):
        shutil.copy(source, tmp_path)
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("server.lan:8443", urllib.parse.urlsplit(fleet["url"]).netloc)
    (tmp_path / "prometheus.yml").write_text("global: {evaluation_interval: 1s}\n" + config.replace("15s", "1s"))
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, check=True, capture_output=True)
    port = free_port()
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        seconds_until(lambda: asked(port, "fedspine_round"), 120)
        assert len(asked(port, "fedspine_device_up")) >= 8
        rules = said(port, "rules")["groups"][0]["rules"]
        assert len(rules) == 10
        seconds_until(lambda: all(r["health"] == "ok" for r in said(port, "rules")["groups"][0]["rules"]), 60)
        panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
        # This machine has no such sensors, and tiny tasks are over before they report any.
        empty = {"Temperature", "Power", "Memory left", "Clock lost to throttling", "Accuracy"}
        for panel in panels:
            for target in panel["targets"]:
                expression = target["expr"].replace("$run", "live")
                if panel["title"] not in empty:
                    seconds_until(lambda query=expression: asked(port, query), 60)
    finally:
        process.terminate()
        process.wait(20)
        fedspine("rollout", "rollback", *operator)


def said(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5) as reply:
        return json.load(reply)["data"]


def asked(port, query):
    try:
        return said(port, "query?query=" + urllib.parse.quote(query))["result"]
    except OSError:
        return []


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    """A dense and a pruned tiny decoder, as files."""
    folder = tmp_path_factory.mktemp("ggufs")
    return [
        write_gguf(
            save_decoder(folder / name, "llama", widths), folder / f"{name}.gguf", quantization="F16", name=name
        ).path
        for name, widths in (("dense", DENSE), ("pruned", PER_LAYER))
    ]


def ask_for_a_rollout(page, url):
    """From the model view to the question, by keys alone; once with a gate that is none."""
    page.goto(url + "/runs/live/model")
    page.wait_for_selector(".link.live", state="attached")
    page.locator("#models a.button").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/rollouts/new")
    assert serious(page) == []
    page.select_option("#model", label=page.locator("#model option", has_text="dense").inner_text())
    page.fill("#gate", "ppl<=")
    page.locator("#gate").press("Enter")
    assert "expected a condition such as" in page.locator("[role=alert]").inner_text()
    assert page.locator("#model option:checked").inner_text().startswith("dense")
    page.fill("#gate", "ppl<=100000 and tokens_per_second>=1")
    page.fill("#canaries", "2")
    page.locator("#gate").press("Enter")
    said = page.locator("main").inner_text()
    for words in ("Start this rollout?", "once they have committed, to the other", "perplexity at most 100000"):
        assert words in said
    assert serious(page) == []


def assert_sound_everywhere(page, address):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.goto(address)
            page.wait_for_selector(".link.live", state="attached")
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{address} is wider than {width}"
            )


def test_a_rollout_is_begun_followed_and_taken_back_from_the_page_without_a_mouse(signed_in, fleet, ggufs):
    page, url = signed_in, fleet["url"]
    seconds_until(lambda: page.locator("#fleet tr.silent").count() == 0, 180)  # a board that is away is waited for
    for file in ggufs:
        fedspine("rollout", "upload", file, "--operator", fleet["operator_file"], "--json")
    ask_for_a_rollout(page, url)
    page.locator("button.do").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/rollouts")
    began = time.monotonic()
    try:
        page.wait_for_selector("#rollout-now .status:has-text('finished')", timeout=300_000)
    finally:
        show(f"devices by state: {fleet['operator'].get('rollouts')[0]['counts']}")
    rows = page.locator("#rollout-now tbody tr")
    show(f"{rows.count()} devices have it after {time.monotonic() - began:.1f} s")
    assert rows.count() >= 8
    assert page.locator("#rollout-now tbody .dot.good").count() == rows.count()
    assert page.locator("#rollout-now tbody small:has-text('canary')").count() == 2
    page.goto(url + "/")
    page.wait_for_selector("#device-device-00 .model:has-text('dense.gguf')")
    assert_sound_everywhere(page, url + "/rollouts")
    back = page.locator("#rollout-now a.severe")
    back.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] h2").inner_text() == "Roll back?"
    page.keyboard.press("Escape")
    assert fleet["operator"].get("rollouts")[0]["status"] == "finished"
    back.click()
    page.locator("dialog .do").click()
    page.wait_for_selector("#rollout-now .status:has-text('rolled back')")
    seconds_until(lambda: fleet["operator"].get("rollouts")[0]["counts"] == {"rolled_back": rows.count()}, 180)
    page.goto(url + "/devices/device-00")
    assert "rollout: rolled back" in page.locator("#device-head").inner_text()
    # The console names the answer to the form that was wrong on purpose.
    assert [problem for problem in page.problems if "422" not in problem] == []
