"use strict";
// Follows a run: asks for what is new every two seconds and draws it. Texts of a model are never read as HTML.
const PANELS = [
  ["Reward", "number", {reward_mean: "mean reward"}],
  ["Accuracy", "percent", {correct_rate: "training samples", dev_accuracy: "dev, greedy"}],
  ["Coherence", "number", {s_wm: "s_wm", s_end: "s_end", s_path: "s_path", s_cf: "s_cf"}],
  ["KL to the reference, nats a completion", "number", {kl_k1_per_completion: "KL"}],
  ["Entropy, nats a token", "number", {entropy: "entropy"}],
  ["Distinct answers a question", "number", {distinct_answers_mean: "answers"}],
  ["Completion length, tokens", "number", {length_mean: "mean"}],
  ["Shares", "percent", {truncation_rate: "cut off", no_answer_rate: "no answer", clip_fraction: "clipped"}],
  ["Value function", "number", {explained_variance: "explained variance"}],
  ["Loss", "number", {policy_loss: "policy", value_loss: "value", loss: "training", eval_loss: "dev"}],
  ["Token accuracy", "percent", {mean_token_accuracy: "training"}],
];
const FIGURES = [
  ["reward_mean", "reward", "number"], ["correct_rate", "correct", "percent"], ["dev_accuracy", "dev", "percent"],
  ["kl_k1_per_completion", "KL", "number"], ["entropy", "entropy", "number"], ["length_mean", "tokens", "number"],
  ["loss", "loss", "number"],
];
const WIDTH = 360, HEIGHT = 170, LEFT = 44, BOTTOM = 22, TOP = 8, RIGHT = 8;
let rows = [], offset = 0, paused = false, last = null, shownTrajectories = "";
const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const space = ["svg", "path", "line", "text", "circle", "title"].includes(tag);
  const node = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function show(value, kind) {
  if (typeof value !== "number") return "none";
  if (kind === "percent") return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.01 || size === 0 ? value.toFixed(3) : value.toExponential(1);
}
function duration(seconds) {
  if (seconds < 90) return seconds.toFixed(0) + " s";
  return seconds < 5400 ? (seconds / 60).toFixed(0) + " min" : (seconds / 3600).toFixed(1) + " h";
}
function points(key) {
  return rows.filter((row) => typeof row[key] === "number").map((row) => [row.step, row[key]]);
}
function smooth(found, width) {
  if (found.length < 2 * width) return found;
  return found.map(([x], i) => {
    const part = found.slice(Math.max(0, i - width + 1), i + 1);
    return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}
function chart(title, kind, series) {
  const all = series.flatMap((one) => one.points);
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { const room = Math.abs(y0) * 0.1 || 1; y0 -= room; y1 += room; }
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP);
  const words = series.map((one) => `${one.name} ${show(one.points.at(-1)[1], kind)}`).join(", ");
  const svg = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, steps ${x0} to ${x1}. Now: ${words}.`});
  for (const share of [0, 0.5, 1]) {
    const y = y0 + share * (y1 - y0);
    svg.append(make("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y)}));
    svg.append(make("text", {x: LEFT - 4, y: py(y) + 4, "text-anchor": "end"}, show(y, kind)));
  }
  svg.append(make("text", {x: LEFT, y: HEIGHT - 6}, String(x0)));
  svg.append(make("text", {x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end"}, "step " + x1));
  for (const one of series) {
    const path = one.points.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("");
    svg.append(make("path", {class: "line " + one.colour, d: path}));
    if (one.points.length < 30 && 2 * one.points.length < rows.length || one.points.length === 1) {
      for (const p of one.points) svg.append(make("circle", {class: "dot " + one.colour, cx: px(p[0]), cy: py(p[1]), r: 3}));
    }
  }
  return svg;
}
function table(head, lines) {
  const line = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, tag === "th" ? {scope: "col"} : {}, cell)));
  const body = make("table", {}, make("thead", {}, line(head, "th")), make("tbody", {}, ...lines.map((cells) => line(cells, "td"))));
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "table"}, body);
}
function drawPanels() {
  const width = Number($("smooth").value);
  const open = new Set([...document.querySelectorAll("#panels details[open]")].map((one) => one.dataset.panel));
  const focused = document.activeElement && document.activeElement.closest ? document.activeElement.closest("#panels details") : null;
  const kept = focused ? focused.dataset.panel : null;
  const panels = [];
  for (const [title, kind, keys] of PANELS) {
    const series = Object.entries(keys).map(([key, name], i) => ({key, name, colour: "c" + (i + 1), points: points(key)})).filter((one) => one.points.length);
    if (!series.length) continue;
    const legend = make("div", {class: "legend"}, ...series.map((one) => make("span", {}, make("span", {class: "key " + one.colour}), `${one.name} ${show(one.points.at(-1)[1], kind)}`)));
    const drawn = series.map((one) => ({...one, points: smooth(one.points, width)}));
    const details = make("details", {"data-panel": title}, make("summary", {}, "as a table"));
    if (open.has(title)) details.open = true;
    const steps = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].slice(-12).reverse();
    const found = series.map((one) => new Map(one.points));
    const shown = table(["step", ...series.map((one) => one.name)], steps.map((step) => [String(step), ...found.map((one) => show(one.get(step), kind))]));
    shown.setAttribute("aria-label", title + ", last steps");
    details.append(shown);
    panels.push(make("figure", {class: "panel"}, make("h3", {}, title), legend, chart(title, kind, drawn), details));
  }
  $("panels").replaceChildren(...panels);
  if (!panels.length) $("panels").append(make("p", {class: "muted"}, "No step has been logged yet."));
  if (kept) for (const one of document.querySelectorAll("#panels details")) if (one.dataset.panel === kept) one.querySelector("summary").focus({preventScroll: true});
}
function drawHead(data) {
  const row = rows.at(-1), step = row ? row.step : 0;
  document.title = `${step ? "step " + step + " · " : ""}${data.run}`;
  $("title").textContent = data.run;
  const seconds = Object.values(data.seconds).reduce((sum, one) => sum + one, 0);
  const done = data.steps !== null && step >= data.steps;
  const left = data.steps !== null && seconds && !done ? `, about ${duration((data.steps - step) * seconds)} left` : "";
  let state = row ? `Step ${step}${data.steps !== null ? " of " + data.steps : ""}${left}` : "Waiting for the first step";
  if (done) state += ", complete";
  $("state").textContent = state + ".";
  $("bar").hidden = data.steps === null || !data.steps;
  if (data.steps) {
    const share = Math.min(100, Math.round(100 * step / data.steps));
    $("bar").setAttribute("aria-valuenow", share);
    $("bar").firstElementChild.style.width = share + "%";
  }
  const figures = FIGURES.map(([key, name, kind]) => [name, points(key).at(-1), kind]).filter((one) => one[1]);
  $("figures").replaceChildren(...figures.map(([name, point, kind]) => make("div", {}, make("dt", {}, name), make("dd", {}, show(point[1], kind)))));
}
function drawAlarms(alarms) {
  const items = alarms.map((one) => make("li", {class: one.level}, make("strong", {}, one.level === "alarm" ? "Alarm." : "Warning."), one.text));
  if (!items.length) items.push(make("li", {class: "fine"}, make("strong", {}, "None."), "Entropy, distinct answers, coherence against correctness, dev accuracy and the service's replies are watched."));
  const list = $("alarms"), before = list.textContent;
  if (before !== items.map((item) => item.textContent).join("")) list.replaceChildren(...items);
}
function drawTimes(seconds) {
  const parts = Object.entries(seconds), total = parts.reduce((sum, [, one]) => sum + one, 0);
  if (!total) return $("times").replaceChildren(make("p", {class: "muted"}, "No times have been logged."));
  const lines = parts.map(([name, one]) => {
    const track = make("span", {class: "track"});
    track.style.width = Math.max(1, 100 * one / total) + "%";
    return [name.replaceAll("_", " "), one.toFixed(2) + " s", Math.round(100 * one / total) + "%", track];
  });
  const shown = table(["part", "mean of 20 steps", "share", "of the step"], lines);
  shown.setAttribute("aria-label", "Seconds by part of a step");
  $("times").replaceChildren(shown);
}
function drawTrajectories({step, questions}) {
  const key = JSON.stringify([step, questions.length]);
  if (key === shownTrajectories) return;
  if ($("questions").contains(document.activeElement) || document.querySelector("#questions details[open]")) return;
  shownTrajectories = key;
  $("latest-note").textContent = step === null ? "None yet." : `Step ${step}: ${questions.length} of its questions, from the lowest mean reward to the highest. They stay while one is open.`;
  $("questions").replaceChildren(...questions.map((one) => {
    const rewards = one.completions.map((c) => c.reward).filter((r) => typeof r === "number");
    const mean = rewards.length ? show(rewards.reduce((a, b) => a + b, 0) / rewards.length, "number") : "no score";
    const details = make("details", {}, make("summary", {}, `${mean} · ${one.question}`));
    const scores = Object.entries(one.scores).map(([name, value]) => `${name} ${show(value, "number")}`).join(" · ");
    details.append(make("p", {}, `gold answer ${one.gold}${scores ? " · " + scores : ""}`));
    for (const c of one.completions) {
      const reward = c.reward === null ? "no score" : "reward " + show(c.reward, "number");
      details.append(make("p", {class: c.reward === null ? "muted" : c.reward > 0 ? "good" : "bad"}, `${reward} · answer ${c.answer === null ? "none" : c.answer}${c.tokens === null ? "" : " · " + c.tokens + " tokens"}`));
      details.append(make("pre", {}, c.output));
    }
    return details;
  }));
}
function draw(data) { drawHead(data); drawAlarms(data.alarms); drawPanels(); drawTimes(data.seconds); drawTrajectories(data.trajectories); }
async function follow() {
  if (!paused) {
    try {
      const reply = await fetch("data.json?offset=" + offset, {cache: "no-store"});
      const data = await reply.json();
      if (data.restarted) rows = [];
      const first = last === null || data.restarted || data.rows.length > 0;
      rows.push(...data.rows);
      offset = data.offset;
      last = data;
      if (first) draw(data); else { drawHead(data); drawAlarms(data.alarms); drawTrajectories(data.trajectories); }
      document.body.dataset.ready = "yes";
    } catch {
      $("state").textContent = "The dashboard does not answer; the page shows what it last knew.";
    }
  }
  setTimeout(follow, 2000);
}
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
});
$("smooth").addEventListener("change", () => { if (last) drawPanels(); });
follow();
