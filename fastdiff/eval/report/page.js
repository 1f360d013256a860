"use strict";
// Sorts a table by the column whose head is pressed, up at first and then down; cells without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const value = (row) => {
        const cell = row.cells[column];
        if (head.dataset.kind === "text") return cell.textContent;
        return "value" in cell.dataset ? Number(cell.dataset.value) : null;
      };
      const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : (a > b) - (a < b));
      const rows = [...body.rows].map((row) => ({ row, value: value(row) }));
      rows.sort((a, b) => (a.value === null) - (b.value === null) || (a.value === null ? 0 : sign * order(a.value, b.value)));
      body.append(...rows.map((entry) => entry.row));
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    });
  });
}
