"use strict";
const content = JSON.parse(document.getElementById("results").textContent);
const choices = JSON.parse(document.getElementById("choices").textContent);
const rows = content.rows;
const byKey = new Map(rows.map((row) => [row.key, row]));
const has = (row, name) => row[name] !== null && row[name] !== undefined;
const INK = "#1f2430", ACCENT = "#2f6fdb", WARM = "#d9822b", GREY = "#8a90a0";

function svg(tag, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}

function html(tag, parent, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  parent.appendChild(element);
  return element;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e5) {
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return parseFloat((value / unit).toPrecision(4)) + " " + letter;
  }
  if (Number.isInteger(value)) return String(value);
  return size < 1e-3 ? value.toExponential(2) : String(parseFloat(value.toPrecision(4)));
}

// --- what hovers ------------------------------------------------------------------------------------------------------
const tip = document.getElementById("tip");
function hover(element, text) {
  element.addEventListener("mousemove", (event) => {
    tip.textContent = text;
    tip.style.visibility = "visible";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  element.addEventListener("mouseleave", () => { tip.style.visibility = "hidden"; });
}

function choose(key) {
  for (const element of document.querySelectorAll("[data-key]"))
    element.classList.toggle("chosen", element.dataset.key === key && !element.classList.contains("chosen"));
}

// --- scales -----------------------------------------------------------------------------------------------------------
function scale(values, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  const logarithmic = low > 0 && high / low > 20;
  const t = logarithmic ? Math.log10 : (v) => v, back = logarithmic ? (v) => 10 ** v : (v) => v;
  low = t(low); high = t(high);
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  low -= margin; high += margin;
  const place = (v) => from + (t(v) - low) / (high - low) * (to - from);
  let ticks = [];
  if (logarithmic && high - low > 2) {
    for (let e = Math.ceil(low); e <= high; e += Math.ceil((high - low) / 6)) ticks.push(10 ** e);
  } else {
    const step = 10 ** Math.floor(Math.log10((high - low) / 4));
    const wide = [1, 2, 5, 10].find((m) => (high - low) / (step * m) <= 6) * step;
    for (let v = Math.ceil(low / wide) * wide; v <= high; v += wide) ticks.push(back(Math.abs(v) < wide / 1e6 ? 0 : v));
  }
  return { place, ticks };
}

function axes(picture, x, y, box, titles) {
  const group = svg("g", { class: "axis" }, picture);
  for (const value of x.ticks) {
    svg("line", { x1: x.place(value), x2: x.place(value), y1: box.top, y2: box.bottom }, group);
    svg("text", { x: x.place(value), y: box.bottom + 15, "text-anchor": "middle", class: "tick" }, group, short(value));
  }
  for (const value of y.ticks) {
    svg("line", { x1: box.left, x2: box.right, y1: y.place(value), y2: y.place(value) }, group);
    svg("text", { x: box.left - 6, y: y.place(value) + 4, "text-anchor": "end", class: "tick" }, group, short(value));
  }
  svg("text", { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle" }, group, titles.x);
  svg("text", { x: box.left - 44, y: box.top - 8 }, group, titles.y);
}

// --- quality against time -----------------------------------------------------------------------------------------------
const select = Object.fromEntries(["model", "x", "y"].map((id) => [id, document.getElementById(id)]));
const plotted = (row) => !row.axis && choices.times.some((n) => has(row, n)) && choices.qualities.some((n) => has(row, n));
for (const model of new Set(rows.filter(plotted).map((row) => row.model))) html("option", select.model, model).value = model;

function offer(element, names) {
  const before = element.value;
  element.replaceChildren();
  for (const name of names) html("option", element, choices.titles[name]).value = name;
  if (names.includes(before)) element.value = before;
}

function offerAxes() {
  const own = rows.filter((row) => row.model === select.model.value);
  offer(select.x, choices.times.filter((name) => own.some((row) => has(row, name))));
  offer(select.y, choices.qualities.filter((name) => own.some((row) => has(row, name))));
}

function color(row) {
  return row.peer ? WARM : row.method === "uncached" ? GREY : ACCENT;
}

function drawPareto() {
  const place = document.getElementById("pareto"), nx = select.x.value, ny = select.y.value;
  place.replaceChildren();
  const own = rows.filter((row) => row.model === select.model.value && plotted(row) && has(row, nx) && has(row, ny));
  if (!own.length) return;
  const picture = svg("svg", { viewBox: "0 0 1100 440", role: "img" }, place);
  const box = { left: 70, right: 1080, top: 24, bottom: 395 };
  const x = scale(own.map((row) => row[nx]), box.left, box.right);
  const y = scale(own.map((row) => row[ny]), box.bottom, box.top);
  axes(picture, x, y, box, { x: choices.titles[nx], y: choices.titles[ny] });
  const better = (name, a, b) => (choices.higher.includes(name) ? a[name] >= b[name] : a[name] <= b[name]);
  const best = own.filter((row) => !own.some((o) => o !== row && better(nx, o, row) && better(ny, o, row)
    && (o[nx] !== row[nx] || o[ny] !== row[ny])));
  best.sort((a, b) => a[nx] - b[nx]);
  svg("polyline", { class: "frontier", points: best.map((r) => `${x.place(r[nx])},${y.place(r[ny])}`).join(" ") }, picture);
  const taken = [];
  for (const row of own) {
    const px = x.place(row[nx]), py = y.place(row[ny]);
    const point = svg("circle", { class: "point", cx: px, cy: py, r: 6, fill: color(row), "data-key": row.key,
      "data-x": row[nx], "data-y": row[ny] }, picture);
    hover(point, `${row.name}\n${choices.titles[nx]}: ${short(row[nx])}\n${choices.titles[ny]}: ${short(row[ny])}`
      + (has(row, "efficiency") ? `\nefficiency: ${short(row.efficiency)}` : ""));
    point.addEventListener("click", () => choose(row.key));
    const wide = row.name.length * 6, beyond = px + 9 + wide > box.right, left = beyond ? px - 9 - wide : px + 9;
    let at = py + 4;
    while (taken.some((t) => Math.abs(t.at - at) < 12 && left < t.left + t.wide && t.left < left + wide)) at += 12;
    taken.push({ at, left, wide });
    svg("text", { x: beyond ? px - 9 : px + 9, y: at, "text-anchor": beyond ? "end" : "start", class: "label" }, picture, row.name);
  }
}

// --- the table ----------------------------------------------------------------------------------------------------------
const shown = Object.keys(choices.titles).filter((name) => rows.some((row) => has(row, name)));
let sorted = { name: null, down: false };

function cell(row, name, line) {
  const td = html("td", line, short(row[name]));
  td.dataset.column = name;
  if (has(row, name + "_min")) html("small", td, ` (${short(row[name + "_min"])} … ${short(row[name + "_max"])})`);
  const note = row.missing[name];
  if (note) hover(td, note);
  if (name === "macs" && row.printed.macs)
    html("small", td, ` · of one row of the batch ${short(row.macs / row.batch_size)}, printed ${short(row.printed.macs)}`);
  if (name === "speedup" || (name === "ideal_speedup" && !has(row, "speedup")))
    if (row.printed.speedup) html("small", td, ` · printed ${short(row.printed.speedup)}`);
}

function drawTable() {
  const table = document.getElementById("table"), head = table.tHead, body = table.tBodies[0];
  head.replaceChildren(); body.replaceChildren();
  const line = html("tr", head);
  for (const name of ["name", ...shown]) {
    const th = html("th", line, name === "name" ? "row" : choices.titles[name].replace(/ \(.*/, ""));
    th.addEventListener("click", () => { sorted = { name, down: sorted.name === name && !sorted.down }; drawTable(); });
  }
  const order = [...rows];
  if (sorted.name) order.sort((a, b) => {
    const [u, v] = [a[sorted.name], b[sorted.name]];
    if (u === null || v === null) return (u === null) - (v === null);
    return (u < v ? -1 : u > v ? 1 : 0) * (sorted.down ? -1 : 1);
  });
  for (const row of order) {
    const tr = html("tr", body);
    tr.dataset.key = row.key;
    tr.addEventListener("click", () => choose(row.key));
    const first = html("td", tr, row.name);
    hover(first, `${row.method} on ${row.model}, ${row.num_inference_steps} steps, ${row.scheduler}, ${row.mode}`
      + (row.peer ? `\n${row.peer}` : "") + `\n${JSON.stringify(row.parameters)}`);
    if (row.error) { const td = html("td", tr, row.error, "error"); td.colSpan = shown.length; continue; }
    for (const name of shown) cell(row, name, tr);
  }
}

// --- steps --------------------------------------------------------------------------------------------------------------
function drawStrips() {
  const place = document.getElementById("strips"), stepped = rows.filter((row) => row.step_s.length);
  if (!stepped.length) { document.getElementById("strips-section").remove(); return; }
  for (const row of stepped) {
    const name = html("div", place, row.name, "name");
    name.dataset.key = row.key;
    const n = row.step_s.length;
    const picture = svg("svg", { viewBox: `0 0 ${n * 10} 46`, preserveAspectRatio: "none", class: "steps", "data-key": row.key }, place);
    const top = Math.max(...row.baseline_step_s, ...row.step_s), most = Math.max(...row.baseline_step_macs, 1);
    row.step_s.forEach((seconds, step) => {
      const share = (row.step_macs[step] ?? 0) / most, height = Math.max(1, 44 * seconds / top);
      const bar = svg("rect", { x: step * 10 + 0.5, width: 9, y: 46 - height, height, fill: ACCENT,
        "fill-opacity": 0.18 + 0.82 * Math.min(1, share), "data-seconds": seconds }, picture);
      hover(bar, `${row.name}, step ${step}\n${short(seconds * 1000)} ms`
        + (row.baseline_step_s[step] !== undefined ? `, baseline ${short(row.baseline_step_s[step] * 1000)} ms` : "")
        + `\n${(100 * share).toFixed(1)} % of a full step's MACs`);
    });
  }
}

// --- growth -------------------------------------------------------------------------------------------------------------
const median = (values) => { const s = [...values].sort((a, b) => a - b); return s.length ? s[Math.floor(s.length / 2)] : null; };

function drawGrowth() {
  const place = document.getElementById("growth");
  const grown = rows.filter((row) => row.axis && row.step_s.length);
  if (!grown.length) { document.getElementById("growth-section").remove(); return; }
  for (const axis of new Set(grown.map((row) => row.axis))) {
    const own = grown.filter((row) => row.axis === axis).sort((a, b) => a.value - b.value);
    const curve = own.map((row) => {
      const full = Math.max(...row.step_macs);
      const of = (test) => median(row.step_s.filter((_, step) => test(row.step_macs[step])));
      return { row, x: row.value, computed: of((m) => m === full), skipped: of((m) => m < full), bytes: row.cache_bytes_peak };
    });
    const picture = svg("svg", { viewBox: "0 0 300 220", role: "img", class: "curve", "data-axis": axis }, place);
    const box = { left: 48, right: 250, top: 24, bottom: 180 };
    const times = curve.flatMap((p) => [p.computed, p.skipped]).filter((v) => v !== null);
    const linear = (values, from, to) => { const s = scale([0, ...values], from, to); return s; };
    const x = linear(curve.map((p) => p.x), box.left, box.right), y = linear(times, box.bottom, box.top);
    const bytes = linear(curve.map((p) => p.bytes ?? 0), box.bottom, box.top);
    axes(picture, x, y, box, { x: axis, y: "seconds per step" });
    for (const value of bytes.ticks)
      svg("text", { x: box.right + 4, y: bytes.place(value) + 4, class: "tick" }, picture, short(value));
    for (const [name, paint, scaleOf] of [["computed", ACCENT, y], ["skipped", WARM, y], ["bytes", GREY, bytes]]) {
      const line = curve.filter((p) => p[name] !== null);
      svg("polyline", { fill: "none", stroke: paint, "stroke-width": 1.6,
        points: line.map((p) => `${x.place(p.x)},${scaleOf.place(p[name])}`).join(" ") }, picture);
      for (const p of line) hover(svg("circle", { cx: x.place(p.x), cy: scaleOf.place(p[name]), r: 3.5, fill: paint,
        "data-key": p.row.key }, picture), `${p.row.name}\n${name}: ${short(p[name])}`);
    }
  }
}

select.model.addEventListener("change", () => { offerAxes(); drawPareto(); });
select.x.addEventListener("change", drawPareto);
select.y.addEventListener("change", drawPareto);
if (select.model.options.length) { offerAxes(); drawPareto(); } else document.getElementById("pareto-section").remove();
drawTable();
drawStrips();
drawGrowth();
