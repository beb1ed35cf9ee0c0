"use strict";
// Keeps a page as the server says it is: parts arrive as server-sent events and replace their like. Without this file
// the page still shows everything and every action still works; it only does not move.
(() => {
  const parts = document.getElementById("parts");
  const tip = document.getElementById("tip");
  let offset = Number(parts.dataset.now) - Date.now() / 1000; // the server's clock, not this machine's

  // --- ages and times to go -------------------------------------------------------------------------------------
  function words(seconds) {
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return s + " s";
    if (s < 3600) return Math.floor(s / 60) + " min " + String(s % 60).padStart(2, "0") + " s";
    if (s < 172800) return Math.floor(s / 3600) + " h " + String(Math.floor((s % 3600) / 60)).padStart(2, "0") + " min";
    return Math.floor(s / 86400) + " d " + Math.floor((s % 86400) / 3600) + " h";
  }
  function tick(root) {
    const now = Date.now() / 1000 + offset;
    for (const time of root.querySelectorAll("time[data-at], time[data-until]")) {
      const { at, until, bare } = time.dataset;
      const left = Number(until) - now;
      const said = at !== undefined ? words(now - Number(at)) + (bare === undefined ? " ago" : "") : left > 0 ? words(left) + (bare === undefined ? " left" : "") : bare === undefined ? "due" : "passed";
      if (time.textContent !== said) time.textContent = said;
    }
  }
  setInterval(() => tick(document), 1000);

  // --- parts ----------------------------------------------------------------------------------------------------
  function held(root) { // what a reader has set by hand and must not lose
    return [...root.querySelectorAll("input[type=radio]:checked, input[type=search]")].map((i) => [i.id, i.value]);
  }
  function replace(id, html) {
    const old = document.getElementById(id);
    if (!old) return;
    const made = document.createElement("template");
    made.innerHTML = html; // made by the server's templates, which escape; the policy forbids scripts in any case
    const next = made.content.querySelector("#" + CSS.escape(id));
    if (!next || old.isEqualNode(next)) return;
    const focus = old.contains(document.activeElement) ? document.activeElement.id || document.activeElement.getAttribute("href") : null;
    const set = held(old);
    const picked = id === "rounds" ? chosenRound() : null;
    tick(next);
    const still = [...old.querySelectorAll("time")].map((t) => t.textContent).join() === "" ? null : old;
    old.replaceWith(next);
    for (const [input, value] of set) {
      const found = document.getElementById(input);
      if (found && found.type === "radio") found.checked = true; else if (found) found.value = value;
    }
    if (focus) { const found = document.getElementById(focus) || next.querySelector(`[href="${CSS.escape(focus)}"]`); if (found) found.focus({ preventScroll: true }); }
    if (still && next.tagName === "TR") next.classList.add("fresh");
    if (picked !== null) pickRound(picked, false);
    if (id === "fleet") filter();
    if (id === "heat") drawMap();
  }
  function listen() {
    const link = document.getElementById("link"), said = link.lastElementChild;
    const source = new EventSource(`/stream?page=${encodeURIComponent(parts.dataset.page)}&name=${encodeURIComponent(parts.dataset.name)}`);
    source.addEventListener("parts", (event) => {
      const message = JSON.parse(event.data);
      offset = message.now - Date.now() / 1000;
      for (const [id, html] of message.parts) replace(id, html);
      link.className = "link live";
      if (said.textContent !== "live") said.textContent = "live";
    });
    source.onerror = () => {
      link.className = "link lost";
      said.textContent = "connection lost";
      if (source.readyState === EventSource.CLOSED) fetch("/stream", { method: "HEAD" }).then((r) => { if (r.status === 401) location.reload(); else setTimeout(listen, 3000); }, () => setTimeout(listen, 3000));
    };
  }

  // --- actions: the same question as the page behind the link, asked here ---------------------------------------------
  const dialog = document.getElementById("confirm");
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-act]");
    if (link) {
      event.preventDefault();
      const name = decodeURIComponent(link.pathname.split("/")[2]);
      dialog.querySelector("h2").textContent = name === "all" || link.dataset.act.includes(" ") ? link.dataset.act + "?" : `${link.dataset.act} ${name}?`;
      dialog.querySelector("p").textContent = link.dataset.follows;
      dialog.querySelector("form").action = link.pathname;
      dialog.querySelector("[name=csrf]").value = parts.dataset.csrf;
      const act = dialog.querySelector(".do");
      act.textContent = link.dataset.act;
      act.classList.toggle("severe", link.classList.contains("severe"));
      dialog.showModal();
      dialog.querySelector("[data-close]").focus();
    } else if (event.target.closest("[data-close]")) dialog.close();
  });

  // --- fleet filter -------------------------------------------------------------------------------------------------
  function filter() {
    const box = document.getElementById("filter");
    if (!box) return;
    const wanted = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.querySelectorAll("#fleet tbody tr")) {
      const text = row.dataset.search.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
    }
  }
  document.addEventListener("input", (event) => { if (event.target.id === "filter") filter(); });

  // --- tips and charts ----------------------------------------------------------------------------------------------
  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 18) + "px";
  }
  let drawn = null;
  function point(event) {
    const plot = event.target.closest && event.target.closest(".plot");
    if (drawn && drawn !== plot) drawn.querySelector(".cursor").setAttribute("visibility", "hidden");
    drawn = plot;
    if (plot) {
      const box = plot.getBoundingClientRect(), at = 100 * (event.clientX - box.left) / box.width;
      const points = (plot.points ||= JSON.parse(plot.dataset.points));
      const nearest = points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
      const cursor = plot.querySelector(".cursor");
      cursor.setAttribute("x1", nearest[0] + "%");
      cursor.setAttribute("x2", nearest[0] + "%");
      cursor.setAttribute("visibility", "visible");
      show(nearest[2], event.clientX, event.clientY);
      return;
    }
    const owner = event.target.closest && event.target.closest("[data-tip]");
    if (owner) show(owner.dataset.tip, event.clientX, event.clientY); else tip.hidden = true;
  }
  addEventListener("pointermove", point, { passive: true });
  addEventListener("pointerdown", point, { passive: true });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // --- one round ------------------------------------------------------------------------------------------------------
  const kept = new Map(); // closed rounds never change
  let wanted = 0;
  function chosenRound() { // a number, or null while the newest is followed
    const picker = document.querySelector(".picker");
    if (!picker) return null;
    const number = Number(picker.querySelector("input").value);
    return number - 1 === Number(picker.dataset.last) ? null : number;
  }
  async function pickRound(number, byHand = true) {
    const picker = document.querySelector(".picker");
    if (!picker) return;
    const last = Number(picker.dataset.last) + 1, n = Math.max(1, Math.min(last, number));
    picker.querySelector("input").value = n;
    picker.querySelector("output").textContent = n;
    const url = `/runs/${encodeURIComponent(picker.dataset.run)}/rounds/${n - 1}`, mine = ++wanted;
    if (!kept.has(url)) {
      const reply = await fetch(url);
      if (!reply.ok) return;
      if (kept.size > 64) kept.delete(kept.keys().next().value);
      kept.set(url, await reply.text());
    }
    if (mine === wanted) document.getElementById("round").innerHTML = kept.get(url);
  }
  document.addEventListener("input", (event) => { if (event.target.id === "round-number") pickRound(Number(event.target.value)); });
  document.addEventListener("click", (event) => {
    const step = event.target.closest("[data-step]");
    if (step) pickRound(Number(document.getElementById("round-number").value) + Number(step.dataset.step));
  });

  // --- every device in every round --------------------------------------------------------------------------------------
  const NAMES = { m: "merged", l: "late", d: "dropped", r: "rejected", a: "away" };
  let matrix = null, cell = null, geometry = null;
  async function drawMap() {
    const holder = document.getElementById("map");
    if (!holder) return;
    if (!matrix || matrix.rounds !== Number(holder.dataset.rounds)) {
      const reply = await fetch(holder.dataset.url);
      if (!reply.ok) return;
      matrix = await reply.json();
    }
    paint();
  }
  function paint() {
    const holder = document.getElementById("map");
    if (!holder || !matrix) return;
    const canvas = holder.querySelector("canvas"), style = getComputedStyle(document.documentElement), css = (name) => style.getPropertyValue("--" + name).trim();
    const kind = (document.querySelector("[name=heat]:checked") || { value: "states" }).value;
    const high = Math.max(10, Math.min(18, Math.floor(640 / matrix.devices.length)));
    const context = canvas.getContext("2d"), font = "12px system-ui, sans-serif";
    context.font = font;
    const left = Math.min(150, 10 + Math.max(...matrix.devices.map((name) => context.measureText(name).width)));
    const wide = Math.max(4, Math.min(64, Math.floor((holder.clientWidth - left - 6) / matrix.rounds)));
    const width = left + wide * matrix.rounds + 6, height = 18 + high * matrix.devices.length, ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = font; context.textBaseline = "middle"; context.fillStyle = css("soft");
    geometry = { left, wide, high };
    const every = Math.ceil(34 / wide);
    for (let t = 0; t < matrix.rounds; t += every) context.fillText(t + 1, left + t * wide, 7);
    const flat = kind === "states" ? [] : matrix[kind].flat(), top = Math.max(1, ...flat);
    matrix.devices.forEach((name, row) => {
      context.globalAlpha = 1; context.fillStyle = css("soft");
      if (high >= 11) context.fillText(name.length > 22 ? name.slice(0, 21) + "…" : name, 0, 18 + row * high + high / 2);
      for (let t = 0; t < matrix.rounds; t++) {
        const state = NAMES[matrix.states[row][t]];
        context.globalAlpha = 1;
        if (state === "away") context.fillStyle = css("grid");
        else if (kind === "states") context.fillStyle = css(state);
        else { context.fillStyle = css("scale"); context.globalAlpha = 0.08 + 0.92 * matrix[kind][row][t] / top; }
        context.fillRect(left + t * wide, 18 + row * high, wide > 5 ? wide - 1 : wide, high - 1);
      }
    });
    if (cell) { context.globalAlpha = 1; context.strokeStyle = css("ink"); context.lineWidth = 2; context.strokeRect(left + cell[1] * wide, 18 + cell[0] * high, wide, high); }
  }
  function read(row, t) {
    if (!matrix || row < 0 || t < 0 || row >= matrix.devices.length || t >= matrix.rounds) return;
    if (cell && cell[0] === row && cell[1] === t) return;
    cell = [row, t];
    const state = NAMES[matrix.states[row][t]];
    document.querySelector("#map output").textContent = `${matrix.devices[row]}, round ${t + 1}: ${state}` + (state === "away" ? "" : `, ${matrix.ratios[row][t]} % pruned, rank ${matrix.ranks[row][t]}, ${matrix.seconds[row][t]} s`);
    paint();
  }
  document.addEventListener("pointermove", (event) => {
    if (event.target.tagName === "CANVAS" && geometry) read(Math.floor((event.offsetY - 18) / geometry.high), Math.floor((event.offsetX - geometry.left) / geometry.wide));
  }, { passive: true });
  document.addEventListener("click", (event) => { if (event.target.tagName === "CANVAS" && cell) pickRound(cell[1] + 1); });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.target.tagName !== "CANVAS" || !step) return;
    event.preventDefault();
    const [row, t] = cell || [0, 0];
    read(Math.max(0, row + step[0]), Math.max(0, t + step[1]));
  });
  document.addEventListener("change", (event) => { if (event.target.name === "heat") paint(); });
  addEventListener("resize", paint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  tick(document);
  drawMap();
  listen();
})();
