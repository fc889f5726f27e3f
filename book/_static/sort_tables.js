/* Tables of results are sorted by a click on a column's head: descending first where the column holds numbers. */
(() => {
  const number = cell => {
    const found = cell.textContent.trim().replaceAll(",", "").match(/^-?\d+(\.\d+)?/);
    return found ? Number(found[0]) : NaN;
  };

  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = rows.some(row => !Number.isNaN(number(row.cells[column])));
    const sign = descending ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (!numeric) return sign * x.textContent.trim().localeCompare(y.textContent.trim(), "en");
      const [u, v] = [number(x), number(y)];
      return Number.isNaN(u) - Number.isNaN(v) || sign * (u - v);  // blanks last
    });
    body.append(...rows);
  };

  const prepare = table => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const text = head.textContent.trim() || "method";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      head.replaceChildren(button);
      head.setAttribute("scope", "col");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const numeric = [...table.tBodies[0].rows].some(row => !Number.isNaN(number(row.cells[column])));
        const descending = before ? before === "ascending" : numeric;
        heads.forEach(other => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, descending);
      });
    });
    table.classList.add("sortable");
  };

  const start = () => document.querySelectorAll("section#results table, table.sortable").forEach(table => {
    if (table.tHead && table.tBodies.length) prepare(table);
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
