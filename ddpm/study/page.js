"use strict";
// Tables that sort by any column, a filter of arms, and buttons that copy. The page is whole without them.

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function key(row, column) {
  const cell = row.cells[column];
  if (!("value" in cell.dataset)) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
  const missing = rows.filter(([value]) => value === null); // last, whichever way
  const there = rows.filter(([value]) => value !== null);
  there.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...there.concat(missing).map(([, row]) => row));
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, column));
  });
}

for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const count = document.getElementById(`${input.dataset.filters}-count`);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  input.addEventListener("input", () => {
    const asked = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !asked.every((word) => texts.get(row).includes(word));
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} arms`;
  });
}

for (const button of document.querySelectorAll(".copyable button")) {
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
