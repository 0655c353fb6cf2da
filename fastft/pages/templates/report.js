// Tables that tell that they scroll, long ones that are short at first, the contents that follow; all open on paper.
"use strict";

const MOST_ROWS = 12;

/** Puts a table into a box that scrolls, and that says so where it does. */
function scrolling(table) {
  const box = document.createElement("div");
  box.className = "wide";
  box.append(table);
  tell(box);
  return box;
}

function tell(box) {
  const look = () => {
    const more = box.scrollWidth - box.clientWidth;
    box.classList.toggle("scrolls", more > 1);
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", box.scrollLeft < more - 1);
    if (more > 1) {  // the keyboard scrolls it too
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `${box.querySelector("caption, th")?.textContent ?? "Table"}: scrolls sideways`);
    } else {
      box.removeAttribute("tabindex");
      box.removeAttribute("role");
      box.removeAttribute("aria-label");
    }
  };
  box.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(box);
}

document.querySelectorAll(".wide").forEach(tell);

for (const table of document.querySelectorAll("table.plain:not(.whole)")) {
  const rest = [...table.tBodies[0].rows].slice(MOST_ROWS);
  if (rest.length < 4) continue;
  const button = document.createElement("button");
  const reveal = () => { rest.forEach((row) => { row.hidden = false; }); button.remove(); };
  rest.forEach((row) => { row.hidden = true; });
  button.type = "button";
  button.className = "more";
  button.textContent = `Show all ${MOST_ROWS + rest.length} rows`;
  button.addEventListener("click", reveal);
  addEventListener("beforeprint", reveal);
  (table.closest(".wide") || table).after(button);
}

// The section that is being read is marked in the contents.
const links = new Map([...document.querySelectorAll("nav.contents a")].map((link) => [link.hash.slice(1), link]));
const sections = [...document.querySelectorAll("main > section")];
const follow = () => {
  const top = innerHeight * 0.3;
  const read = sections.filter((section) => section.getBoundingClientRect().top <= top).at(-1) ?? sections[0];
  for (const [id, link] of links) {
    const isRead = id === read.id;
    if (isRead === link.hasAttribute("aria-current")) continue;
    if (!isRead) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    const bar = link.closest("nav");
    if (bar.scrollWidth > bar.clientWidth) bar.scrollLeft = link.offsetLeft - bar.clientWidth / 2 + link.offsetWidth / 2;
  }
};
let frame = 0;
addEventListener("scroll", () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(follow); }, { passive: true });
follow();

addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
