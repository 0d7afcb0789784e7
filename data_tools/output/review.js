"use strict";
const articles = [...document.querySelectorAll("article")];
const judged = () => articles.filter(one => one.querySelector("input:checked"));
const show = () => { document.getElementById("done").textContent = judged().length + " of " + articles.length; };
document.addEventListener("change", show);
document.getElementById("save").addEventListener("click", () => {
  const verdicts = judged().map(one => ({
    key: one.dataset.key,
    verdict: one.querySelector("input:checked").value,
    what: one.querySelector("select").value,
    note: one.querySelector("textarea").value,
  }));
  const reviewer = document.getElementById("reviewer").value;
  const blob = new Blob([JSON.stringify({ reviewer, verdicts }, null, 1)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "verdicts.json";
  link.click();
});
show();
