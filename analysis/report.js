"use strict";
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort.replace("inf", "Infinity"));
      };
      const order = (first, second) => {
        const [left, right] = [key(first), key(second)];
        if (typeof left === "number" && typeof right === "number") return left === right ? 0 : left < right ? -1 : 1;
        return String(left).localeCompare(String(right), "en", { numeric: true });
      };
      const rows = [...body.rows].sort(order);
      if (descending) rows.reverse();
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}
