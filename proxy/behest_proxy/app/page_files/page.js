// The built-in page. Everything that it is told is data: it becomes text nodes and numbers, never markup.
"use strict";

const EVERY_MS = 2000;
const SEARCH_EVERY_MS = 10000;
const REST_FACTOR = 20; // the ledger rests for so many times as long as a search took
const TIMEOUT_MS = 15000;
const SVG = "http://www.w3.org/2000/svg";
const PLOT = { width: 1160, height: 220, left: 64, right: 6, top: 8, bottom: 24 };
const GOOD = new Set(["completed"]);
const PLAIN = new Set(["client_cancelled", "draining"]);

const byId = (id) => document.getElementById(id);
let range = "1h";
let search = "";
let asked = 0; // answers to older questions are dropped
let searchDueAt = 0;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Money comes as a decimal string with every digit. It is cut for the eye, never summed up.
function usd(text) {
  const negative = text.startsWith("-");
  const [whole, fraction = ""] = text.replace("-", "").split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  const leading = whole === "0" ? fraction.match(/^0*/)[0].length : 0;
  const digits = whole === "0" ? Math.min(fraction.length, Math.max(2, leading + 3)) : 2;
  const shown = fraction.slice(0, digits).padEnd(2, "0");
  return (negative ? "-" : "") + grouped + "." + shown;
}

const count = (value) => Number(value).toLocaleString("en-US");
const short = (value) => Number(value).toLocaleString("en-US", { notation: "compact", maximumFractionDigits: 1 });
const amount = (text, unit) => (unit === "usd" ? "$" + usd(text) : short(text));
const clock = (text) => new Date(text).toLocaleTimeString(undefined, { hour12: false });
const moment = (text) => new Date(text).toLocaleString(undefined, { hour12: false });

function cell(text, className, title) {
  const made = element("td", className, text);
  made.title = title === undefined ? String(text) : title;
  return made;
}

function fill(id, rows) {
  byId(id).tBodies[0].replaceChildren(...rows);
}

function empty(id, text) {
  byId(id).hidden = !text;
  byId(id).textContent = text || "";
}

function showTiles(now) {
  const begin = new Date(now.since);
  const today = begin.toDateString() === new Date(now.at).toDateString();
  const time = begin.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", hour12: false });
  const day = begin.toLocaleDateString(undefined, { weekday: "short", day: "numeric", month: "short" });
  const since = "since " + (today ? time : `${day}, ${time}`);
  byId("spent").textContent = "$" + usd(now.spent_usd);
  byId("spent").title = now.spent_usd + " USD";
  byId("spent-note").textContent = since;
  byId("spent-note").title = moment(now.since);
  byId("live").textContent = count(now.live);
  byId("live-note").textContent = now.live ? "$" + usd(now.live_usd) + " so far" : "nothing runs";
  byId("ended").textContent = count(now.requests_ended);
  byId("ended-note").textContent = "that ended";
  byId("tokens").textContent = short(now.tokens);
  byId("tokens-note").textContent = "in and out";
}

// The next number of the form 1, 2 or 5 times a power of ten.
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.999) * power;
}

function showPlot(now) {
  const models = now.models.map((one) => one.others + one.model);
  const since = Date.parse(now.since);
  const pieces = Math.max(1, Math.ceil((Date.parse(now.at) - since) / 1000 / now.piece_s));
  const stacks = Array.from({ length: pieces }, () => new Map());
  for (const bin of now.bins) {
    const place = Math.round((Date.parse(bin.begins_at) - since) / 1000 / now.piece_s);
    if (place >= 0 && place < pieces) stacks[place].set(bin.others + bin.model, Math.max(0, Number(bin.usd)));
  }
  const most = Math.max(0, ...stacks.map((stack) => [...stack.values()].reduce((sum, value) => sum + value, 0)));
  const step = most ? round(most / 4) : 1;
  const top = most ? Math.ceil(most / step) * step : 1;
  const width = PLOT.width - PLOT.left - PLOT.right;
  const height = PLOT.height - PLOT.top - PLOT.bottom;
  const y = (value) => PLOT.top + height - (value / top) * height;
  const length = { 3600: "last hour", 86400: "last 24 hours" }[pieces * now.piece_s] || "time that is shown";
  const root = svg("svg", {
    viewBox: `0 0 ${PLOT.width} ${PLOT.height}`,
    role: "img",
    "aria-label": `Cost per model over the ${length}, $${usd(now.spent_usd)} in all; the table below has the figures`,
  });
  for (let value = 0; value <= top + step / 2; value += step) {
    root.append(svg("line", { class: "grid", x1: PLOT.left, x2: PLOT.left + width, y1: y(value), y2: y(value) }));
    const label = value ? "$" + usd(value.toFixed(12)).replace(/(\.\d\d)0+$/, "$1") : "0";
    root.append(svg("text", { x: PLOT.left - 8, y: y(value) + 4, "text-anchor": "end" }, most || !value ? label : ""));
  }
  const slot = width / pieces;
  stacks.forEach((stack, place) => {
    let below = 0;
    models.forEach((model, number) => {
      const value = stack.get(model);
      if (!value) return;
      const bar = svg("rect", {
        class: `s${number}`,
        x: PLOT.left + place * slot + slot * 0.1,
        width: slot * 0.8,
        y: y(below + value),
        height: Math.max(0.6, (value / top) * height),
      });
      const when = new Date(since + place * now.piece_s * 1000).toISOString();
      bar.append(svg("title", {}, `${now.models[number].model}: $${usd(value.toFixed(12))}, ${moment(when)}`));
      root.append(bar);
      below += value;
    });
  });
  const marks = 6;
  for (let mark = 0; mark <= marks; mark += 1) {
    const at = new Date(since + (mark / marks) * pieces * now.piece_s * 1000);
    const days = pieces * now.piece_s > 2 * 86400;
    const text = days
      ? at.toLocaleDateString(undefined, { weekday: "short", day: "numeric" })
      : at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", hour12: false });
    const anchor = mark === 0 ? "start" : mark === marks ? "end" : "middle";
    root.append(svg("text", { x: PLOT.left + (mark / marks) * width, y: PLOT.height - 6, "text-anchor": anchor }, text));
  }
  byId("plot").replaceChildren(root);
  byId("legend").replaceChildren(
    ...now.models.map((one, number) => {
      const item = element("li");
      item.append(element("span", `swatch s${number}`), element("span", "", one.model), element("span", "sub", "\u00a0 $" + usd(one.usd)));
      return item;
    }),
  );
  const total = Number(now.spent_usd);
  fill(
    "models",
    now.models.map((one) => {
      const row = element("tr");
      const share = total ? `${((Number(one.usd) / total) * 100).toFixed(1)} %` : "–";
      row.append(cell(one.model), cell(usd(one.usd), "number", one.usd), cell(share, "number"));
      return row;
    }),
  );
}

function showBudgets(now) {
  const items = now.budgets.map((one) => {
    const item = element("li");
    const row = element("div", "row");
    const name = element("span", "name", one.budget);
    name.title = `${one.tenant}: ${one.budget}`;
    const sums = element("span", "sums", `${amount(one.spent, one.unit)} of ${amount(one.limit, one.unit)}`);
    sums.append(element("span", "share", `${(one.spent_share * 100).toFixed(0)} %`));
    row.append(name, sums);
    const bar = svg("svg", {
      class: one.spent_share + one.held_share >= 0.999 ? "bar full" : "bar",
      viewBox: "0 0 1000 10",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `${one.budget}: ${(one.spent_share * 100).toFixed(0)} % spent, ${(one.held_share * 100).toFixed(0)} % held`,
    });
    const spent = Math.min(1, one.spent_share) * 1000;
    const held = Math.min(1000 - spent, one.held_share * 1000);
    bar.append(
      svg("rect", { class: "track", width: 1000, height: 10 }),
      svg("rect", { class: "spent", width: spent, height: 10 }),
      svg("rect", { class: "held", x: spent, width: held, height: 10 }),
    );
    const parts = [];
    if (one.subject.length) parts.push("fullest: " + one.subject.join(", "));
    if (one.subjects > 1) parts.push(`of ${count(one.subjects)}` + (one.exhausted ? `, ${count(one.exhausted)} exhausted` : ""));
    if (Number(one.held)) parts.push(`${amount(one.held, one.unit)} held`);
    parts.push({ usd: "USD", tokens: "tokens", requests: "requests" }[one.unit] || one.unit);
    parts.push(one.period === "lifetime" ? "for ever" : "per " + one.period);
    const what = element("div", "row");
    const text = element("span", "what", parts.join(" · "));
    text.title = parts.join(" · ");
    const kind = { Active: "good", Warning: "warn", Exhausted: "bad", Suspended: "bad" }[one.phase] || "plain";
    what.append(text, element("span", "badge " + kind, one.phase));
    item.append(row, bar, what);
    return item;
  });
  if (!items.length) items.push(element("li", "empty", "There are no budgets."));
  if (now.budgets_left_out) items.push(element("li", "empty", `and ${count(now.budgets_left_out)} that are less full`));
  byId("budgets").replaceChildren(...items);
}

function showSessions(sessions, found) {
  fill(
    "sessions",
    sessions.map((one) => {
      const row = element("tr");
      const session = cell(one.session, "", `${one.session}\n${one.project} of ${one.tenant}\nlast ${moment(one.last_at)}`);
      const requests = cell(one.live ? `${count(one.requests)} + ${one.live}` : count(one.requests), "number", "ended + running");
      row.append(session, cell(one.user), requests, cell(short(one.tokens), "number", one.tokens), cell(usd(one.usd), "number", one.usd));
      return row;
    }),
  );
  empty("sessions-empty", sessions.length ? "" : found ? "No session of this time begins so." : "Nothing was spent in this time.");
}

function showRequests(now) {
  fill(
    "requests",
    now.requests.map((one) => {
      const row = element("tr");
      const kind = GOOD.has(one.outcome) ? "good" : PLAIN.has(one.outcome) ? "plain" : one.outcome === "quota_exceeded" ? "warn" : "bad";
      const outcome = element("td");
      outcome.append(element("span", "badge " + kind, one.outcome.replaceAll("_", " ")));
      row.append(
        cell(clock(one.ended_at), "", `${moment(one.ended_at)}\n${one.id}`), outcome, cell(one.model), cell(one.session), cell(one.user),
        cell(count(one.input), "number"), cell(count(one.output), "number"), cell(one.seconds.toFixed(1), "number"), cell(usd(one.usd), "number", one.usd),
      );
      return row;
    }),
  );
  empty("requests-empty", now.requests.length ? "" : "No request has ended yet.");
}

function state(kind, text) {
  byId("state").className = kind;
  if (byId("state-text").textContent !== text) byId("state-text").textContent = text;
}

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), headers: { accept: "application/json" } });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.problem || `status ${answer.status}`);
  return content;
}

async function refresh() {
  const mine = ++asked;
  try {
    const now = await ask("page/now.json?range=" + range);
    if (mine !== asked) return;
    showTiles(now);
    showPlot(now);
    showBudgets(now);
    showRequests(now);
    if (!search) showSessions(now.sessions, false);
    state("well", "Live");
  } catch (error) {
    if (mine !== asked) return;
    state("away", error instanceof TypeError ? "The sidecar does not answer" : error.message);
  }
}

// By itself it is asked again now and then: what cannot be had then leaves what is shown.
async function find(again = false) {
  if (!search) return refresh();
  const wanted = search;
  const began = Date.now();
  try {
    const found = await ask(`page/sessions.json?range=${range}&q=${encodeURIComponent(wanted)}`);
    if (wanted === search) showSessions(found.sessions, true);
  } catch (error) {
    if (wanted === search && !again) {
      fill("sessions", []);
      empty("sessions-empty", error.message);
    }
  }
  searchDueAt = Date.now() + Math.max(SEARCH_EVERY_MS, REST_FACTOR * (Date.now() - began));
}

async function forever() {
  for (;;) {
    if (!document.hidden) await refresh();
    if (!document.hidden && search && Date.now() >= searchDueAt) await find(true);
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

let waiting = 0;
byId("q").addEventListener("input", (event) => {
  search = event.target.value.trim();
  clearTimeout(waiting);
  waiting = setTimeout(() => find(), 300);
});
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  find();
});
byId("ranges").addEventListener("change", (event) => {
  range = event.target.value;
  refresh().then(() => search && find());
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
forever();
