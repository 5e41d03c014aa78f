// Sorting and downloads for every table; a filter and a choice of columns for each group of tables (.sk-filtered).
(() => {
  const SCALES = {k: 1e3, M: 1e6, G: 1e9};
  const button = (text, action, attributes = {}) => {
    const node = element("button", {type: "button", ...attributes}, text);
    node.addEventListener("click", action);
    return node;
  };
  const aside = cell => cell.querySelector("small")?.textContent.replaceAll("\n", "; ") ?? "";
  const text = cell => [...cell.childNodes].filter(n => n.nodeName !== "SMALL").map(n => n.textContent).join("").trim();
  const number = cell => {
    if (cell.dataset.key) return Number(cell.dataset.key);
    const [, digits, scale] = /^([+-]?[\d.,]+(?:e[+-]?\d+)?)(?:\s([kMG])(?=B?$))?/.exec(text(cell).replace("\u2212", "-")) ?? [];
    return digits ? Number(digits.replaceAll(",", "")) * (SCALES[scale] ?? 1) : NaN;
  };
  const isWide = cell => cell.classList.contains("sk-wide");

  const read = table => {
    const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows];
    const caption = table.caption.textContent.trim(), scroll = table.closest(".sk-scroll");
    const titles = heads.map((head, i) => head.textContent || (i ? "value" : "name"));
    const note = scroll.nextElementSibling?.matches(".sk-note") ? [scroll.nextElementSibling] : [];
    return {table, heads, rows, caption, titles, parts: [scroll, ...note]};
  };
  const cellOf = (row, i) => row.cells[i] && !isWide(row.cells[i]) ? row.cells[i] : null;
  const isNumber = (one, i) => one.heads[i].classList.contains("sk-number");
  const keyOf = (one, row, i) => {
    const cell = cellOf(row, i);
    if (!cell) return "";
    if (!isNumber(one, i)) return cell.dataset.key ?? text(cell);
    const value = number(cell);
    return Number.isNaN(value) ? "" : value;
  };

  const sort = (one, i) => {
    const {heads, table} = one, falling = heads[i].ariaSort === "ascending" ? -1 : 1;
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", falling === 1 ? "ascending" : "descending");
    const compare = (a, b) => {
      const [x, y] = [keyOf(one, a, i), keyOf(one, b, i)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return falling * (isNumber(one, i) ? x - y : x.localeCompare(y, "en", {numeric: true}));
    };
    table.tBodies[0].append(...one.rows.sort(compare));
  };

  // What is visible, row by row: texts, and in columns of their own the small print and the exact numbers.
  const records = one => {
    const has = (i, of) => one.rows.some(row => cellOf(row, i) && of(cellOf(row, i)));
    const columns = one.titles.flatMap((title, i) => one.heads[i].hidden ? [] : [
      [title, row => cellOf(row, i) ? text(cellOf(row, i)) : ""],
      ...(has(i, aside) ? [[`${title} (detail)`, row => cellOf(row, i) ? aside(cellOf(row, i)) : ""]] : []),
      ...(isNumber(one, i) && has(i, cell => cell.dataset.key) ? [[`${title} (value)`, row => keyOf(one, row, i)]] : []),
    ]);
    if (one.rows.some(row => isWide(row.cells[row.cells.length - 1])))
      columns.push(["note", row => { const last = row.cells[row.cells.length - 1]; return isWide(last) ? text(last) : ""; }]);
    const visible = one.rows.filter(row => !row.hidden);
    return visible.map(row => Object.fromEntries(columns.map(([title, value]) => [title, value(row)])));
  };
  const FORMS = {
    JSON: rows => JSON.stringify(rows, null, 1),
    CSV: rows => {
      // A spreadsheet would run a text that begins like a formula.
      const safe = value => /^[=@\t\r]|^[+-](?![\d.])/.test(value) ? `'${value}` : String(value);
      const titles = [...new Set(rows.flatMap(row => Object.keys(row)))];
      const lines = [titles, ...rows.map(row => titles.map(title => row[title] ?? ""))];
      return "\ufeff" + lines.map(line => line.map(value => `"${safe(value).replaceAll('"', '""')}"`).join(",")).join("\r\n");
    },
  };
  const downloads = (name, rows) => element("span", {class: "sk-tools"}, ...["CSV", "JSON"].map(form => button(form, () => {
    const blob = new Blob([FORMS[form](rows())], {type: form === "CSV" ? "text/csv" : "application/json"});
    const file = `${document.title} ${name}`.replace(/[^\p{L}\p{N}.]+/gu, "-").slice(0, 120).replace(/-$/, "");
    const link = element("a", {href: URL.createObjectURL(blob), download: `${file}.${form.toLowerCase()}`});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }, {"aria-label": `Download as ${form}: ${name}`})));

  const tables = [...document.querySelectorAll("table.sk-table")].filter(table => table.tHead && table.caption).map(read);
  for (const one of tables.filter(({rows}) => rows.length > 1)) {
    const {table, heads, caption} = one, fold = table.closest(".sk-fold");
    heads.forEach((head, i) => {
      if (head.textContent) head.replaceChildren(button(head.textContent, () => sort(one, i)));
    });
    table.setAttribute("aria-label", caption);
    const tools = downloads(caption, () => records(one));
    fold ? fold.querySelector("summary").after(tools) : table.caption.firstElementChild.append(tools);
  }

  for (const group of document.querySelectorAll(".sk-filtered")) {
    const all = tables.filter(({table}) => group.contains(table));
    const own = all.filter(({titles}) => titles[0] === all[0].titles[0]);
    if (!own.length) continue;
    const {facet, count} = group.dataset, columns = [...new Set(own.flatMap(({titles}) => titles))];
    const label = one => one.caption.split(": ")[0];
    const facetOf = (one, row) => facet ? keyOf(one, row, one.titles.indexOf(facet)) : label(one);
    const values = [...new Set(own.flatMap(one => one.rows.map(row => facetOf(one, row))))];
    const find = element("input", {type: "search"}), shown = element("output", {"aria-live": "polite"});
    const choice = element("select", {}, element("option", {value: ""}, "all"), ...values.map(value => element("option", {}, value)));
    const boxes = columns.slice(1).map(title => {
      const box = element("input", {type: "checkbox", checked: ""});
      box.addEventListener("change", apply);
      return [title, box];
    });
    function apply() {
      const query = find.value.trim().toLowerCase(), off = new Set(boxes.filter(([, box]) => !box.checked).map(([title]) => title));
      for (const one of own) {
        for (const row of one.rows) {
          row.hidden = !row.textContent.toLowerCase().includes(query) || (choice.value !== "" && facetOf(one, row) !== choice.value);
          for (const [i, cell] of [...row.cells].entries())
            if (isWide(cell)) cell.colSpan = Math.max(1, one.titles.slice(i).filter(title => !off.has(title)).length);
            else cell.hidden = off.has(one.titles[i]);
        }
        one.heads.forEach((head, i) => { head.hidden = off.has(one.titles[i]); });
        one.parts.forEach(part => { part.hidden = one.rows.every(row => row.hidden); });
      }
      const rows = own.flatMap(one => one.rows);
      shown.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} ${count} shown`;
    }
    const merged = () => own.flatMap(one => records(one).map(row => facet ? row : {target: label(one), ...row}));
    const menu = element("details", {class: "sk-columns"}, element("summary", {}, "Columns"),
      element("div", {role: "group", "aria-label": "Columns"}, ...boxes.map(([title, box]) => element("label", {}, box, " ", title))));
    const form = element("form", {class: "sk-filter", role: "search", "aria-label": `Filter ${count}`},
      element("label", {}, "Find ", find),
      ...(values.length > 1 ? [element("label", {}, facet ? "Status " : "Target ", choice)] : []),
      menu, downloads(count, merged), shown);
    form.addEventListener("submit", event => event.preventDefault());
    find.addEventListener("input", apply);
    choice.addEventListener("change", apply);
    group.prepend(form);
    apply();
  }
})();
