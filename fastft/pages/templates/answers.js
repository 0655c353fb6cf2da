// The answers: drawn from the page's own data, a page of them at a time; sorted, filtered, searched.
"use strict";

const held = document.getElementById("answers");

if (held) {
  const data = JSON.parse(held.textContent);
  const several = data.names.length > 1;
  const narrow = matchMedia("(max-width: 44rem)");
  const [ROW, INSTRUCTION, INPUT, REFERENCE, CATEGORY, ANSWERS] = [0, 1, 2, 3, 4, 5];
  const [RESPONSE, JUDGE, ROUGE, EXACT, PROBLEMS, REASON, REPLY] = [0, 1, 2, 3, 4, 5, 6];
  const MAIN = data.main === "judge" ? JUDGE : ROUGE;

  const NO_SCORE = data.problems.indexOf(data.no_score);

  const byId = (id) => document.getElementById(id);
  const most = () => (narrow.matches ? { characters: 240, lines: 5 } : { characters: 700, lines: 10 });

  // --- One answer. Text goes in as text: nothing of a run becomes markup ---

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  function text(value, className = "") {
    const shown = element("div", `text ${className}`);
    shown.dir = "auto";
    const { characters, lines } = most();
    let end = Math.min(value.length, characters);
    for (let n = 1, line = value.indexOf("\n"); line !== -1 && line < end; n += 1, line = value.indexOf("\n", line + 1)) {
      if (n === lines) end = line;
    }
    if (end >= value.length * 0.9) {
      shown.textContent = value;
      return shown;
    }
    if (/[\ud800-\udbff]/.test(value[end - 1])) end -= 1;  // not between the halves of a character
    shown.textContent = `${value.slice(0, end)}…`;
    const more = element("button", "more", `Show all ${value.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => { shown.textContent = value; more.remove(); });
    return element("div", "", shown, more);
  }

  function named(label, value, className = "") {
    return element("span", className, label, value === undefined ? "" : element("b", "", value));
  }

  function verdict(answer) {
    const line = element("div", "verdict");
    const reason = answer[REASON] === null ? null : data.reasons[answer[REASON]];
    const leftOut = answer[EXACT] === null;
    if (!leftOut) {
      if (answer[JUDGE] !== null) line.append(named("Judge ", String(Math.trunc(answer[JUDGE]))));
      else if (answer[PROBLEMS].includes(NO_SCORE)) line.append(named("no score", undefined, "bad"));
      line.append(named("ROUGE-L ", answer[ROUGE] === null ? "–" : String(Math.round(answer[ROUGE]))));
      if (answer[EXACT]) line.append(named("✓ exact match", undefined, "exact"));
    }
    if (reason !== null) line.append(text(reason));
    if (answer[REPLY] !== null) {
      line.append(element("details", "", element("summary", "", "reply"), text(answer[REPLY])));
    }
    return line;
  }

  const shortened = (name) => (name.length > 60 ? `${name.slice(0, 59)}…` : name);

  const inTheMiddle = (name) => (name.length > 40 ? `${name.slice(0, 16)}…${name.slice(-23)}` : name);

  function cell(label, ...children) {
    const made = element("td", "", ...children);
    made.dataset.label = label;
    return made;
  }

  function responseCell(answer, name) {
    const label = several ? inTheMiddle(name) : "Response";
    if (answer === null) return cell(label, element("span", "soft", "–"));
    const empty = element("div", "bad", answer[EXACT] === null ? "left out" : "empty");
    return cell(label, answer[RESPONSE].trim() ? text(answer[RESPONSE]) : empty, verdict(answer));
  }

  function tableRow(row) {
    const question = cell("Question", text(row[INSTRUCTION]));
    if (row[INPUT]) question.append(text(row[INPUT], "input"));
    if (row[CATEGORY] !== null) question.append(element("div", "verdict", shortened(data.categories[row[CATEGORY]])));
    const answers = row[ANSWERS].map((answer, i) => responseCell(answer, data.names[i]));
    return element("tr", "", element("td", "n soft", String(row[ROW])), question, cell("Reference", text(row[REFERENCE])), ...answers);
  }

  function table(caption, places) {
    const made = element("table", "answers", element("caption", "unseen", caption));
    made.style.setProperty("--columns", data.names.length);
    const head = ["#", "Question", "Reference", ...(several ? data.names : ["Response"])].map((name, i) => {
      const one = element("th", i ? "" : "n", name);
      one.scope = "col";
      return one;
    });
    made.append(element("thead", "", element("tr", "", ...head)));
    made.append(element("tbody", "", ...places.map((place) => tableRow(data.rows[place]))));
    return made;
  }

  // --- Those to look at first ---

  for (const details of document.querySelectorAll("details[data-list]")) {
    const list = data.lists[Number(details.dataset.list)];
    const draw = () => {
      if (details.open && !details.querySelector("table")) details.append(scrolling(table(list.title, list.rows)));
    };
    details.addEventListener("toggle", draw);
    addEventListener("beforeprint", () => { details.open = true; draw(); });
    details.open = !narrow.matches;
    draw();
  }

  // --- All of them: what is shown, and in which order ---

  const search = byId("search");
  const controls = { sort: byId("sort"), wrong: byId("wrong"), category: byId("category"), size: byId("size") };
  const every = data.rows.map((_, place) => place);
  let texts = null;  // made when first searched
  let first = 0;     // of the shown places, the one on top

  const scoreOf = (place) => data.rows[place][ANSWERS][0][MAIN];
  const lengthOf = (place) => data.rows[place][ANSWERS][0][RESPONSE].length;
  const categoryOf = (place) => {
    const category = data.rows[place][CATEGORY];
    return category === null ? "\uffff" : data.categories[category];
  };
  const apart = (place) => {
    const scores = data.rows[place][ANSWERS].map((one) => one && one[MAIN]).filter((score) => score !== null);
    return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : -1;
  };
  // Without a score last, whichever way: there is nothing to order them by.
  const byScore = (sign) => (a, b) => {
    const [x, y] = [scoreOf(a), scoreOf(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  };
  const ORDERS = {
    file: () => 0, worst: byScore(1), best: byScore(-1), apart: (a, b) => apart(b) - apart(a),
    category: (a, b) => categoryOf(a).localeCompare(categoryOf(b)),
    shortest: (a, b) => lengthOf(a) - lengthOf(b), longest: (a, b) => lengthOf(b) - lengthOf(a),
  };

  function textOf(row) {
    const said = row[ANSWERS].flatMap((one) => (one === null ? [] : [
      one[RESPONSE], one[REPLY] || "", one[REASON] === null ? "" : data.reasons[one[REASON]],
    ]));
    const category = row[CATEGORY] === null ? "" : data.categories[row[CATEGORY]];
    return [row[INSTRUCTION], row[INPUT], row[REFERENCE], category, ...said].join("\n").toLowerCase();
  }

  function isWrong(row, which) {
    if (which === "") return true;
    if (which === "exact") return row[ANSWERS].some((one) => one !== null && one[EXACT] === 1);
    return row[ANSWERS].some((one) => one !== null && one[PROBLEMS].includes(Number(which)));
  }

  function places() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && texts === null) texts = data.rows.map(textOf);
    const category = controls.category.value;
    const found = every.filter((place) => {
      const row = data.rows[place];
      return (category === "" || row[CATEGORY] === Number(category)) && isWrong(row, controls.wrong.value)
        && words.every((word) => texts[place].includes(word));
    });
    return controls.sort.value === "file" ? found : found.sort(ORDERS[controls.sort.value]);  // a stable sort
  }

  function show() {
    const found = places();
    const size = Number(controls.size.value);
    if (first >= found.length) first = 0;
    const last = Math.min(first + size, found.length);
    const all = every.length.toLocaleString("en");
    byId("found").textContent = found.length === every.length ? `${all} responses` : `${found.length.toLocaleString("en")} of ${all}`;
    byId("nothing").hidden = found.length > 0;
    const drawn = table("All responses", found.slice(first, last));
    drawn.id = "all-responses";
    byId("all").replaceChildren(scrolling(drawn));
    for (const pager of document.querySelectorAll(".pager")) {
      pager.hidden = found.length <= size;
      pager.querySelector(".place").textContent = `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${found.length.toLocaleString("en")}`;
      for (const button of pager.querySelectorAll("button")) {
        const to = { first: 0, back: first - size, next: first + size, last: Math.floor((found.length - 1) / size) * size }[button.dataset.to];
        button.disabled = to < 0 || to >= found.length || to === first;
        button.onclick = () => {
          first = Math.max(0, to);
          show();
          byId("responses").scrollIntoView();
        };
      }
    }
  }

  const again = () => { first = 0; show(); };

  function fill(select, options) {
    for (const [value, label] of options) {
      const option = element("option", "", label);
      option.value = value;
      select.append(option);
    }
  }

  const count = (test) => data.rows.filter(test).length;
  fill(controls.wrong, [["", "Everything"], ["exact", `exact match (${count((row) => isWrong(row, "exact"))})`],
    ...data.problems.map((label, i) => [String(i), label, count((row) => isWrong(row, String(i)))])
      .filter(([, , n]) => n > 0).map(([value, label, n]) => [value, `${label} (${n})`])]);
  fill(controls.category, [["", "All categories"], ...data.categories.map((name, i) => [String(i), shortened(name)])
    .sort((a, b) => a[1].localeCompare(b[1]))]);
  controls.category.closest("label").hidden = data.categories.length < 2;
  fill(controls.sort, [["file", "as in the file"], ["worst", "worst first"], ["best", "best first"],
    ...(several ? [["apart", "runs farthest apart"]] : []), ...(data.categories.length > 1 ? [["category", "by category"]] : []),
    ["shortest", "shortest first"], ["longest", "longest first"]]);
  controls.size.value = narrow.matches ? (data.names.length > 2 ? "2" : "5") : "20";

  for (const control of Object.values(controls)) control.addEventListener("change", again);
  let waiting = null;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(again, every.length > 2000 ? 120 : 0); });
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; again(); search.blur(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    search.focus();
  });
  search.form.hidden = false;
  show();
}
