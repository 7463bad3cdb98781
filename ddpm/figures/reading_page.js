"use strict";
// One picture at a time. Answers are stored in memory and, where the browser allows it, in its storage.

const { sheet, file, pictures } = JSON.parse(document.getElementById("content").textContent);
const element = (name) => document.getElementById(name);
const [read, none, radios] = [element("read"), element("none"), [...document.querySelectorAll("[name=real]")]];
const PLACE = `reading sheet ${sheet}`;
const keyboard = matchMedia("(pointer: fine)").matches; // else a field that is entered covers the page with keys

let answers = pictures.map(() => ({ read: null, real: null }));
let current = 0;

const isAnswer = (a) => a && (a.read === null || typeof a.read === "string") && [null, true, false].includes(a.real);
const isOpen = (answer) => answer.read === null || answer.real === null;
const asText = () => JSON.stringify({ sheet, answers }, null, 1);

function restore() {
  const kept = JSON.parse(localStorage.getItem(PLACE));
  if (!Array.isArray(kept?.answers) || kept.answers.length !== pictures.length || !kept.answers.every(isAnswer)) return;
  answers = kept.answers.map(({ read, real }) => ({ read, real }));
  if (Number.isInteger(kept.current) && kept.current in pictures) current = kept.current;
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify({ answers, current }));
    return true;
  } catch {
    return false;
  }
}

function show() {
  const answer = answers[current];
  const open = answers.filter(isOpen).length;
  const name = `Picture ${current + 1} of ${pictures.length}`;
  if (element("picture").alt !== name) Object.assign(element("picture"), { src: pictures[current], alt: name });
  if (read.value.trim() !== (answer.read ?? "")) read.value = answer.read ?? "";
  none.setAttribute("aria-pressed", String(answer.read === ""));
  for (const radio of radios) radio.checked = String(answer.real) === radio.value;
  element("place").textContent = name;
  element("count").textContent = `${pictures.length - open} answered`;
  element("progress").value = pictures.length - open;
  element("back").disabled = current === 0;
  element("open").disabled = open === 0;
  const left = open ? `${open} of ${pictures.length} pictures are not answered yet. ` : "Every picture is answered. ";
  element("kept").textContent =
    left + (keep() ? "This browser keeps the answers: a reload loses nothing." : "This browser keeps nothing: save before you leave.");
  element("text").value = asText();
}

function say(change) {
  Object.assign(answers[current], change);
  show();
}

function go(to) {
  current = to;
  read.value = "";
  show();
  if (keyboard) read.focus();
}

function ask() {
  if (keyboard) (radios.find((radio) => radio.checked) ?? radios[0]).focus();
}

function next() {
  if (document.activeElement === read && answers[current].real === null) return ask();
  if (current + 1 < pictures.length) return go(current + 1);
  const open = answers.findIndex(isOpen);
  if (open >= 0) return go(open);
  element("save").focus();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asText()], { type: "application/json" }));
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

try {
  restore();
} catch {
  // storage that is switched off, or holds something else: the sheet begins anew
}
read.addEventListener("input", () => say({ read: read.value.trim() || null }));
none.addEventListener("click", () => {
  say({ read: answers[current].read === "" ? null : "" });
  if (answers[current].read === "") ask();
});
for (const button of document.querySelectorAll("[data-text]")) {
  button.addEventListener("click", () => {
    say({ read: button.dataset.text });
    ask();
  });
}
for (const radio of radios) radio.addEventListener("change", () => say({ real: radio.value === "true" }));
element("item").addEventListener("submit", (event) => {
  event.preventDefault();
  next();
});
document.addEventListener("keydown", (event) => {
  const choice = { r: radios[0], d: radios[1] }[event.key.toLowerCase()];
  const typing = event.target === read || event.target === element("text");
  if (!choice || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  choice.focus();
  say({ real: choice.value === "true" });
});
element("back").addEventListener("click", () => go(current - 1));
element("open").addEventListener("click", () => go(answers.findIndex(isOpen)));
element("save").addEventListener("click", save);
element("anew").addEventListener("click", () => {
  if (!confirm("Forget all answers of this sheet?")) return;
  answers = pictures.map(() => ({ read: null, real: null }));
  go(0);
});
document.querySelector("main").hidden = false;
show();
if (keyboard) read.focus();
