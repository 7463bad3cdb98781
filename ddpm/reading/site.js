"use strict";
// Search, what a letter means, which lines compute an equation, and keys. Every page is whole without them.

const box = document.getElementById("the-query");
const list = document.getElementById("the-results");
let chosen = -1;

function whenIndexed(then) {
  if (window.ENTRIES) return then();
  const script = document.createElement("script"); // only now: most pages are read without a search
  script.src = "search.js";
  script.onload = then;
  document.head.append(script);
}

function plain(text) {
  const signs = text.toLowerCase().normalize("NFD").replace(/\u0304/g, "¯").replace(/\u0303/g, "~").replace(/ε/g, "ϵ");
  return signs.replace(/[\s_().,\-]+/g, " ").trim();
}

// 0 is an exact match; a number alone, as in "eq 12", is that of each paper, in the order of papers
function rankOf(title, whole, words) {
  if (title === whole) return 0;
  if (/^\d+$/.test(whole) && title.endsWith(` ${whole}`)) return 1;
  if (title.startsWith(whole)) return 2;
  if (title.includes(whole)) return 3;
  return words.every((word) => title.includes(word)) ? 4 : 5;
}

function found(asked) {
  const others = asked.filter((word) => !/^(eqs?|eqns?|equations?|formula)$/.test(word));
  const words = others.length ? others : asked;
  const whole = words.join(" ");
  const ranked = [];
  window.ENTRIES.forEach((entry, i) => {
    const title = plain(entry[0]);
    const all = `${title} ${plain(entry[2])}`;
    if (!words.every((word) => all.includes(word))) return;
    const rank = rankOf(title, whole, words);
    ranked.push([rank, rank === 1 ? i : title.length, entry]);
  });
  ranked.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  return ranked.slice(0, 30).map(([, , entry]) => entry);
}

function search() {
  const words = plain(box.value).split(" ").filter(Boolean);
  if (!words.length) {
    list.hidden = true;
    return;
  }
  whenIndexed(() => {
    const entries = found(words);
    list.replaceChildren(...entries.map(([title, address, text]) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = address;
      link.textContent = title;
      const more = document.createElement("small");
      more.textContent = text;
      link.append(more);
      item.append(link);
      return item;
    }));
    if (!entries.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.textContent = "Nothing has these words.";
      list.append(none);
    }
    list.hidden = false;
    choose(entries.length ? 0 : -1);
  });
}

function choose(i) {
  const links = [...list.querySelectorAll("a")];
  chosen = links.length ? (i + links.length) % links.length : -1;
  links.forEach((link, j) => link.setAttribute("aria-selected", String(j === chosen)));
  if (chosen >= 0) links[chosen].scrollIntoView({ block: "nearest" });
}

function leave() {
  list.hidden = true;
  box.blur();
}

box.addEventListener("input", search);
box.addEventListener("focus", search);
box.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") choose(chosen + 1);
  else if (event.key === "ArrowUp") choose(chosen - 1);
  else if (event.key === "Escape") leave();
  else return;
  event.preventDefault();
});
document.getElementById("the-search").addEventListener("submit", (event) => {
  event.preventDefault();
  const links = list.querySelectorAll("a");
  if (chosen >= 0 && links[chosen]) {
    location.href = links[chosen].href;
    leave();
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest("#the-search")) list.hidden = true;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, pre")) return;
  if (event.key === "/") {
    event.preventDefault();
    box.focus();
  }
  const turn = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = turn && document.querySelector(`.turn a[rel="${turn}"]`);
  if (link) location.href = link.href;
  if (event.key === "Escape") hide();
});

// letters and shapes ------------------------------------------------------------------------------------------------

const card = document.createElement("div");
card.id = "the-letter";
card.role = "tooltip";
card.hidden = true;
document.body.append(card);

function line(text, kind) {
  const p = document.createElement("p");
  p.textContent = text;
  if (kind) p.className = kind;
  return p;
}

function show(element) {
  const letter = window.LETTERS[element.dataset.l];
  if (element.dataset.s) card.replaceChildren(...element.dataset.s.split("; ").map((text) => line(text)));
  else if (letter) {
    const head = line(letter.meaning);
    const name = document.createElement("b");
    name.textContent = `${element.dataset.l}  `;
    head.prepend(name);
    card.replaceChildren(head, line(letter.shape, "note"), ...letter.elsewhere.map((text) => line(text, "note")));
  } else return;
  card.hidden = false;
  const at = element.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - card.offsetWidth - 12);
  const above = at.bottom + card.offsetHeight + 8 > innerHeight;
  card.style.left = `${Math.max(8, left) + scrollX}px`;
  card.style.top = `${(above ? at.top - card.offsetHeight - 6 : at.bottom + 6) + scrollY}px`;
}

function hide() {
  card.hidden = true;
}

for (const shape of document.querySelectorAll(".shape[title]")) shape.removeAttribute("title");
document.addEventListener("pointerover", (event) => {
  const element = event.target.closest && event.target.closest("[data-l], [data-s]");
  if (element) show(element);
  else hide();
});

// equations and their lines -----------------------------------------------------------------------------------------

function linesOf(equation) {
  const numbers = [];
  for (const run of (equation.dataset.lines || "").split(", ").filter(Boolean)) {
    const [first, last] = run.split("-").map(Number);
    for (let i = first; i <= (last || first); i += 1) numbers.push(i);
  }
  return numbers.map((i) => document.getElementById(`L${i}`)).filter(Boolean);
}

for (const equation of document.querySelectorAll(".eq[data-lines]")) {
  const rows = linesOf(equation);
  const light = (on) => {
    equation.classList.toggle("lit", on);
    rows.forEach((row) => row.classList.toggle("lit", on));
  };
  for (const element of [equation, ...rows]) {
    element.addEventListener("pointerenter", () => light(true));
    element.addEventListener("pointerleave", () => light(false));
  }
  equation.addEventListener("focusin", () => light(true));
  equation.addEventListener("focusout", () => light(false));
}

// an equation that is a little too wide is set smaller; one that is far too wide scrolls ------------------------------

function fit() {
  const rows = [...document.querySelectorAll(".eq > div")];
  for (const row of rows) row.style.fontSize = "";
  const sizes = rows.map((row) => [row.clientWidth, row.scrollWidth]);
  rows.forEach((row, i) => {
    const [room, wide] = sizes[i];
    if (room && wide > room) row.style.fontSize = `${Math.max(62, Math.floor((98 * room) / wide))}%`;
  });
}
addEventListener("resize", fit);
document.querySelectorAll("details").forEach((folded) => folded.addEventListener("toggle", fit));
fit();

// a link to what is folded opens it ---------------------------------------------------------------------------------

function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
}
addEventListener("hashchange", unfold);
unfold();

for (const button of document.querySelectorAll(".run button")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(button.parentElement.querySelector("pre"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    button.textContent = document.execCommand("copy") ? "copied" : "selected"; // works for a file, too
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
