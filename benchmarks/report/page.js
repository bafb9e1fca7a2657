// A click on a header sorts by that column: numbers by their value, largest first; cells without one go last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement, place = header.cellIndex, body = header.closest("table").tBodies[0];
    const rows = [...body.rows], numeric = rows.some((row) => row.cells[place].dataset.value !== undefined);
    const before = header.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numeric;
    const key = (row) => {
      const cell = row.cells[place];
      return numeric ? Number(cell.dataset.value ?? NaN) : cell.textContent;
    };
    const order = (one, other) => (numeric ? one - other : one.localeCompare(other));
    const empty = (value) => Number.isNaN(value) || value === "";
    rows.map((row) => [key(row), row]).sort(([one], [other]) =>
      empty(one) - empty(other) || (up ? order(one, other) : order(other, one)) || 0,
    ).forEach(([, row]) => body.append(row));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
}
// A search field shows the rows of its table that hold all of its words.
for (const field of document.querySelectorAll("input[type=search]")) {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of field.parentElement.querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
