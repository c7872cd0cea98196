document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  table.querySelectorAll("thead th button").forEach(function (button) {
    button.addEventListener("click", function () {
      var head = button.parentElement, column = head.cellIndex;
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      Array.from(body.rows).map(function (row) {
        var key = row.cells[column].dataset.key;
        var value = parseFloat(key);
        return { row: row, key: key, value: value, number: key !== "" && String(value) !== "NaN" && !isNaN(key) };
      }).sort(function (a, b) {
        if ((a.key === "") !== (b.key === "")) { return a.key === "" ? 1 : -1; }
        var order = a.number && b.number ? a.value - b.value : a.key.localeCompare(b.key);
        return up ? order : -order;
      }).forEach(function (item) { body.appendChild(item.row); });
    });
  });
});
