// Light or dark: the system's choice, or the reader's own, kept from page to page where the browser lets us keep it.
"use strict";

const theme = {
  choices: ["auto", "light", "dark"],
  kept() {
    try { return localStorage.getItem("fastft-theme") || "auto"; } catch { return "auto"; }
  },
  set(choice) {
    document.documentElement.dataset.theme = choice;
    try { localStorage.setItem("fastft-theme", choice); } catch { /* it holds for this page only */ }
  },
  label(button) {
    button.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[document.documentElement.dataset.theme];
  },
};

document.documentElement.dataset.theme = theme.kept();
addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  theme.label(button);
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = theme.choices.indexOf(document.documentElement.dataset.theme);
    theme.set(theme.choices[(now + 1) % theme.choices.length]);
    theme.label(button);
  });
});
