// Search over the responses; details are open on paper.
"use strict";

const field = document.getElementById("search");

if (field) {
  const rows = [...document.querySelectorAll("#all-responses > tbody > tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      found += !row.hidden;
    });
    document.getElementById("found").textContent = words.length ? `${found} of ${rows.length}` : "";
    document.getElementById("nothing").hidden = found > 0;
  };
  field.form.hidden = false;
  field.form.addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", filter);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { field.value = ""; filter(); field.blur(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === field || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    field.focus();
  });
}

addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
