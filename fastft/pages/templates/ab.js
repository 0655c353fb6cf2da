// The rating page: one question at a time, by touch, mouse or keys; each change is kept at once, and can be undone.
// Where only the choice is asked for, it answers the question, and the next one comes.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SIDES = ["a", "b"];
const WORDS = { a: "A is better", b: "B is better", tie: "as good", both_bad: "both bad" };
const onlyChoice = !data.scale && !data.reason;

let rater = "";
let ratings = {};   // item -> { choice, scale_a, scale_b, reason, seconds, time }
let at = 0;         // which of data.items is shown; data.items.length: the end
let marked = "a";   // the answer that the next digit rates
let changes = [];   // for undo: [place, the item's rating before]
let since = null;   // when the clock of the item began, or null while the page is out of sight

// --- What is kept ---

const key = () => `fastft-ab:${data.page}:${rater}`;

function load() {
  try { return JSON.parse(localStorage.getItem(key())) || {}; } catch { return {}; }
}

function save() {
  try {
    localStorage.setItem(key(), JSON.stringify(ratings));
  } catch {
    say("This browser keeps nothing: export your ratings before you close the page.");
  }
}

const item = () => data.items[at];
const blank = () => ({ choice: null, scale_a: null, scale_b: null, reason: "", seconds: 0, time: null });
const rating = (one = item()) => ratings[one.item] || blank();
const asked = [
  ["choice", "which is better"], ...(data.scale ? [["scale_a", "how good A is"], ["scale_b", "how good B is"]] : []),
];
const missing = (r) => asked.filter(([name]) => r[name] === null).map(([, words]) => words);
const isRated = (one) => missing(rating(one)).length === 0;
const nRated = () => data.items.filter(isRated).length;

function change(name, value) {
  changes.push([at, ratings[item().item] || null]);
  ratings[item().item] = { ...rating(), [name]: value, time: new Date().toISOString() };
  stopClock();
  startClock();
  save();
  show();
}

function choose(value) {
  change("choice", value);
  if (!onlyChoice) return askWhy();
  const place = at;
  forward();
  if (at !== place) say(`Question ${place + 1}: ${WORDS[value]}.`);
}

/** The reason has the keys when everything else is said. */
function askWhy() {
  if (data.reason && isRated(item())) byId("reason").focus();
}

function undo() {
  if (!changes.length) return say("There is nothing to undo.");
  const [place, before] = changes.pop();
  const seconds = rating(data.items[place]).seconds;
  if (before) ratings[data.items[place].item] = { ...before, seconds };
  else delete ratings[data.items[place].item];
  save();
  if (place === at) show();
  else go(place);
}

// --- The clock of an item runs while it is in sight ---

function startClock() {
  since = document.hidden || at >= data.items.length ? null : performance.now();
}

function stopClock() {
  const one = item();
  if (since !== null && one && ratings[one.item]) {
    ratings[one.item].seconds += (performance.now() - since) / 1000;
    since = null;
  }
}

// --- What is shown ---

function show() {
  const one = item();
  byId("rate").hidden = !one;
  byId("done").hidden = Boolean(one);
  byId("bar").value = nRated();
  byId("place").textContent = one ? `${at + 1} of ${data.items.length}` : `${nRated()} rated`;
  byId("who").textContent = `${rater} · ${nRated()} rated`;
  byId("undo").disabled = !changes.length;
  if (!one) return;
  const r = rating(one);
  byId("instruction").textContent = one.instruction;
  byId("input").textContent = one.input;
  byId("input").hidden = !one.input;
  byId("reference").hidden = one.reference === null;
  byId("reference-text").textContent = one.reference || "";
  for (const side of SIDES) {
    byId(`text-${side}`).textContent = one[side] || "(no answer)";
    byId(`text-${side}`).classList.toggle("soft", !one[side]);
    byId(`answer-${side}`).classList.toggle("marked", data.scale ? side === marked : side === r.choice);
  }
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.choice === r.choice));
  }
  if (data.reason) byId("reason").value = r.reason || "";
  for (const radio of document.querySelectorAll("#rate input[type=radio]")) {
    radio.checked = r[radio.name] !== null && String(r[radio.name]) === radio.value;
  }
  byId("back").disabled = at === 0;
  byId("next")?.classList.toggle("primary", isRated(one));
  say(contradiction(r));
}

function contradiction(r) {
  if (!data.scale || missing(r).length) return "";
  const better = { a: r.scale_a - r.scale_b, b: r.scale_b - r.scale_a }[r.choice];
  return better < 0 ? `You prefer ${r.choice.toUpperCase()}, and rate it lower: is that meant?` : "";
}

function say(words) {
  byId(byId("rate").hidden ? "saved" : "status").textContent = words;
}

function go(place) {
  stopClock();
  save();
  at = Math.max(0, Math.min(place, data.items.length));
  marked = "a";
  byId("reference").open = false;
  startClock();
  show();
  byId(item() ? "instruction" : "thanks").focus({ preventScroll: true });
  scrollTo(0, 0);
}

// --- What a rater does ---

function firstOpen(from) {
  const order = [...data.items.keys()].map((i) => (from + i) % data.items.length);
  return order.find((i) => !isRated(data.items[i]));
}

function next() {
  const open = missing(rating());
  if (open.length) return say(`Still to say: ${open.join(", ")}. Or skip it.`);
  forward();
}

/** To the question after this one; from the last one to the first that is open, or to the end. */
function forward() {
  if (at + 1 < data.items.length) return go(at + 1);
  const open = firstOpen(0);
  go(open === undefined ? data.items.length : open);
  if (open !== undefined) say("This one was skipped.");
}

function scale(value) {
  const side = marked;
  if (side === "a") marked = "b";
  change(`scale_${side}`, value);
  askWhy();
}

function mark(side) {
  marked = side;
  show();
}

function toggleReference() {
  byId("reference").open = !byId("reference").open;
}

function exportRatings() {
  stopClock();
  startClock();
  const done = data.items.filter(isRated).map((one) => ({
    item: one.item, ...rating(one), seconds: Math.round(rating(one).seconds * 10) / 10,
  }));
  const { items, ...page } = data;
  const file = { ...page, rater, exported: new Date().toISOString(), n_items: items.length, ratings: done };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1) + "\n"], { type: "application/json" }));
  link.download = `ratings-${rater.replace(/[^\p{L}\p{N}]+/gu, "-")}-${data.page.slice(0, 8)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  say(`Exported ${done.length} of ${items.length} ratings as ${link.download}.`);
}

// --- Keys and buttons ---

const KEYS = {
  a: () => choose("a"), b: () => choose("b"), t: () => choose("tie"), x: () => choose("both_bad"),
  ...(data.scale
    ? { 1: () => scale(1), 2: () => scale(2), 3: () => scale(3), 4: () => scale(4), 5: () => scale(5),
        arrowleft: () => mark("a"), arrowright: () => mark("b") }
    : { arrowleft: () => choose("a"), arrowright: () => choose("b") }),
  enter: next, s: forward, backspace: () => go(at - 1), u: undo, r: toggleReference, e: exportRatings,
};
const KEYS_AT_THE_END = { backspace: () => go(at - 1), u: undo, e: exportRatings };

addEventListener("keydown", (event) => {
  // A key that is held down answers one question, not all that come.
  if (!rater || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("textarea")) {
    if (event.key === "Escape") event.target.blur();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); next(); }
    return;
  }
  // What has the focus keeps the keys that it knows itself.
  if (event.key === "Enter" && event.target.matches("button, summary")) return;
  if (event.key.startsWith("Arrow") && event.target.matches("input")) return;
  const action = (item() ? KEYS : KEYS_AT_THE_END)[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", (event) => {
    if (event.detail < 2) choose(button.dataset.choice);  // the second click of two would answer the next question
  });
}
for (const radio of document.querySelectorAll("#rate input[type=radio]")) {
  radio.addEventListener("change", () => {
    if (radio.name === "scale_a") marked = "b";
    change(radio.name, Number(radio.value));
  });
}
if (data.reason) byId("reason").addEventListener("input", () => {  // kept as it is typed; undo is for what was chosen
  ratings[item().item] = { ...rating(), reason: byId("reason").value, time: new Date().toISOString() };
  save();
});
const BUTTONS = {
  back: () => go(at - 1), look: () => go(at - 1), undo, skip: forward, ...(onlyChoice ? {} : { next }), export: exportRatings, "export-all": exportRatings,
};
for (const [id, action] of Object.entries(BUTTONS)) byId(id).addEventListener("click", action);

byId("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("name").value.trim();
  if (!name) return;
  rater = name;
  try { localStorage.setItem("fastft-ab:rater", rater); } catch { /* it is typed again next time */ }
  ratings = load();
  byId("start").hidden = true;
  byId("export").hidden = false;
  const open = firstOpen(0);
  go(open === undefined ? data.items.length : open);
  if (nRated()) say(`Welcome back: ${nRated()} of ${data.items.length} are rated.`);
});

document.addEventListener("visibilitychange", () => {
  if (!rater) return;
  if (document.hidden) { stopClock(); save(); since = null; } else { startClock(); }
});

byId("bar").max = data.items.length;
byId("count").textContent = data.items.length;
byId("start").hidden = false;
try { byId("name").value = localStorage.getItem("fastft-ab:rater") || ""; } catch { /* nothing is kept here */ }
byId("name").select();
byId("name").focus();
