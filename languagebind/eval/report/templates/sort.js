// A click on a column's header sorts the table: numbers with the best first, text from A to Z. Another click reverses it.
// Empty cells stay last. Without JavaScript, the page shows the same tables unsorted.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.ariaLabel = "sort by this column";
    head.insertBefore(button, head.querySelector(".small"));
    head.addEventListener("click", (event) => {
      if (event.target.closest("a")) return;
      const value = (row) => {
        const cell = row.cells[column];
        return cell.dataset.value ? Number(cell.dataset.value) : cell.textContent.trim();
      };
      const rows = [...body.rows];
      const isNumber = rows.some((row) => typeof value(row) === "number");
      const isEmpty = (row) => isNumber ? typeof value(row) !== "number" : ["", "–"].includes(value(row));
      let order = isNumber && !("ascending" in head.dataset) ? "descending" : "ascending";
      if (head.ariaSort === order) order = order === "ascending" ? "descending" : "ascending";
      const compare = (a, b) => isNumber ? value(a) - value(b) : value(a).localeCompare(value(b), "en", {numeric: true});
      rows.sort((a, b) => isEmpty(a) - isEmpty(b) || (isEmpty(a) ? 0 : compare(a, b) * (order === "ascending" ? 1 : -1)));
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = order;
      body.append(...rows);
    });
  });
}
