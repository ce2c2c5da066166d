// The name of its column for each cell: coopos.css shows it where the screen is too narrow for columns.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    if (!names.length) continue;
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, number) => (cell.dataset.label = names[number] || ""));
    }
    table.classList.add("labelled");
  }
});
