"use strict";
const items = [...document.querySelectorAll("article")];
const search = document.getElementById("search");
const menus = [...document.querySelectorAll("select[data-key]")];
const verdicts = [...document.querySelectorAll("input[data-verdict]")];
const countShown = document.getElementById("count");
for (const item of items) item.haystack = item.textContent.toLowerCase();
function choose() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = new Set(verdicts.filter(box => box.checked).map(box => box.dataset.verdict));
  let count = 0;
  for (const item of items) {
    const groups = JSON.parse(item.dataset.groups);
    const seen = wanted.has(item.dataset.verdict) &&
      menus.every(menu => !menu.value || groups[menu.dataset.key] === menu.value) &&
      words.every(word => item.haystack.includes(word));
    item.hidden = !seen;
    count += seen;
  }
  countShown.textContent = `${count} of ${items.length} shown`;
}
for (const control of [search, ...menus, ...verdicts]) control.addEventListener("input", choose);
choose();
