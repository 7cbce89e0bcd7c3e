"use strict";
// Read-out under the pointer: the nearest logged step of each line.
for (const plot of document.querySelectorAll("[data-hover]")) {
  const data = JSON.parse(plot.dataset.hover);
  const cursor = plot.querySelector(".cursor");
  const tip = plot.querySelector(".tip");
  const [first, last] = data.x;
  const hide = () => { cursor.style.display = tip.style.display = "none"; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const step = first + share * (last - first);
    const near = data.series.map((one) => ({
      name: one.name,
      point: one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)),
    }));
    const at = near.reduce((a, b) => (Math.abs(b.point[0] - step) < Math.abs(a.point[0] - step) ? b : a)).point[0];
    const spacing = (last - first) / 40;
    const lines = near.filter((one) => Math.abs(one.point[0] - at) <= spacing);
    tip.replaceChildren(...["step " + Math.round(at), ...lines.map((one) => one.name + "  " + one.point[1])].map((text) => {
      const row = document.createElement("div");
      row.textContent = text;
      return row;
    }));
    cursor.style.display = tip.style.display = "block";
    cursor.style.left = 100 * (at - first) / (last - first) + "%";
    const right = share > 0.5;
    tip.style.left = right ? "auto" : 100 * share + 3 + "%";
    tip.style.right = right ? 100 * (1 - share) + 3 + "%" : "auto";
  });
}
// Sort a table by a column; a second click turns the order round, and cells without a number go last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
    const value = (row) => (row.cells[column].dataset.value === "" ? null : Number(row.cells[column].dataset.value));
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x - y);
    };
    body.replaceChildren(...[...body.rows].sort(compare));
  });
}
// A point of the scatter leads to a latent that may lie inside a closed list.
const open = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  for (let box = target && target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", open);
open();
