(() => {
  const table = document.querySelector("#runs table");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = document.getElementById("find"), status = document.getElementById("status");
  const count = document.getElementById("count");
  const key = (row, i) => row.cells[i].dataset.key ?? row.cells[i].textContent.trim();
  const sort = i => {
    const falling = heads[i].getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", falling === 1 ? "ascending" : "descending");
    const number = heads[i].classList.contains("sk-number");
    const compare = (a, b) => {
      const [x, y] = [key(a, i), key(b, i)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return falling * (number ? x - y : x.localeCompare(y, "en", {numeric: true}));
    };
    body.append(...rows.sort(compare));
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(i));
    head.append(button);
  });
  const filter = () => {
    const query = text.value.trim().toLowerCase();
    for (const row of rows)
      row.hidden = !row.textContent.toLowerCase().includes(query) || (status.value && key(row, 1) !== status.value);
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} runs shown`;
  };
  text.addEventListener("input", filter);
  status.addEventListener("change", filter);
  document.getElementById("filter").hidden = false;
  filter();
})();
