// Sorting and downloads for every table; a filter and a choice of columns for some (.sk-filtered); rows that unfold.
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
    const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows].filter(row => !row.matches(".sk-more"));
    const titles = heads.map((head, i) => head.textContent || (i ? "value" : "name"));
    return {table, heads, rows, titles, caption: table.caption.textContent.trim()};
  };
  const moreOf = row => row.nextElementSibling?.matches(".sk-more") ? row.nextElementSibling : null;
  const unfold = (row, open) => {
    row.cells[0].querySelector("button").setAttribute("aria-expanded", open);
    moreOf(row).hidden = !open;
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
    const more = new Map(one.rows.map(row => [row, moreOf(row)]));
    table.tBodies[0].append(...one.rows.sort(compare).flatMap(row => more.get(row) ? [row, more.get(row)] : [row]));
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
  for (const one of tables) {
    const {table, heads, rows, caption} = one, fold = table.closest(".sk-fold");
    if (rows.length > 1) heads.forEach((head, i) => {
      if (head.textContent) head.replaceChildren(button(head.textContent, () => sort(one, i)));
    });
    for (const row of rows.filter(moreOf)) {
      const name = row.cells[0].firstChild, toggle = button(name.textContent.trim(), () => unfold(row, moreOf(row).hidden), {"aria-expanded": false});
      name.replaceWith(toggle);
    }
    table.setAttribute("aria-label", caption);
    const tools = downloads(caption, () => records(one));
    fold ? fold.querySelector("summary").after(tools) : table.caption.firstElementChild.append(tools);
  }

  for (const group of document.querySelectorAll(".sk-filtered")) {
    const one = tables.find(({table}) => group.contains(table)), facet = one.titles.indexOf(group.dataset.facet);
    const values = [...new Set(one.rows.map(row => keyOf(one, row, facet)))];
    // Warnings lead to the rows that they name; the longest names come first, as others may be parts of them.
    const named = one.rows.map((row, i) => (row.id ||= `row-${i}`, [`${keyOf(one, row, 0)} on ${keyOf(one, row, facet)}`, row.id]));
    for (const text of document.querySelectorAll(".sk-warnings p")) for (const [name, id] of named.toSorted(([a], [b]) => b.length - a.length)) {
      const node = [...text.childNodes].find(each => each.nodeType === Node.TEXT_NODE && each.data.includes(name));
      if (!node) continue;
      const found = node.splitText(node.data.indexOf(name));
      found.splitText(name.length);
      found.replaceWith(element("a", {href: `#${id}`}, name));
    }
    const find = element("input", {type: "search"}), shown = element("output", {"aria-live": "polite"});
    let chosen = "";
    const tabs = ["", ...values].map(value => [value, button(value || "all", () => { chosen = value; apply(); })]);
    const boxes = one.titles.map((title, i) => {
      const box = element("input", {type: "checkbox", checked: ""});
      box.addEventListener("change", apply);
      return [title, box, i];
    });
    function apply() {
      const query = find.value.trim().toLowerCase(), isOff = i => !boxes[i][1].checked;
      for (const row of one.rows) {
        row.hidden = !row.textContent.toLowerCase().includes(query) || (chosen !== "" && keyOf(one, row, facet) !== chosen);
        if (row.hidden && moreOf(row)) unfold(row, false);
        for (const [i, cell] of [...row.cells].entries())
          if (isWide(cell)) cell.colSpan = Math.max(1, boxes.slice(i).filter(([, box]) => box.checked).length);
          else cell.hidden = isOff(i);
      }
      one.heads.forEach((head, i) => { head.hidden = isOff(i); });
      for (const [value, tab] of tabs) tab.setAttribute("aria-pressed", value === chosen);
      shown.textContent = `${one.rows.filter(row => !row.hidden).length} of ${one.rows.length} rows`;
    }
    const menu = element("details", {class: "sk-columns"}, element("summary", {}, "Columns"),
      element("div", {role: "group", "aria-label": "Columns"}, ...boxes.slice(1).map(([title, box]) => element("label", {}, box, " ", title))));
    const label = group.dataset.facet.replace(/^./, first => first.toUpperCase());
    const form = element("form", {class: "sk-filter", role: "search", "aria-label": `Filter ${one.caption}`},
      element("label", {}, "Find ", find), menu, shown,
      ...(values.length > 1 ? [element("div", {class: "sk-tabs", role: "group", "aria-label": label}, ...tabs.map(([, tab]) => tab))] : []));
    form.addEventListener("submit", event => event.preventDefault());
    find.addEventListener("input", apply);
    group.prepend(form);
    apply();
  }
})();
