// Definitions of the glossary on hover and focus: at column titles, and at the first use of a term in each section.
(() => {
  const rows = [...document.querySelectorAll("#terms tbody tr")];
  if (!rows.length) return;
  const terms = new Map(rows.map((row, i) => {
    row.cells[0].id = `term-${i}`;
    row.cells[1].id = `definition-${i}`;
    return [row.cells[0].textContent.toLowerCase(), i];
  }));
  const escaped = [...terms.keys()].sort((a, b) => b.length - a.length).map(term => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`(?<![\\w-])(?:${escaped.join("|")})(?![\\w-])`, "i");
  const tip = element("div", {class: "sk-tip sk-definition", role: "tooltip"});
  tip.hidden = true;
  document.body.append(tip);
  const hide = () => { tip.hidden = true; };
  const define = (node, i) => {
    node.classList.add("sk-term");
    node.setAttribute("aria-describedby", `definition-${i}`);
    const show = () => {
      tip.textContent = rows[i].cells[1].textContent;
      tip.hidden = false;
      const box = node.getBoundingClientRect(), below = box.bottom + tip.offsetHeight + 8 < innerHeight;
      tip.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${below ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
    };
    for (const kind of ["pointerenter", "focus"]) node.addEventListener(kind, show);
    for (const kind of ["pointerleave", "blur"]) node.addEventListener(kind, hide);
  };
  addEventListener("scroll", hide, {passive: true, capture: true});
  addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  for (const button of document.querySelectorAll("thead th button")) {
    const i = terms.get(button.textContent.toLowerCase());
    if (i !== undefined) define(button, i);
  }
  const skipped = "a, button, h1, h2, h3, svg, script, style, code, pre, summary, form, thead, th, .sk-more, .sk-chart, #terms";
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, node =>
    node.nodeName === "H2" ? NodeFilter.FILTER_ACCEPT
    : node.nodeType === 1 ? (node.matches(skipped) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_SKIP)
    : node.data.trim() ? NodeFilter.FILTER_ACCEPT : NodeFilter.FILTER_SKIP);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let used = new Set();
  for (let node of nodes) {
    if (node.nodeType === 1) used = new Set();
    else if (node.parentNode.nodeName !== "H2") for (let match; (match = pattern.exec(node.data)); ) {
      const term = node.splitText(match.index), i = terms.get(match[0].toLowerCase());
      node = term.splitText(match[0].length);
      if (used.has(i)) continue;
      used.add(i);
      const link = element("a", {href: `#term-${i}`}, match[0]);
      term.replaceWith(link);
      define(link, i);
    }
  }
})();
