// The interactive accuracy-speed chart, from the JSON of the report; verdicts are looked up, not computed.
(() => {
  const block = document.querySelector("script.sk-data");
  if (!block) return;
  const data = JSON.parse(block.textContent), figure = block.closest("figure"), HEIGHT = 420;
  const {better, points, variants, targets} = data, ns = figure.querySelector("svg").namespaceURI;
  const svg = (tag, attributes, ...content) => filled(document.createElementNS(ns, tag), attributes, content);
  const short = value => Number(value.toPrecision(3)).toLocaleString("en", {maximumSignificantDigits: 3});
  const signed = value => `${value > 0 ? "+" : value < 0 ? "−" : ""}${short(Math.abs(value))}`;
  const bytes = value => value >= 1e6 ? `${short(value / 1e6)} MB` : `${short(value / 1e3)} kB`;
  const axes = [
    ["speedup", "speed-up over PyTorch →", value => `${short(value)}×`],
    ["latency", "← latency / batch", value => `${short(value)} ms`],
    ["size", "← file size", bytes],
    ["memory", "← peak memory", bytes],
    ["throughput", "throughput, examples / s →", short],
  ].filter(([key]) => points.some(point => point[key]));
  const STATES = {w: "within budget", c: "inconclusive", o: "over budget"};
  const SHAPES = [
    "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z", "M-5-5h10v10h-10z", "M0-6.5L6 5H-6z", "M0-7L6 0 0 7-6 0z", "M0 6.5L6-5H-6z",
    "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z", "M-6-4l2-2 4 4 4-4 2 2-4 4 4 4-2 2-4-4-4 4-2-2 4-4z",
  ];
  const looks = new Map(variants.map(([name, ...look]) => [name, look]));
  const look = name => looks.get(name) ?? [null, 0];
  const paint = name => look(name)[0] === null ? "var(--sk-quiet)" : `var(--sk-c${look(name)[0]})`;
  const mark = (name, attributes) => svg("path", {
    d: SHAPES[look(name)[1]], stroke: paint(name), fill: paint(name), transform: looks.has(name) ? "" : "scale(.55)", ...attributes,
  });
  const full = point => `${point.name} on ${targets[point.target]}`;

  const pick = (label, options) => {
    const select = element("select", {}, ...options.map((option, i) => element("option", {value: i}, option)));
    select.addEventListener("change", draw);
    return [element("label", {}, `${label} `, select), select];
  };
  const [axisLabel, axisPick] = pick("Horizontal axis", axes.map(([, title]) => title));
  const [targetLabel, targetPick] = pick("Target", ["all", ...targets]);
  const slider = element("input", {type: "range", max: data.drops.length - 1, value: data.start});
  slider.addEventListener("input", draw);
  const budget = element("output"), answer = element("p", {class: "sk-answer", "aria-live": "polite"});
  const plot = element("div", {class: "sk-plot"}), tip = element("div", {class: "sk-tip", role: "tooltip"});
  const legend = element("div", {class: "sk-legend"});
  let lit = "", placed = [];

  const quantile = (values, q) => values.toSorted((a, b) => a - b)[Math.round(q * (values.length - 1))];
  // Far from the median a value is drawn in a band at the edge: extremes, if fewer than half, must not press the others together.
  const scale = (values, extra, spread, reach) => {
    const middle = quantile(values, .5), distance = quantile(values.map(value => Math.abs(value - middle)), .5);
    const far = reach * Math.max(2 * distance, spread), side = value => (value > middle + far) - (value < middle - far);
    const kept = [...values, ...extra].filter(value => !side(value)), [first, last] = [Math.min(...kept), Math.max(...kept)];
    const pad = Math.max((last - first) * .07, (spread - last + first) / 2), start = first - pad, end = last + pad;
    const bands = [-1, 1].map(edge => values.some(value => side(value) === edge) ? 38 : 0);
    return {side, start, end, bands, share: value => Math.min(1, Math.max(0, (value - start) / (end - start)))};
  };
  const grid = (low, high) => {
    const least = (high - low) / 6, power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map(factor => factor * power).find(each => each >= least), first = Math.ceil(low / step);
    return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => (first + i) * step);
  };
  const decades = (low, high, most) => {
    const ticks = factors => Array.from({length: 30}, (_, i) => factors.map(factor => factor * 10 ** (i - 12))).flat()
      .filter(tick => tick >= low && tick <= high);
    return [[1, 2, 5], [1, 3]].map(ticks).find(each => each.length <= most) ?? ticks([1]);
  };

  const table = document.querySelector("[data-facet=target] table");
  const rows = table ? [...table.tBodies[0].rows].filter(row => !row.matches(".sk-more")) : [];
  const column = rows.length ? [...table.tHead.rows[0].cells].findIndex(head => head.textContent.startsWith("Δ ")) : -1;
  const TONES = {w: "sk-good", c: "sk-warning", o: "sk-bad"};
  // The table has the verdicts of the chosen budget too.
  const recolour = (at, best) => {
    for (const row of rows) {
      const [name, where] = [row.cells[0].firstChild.textContent.trim(), row.cells[1].textContent];
      const point = points.find(each => each.name === name && targets[each.target] === where), state = point?.states[at];
      if (!state) continue;
      const cell = row.cells[column], small = cell.querySelector("small"), chosen = point === best, [head] = row.cells;
      cell.classList.remove(...Object.values(TONES));
      cell.classList.add(TONES[state]);
      small.textContent = `${small.textContent.split("\n")[0]}\n${STATES[state]}`;
      head.classList.toggle("sk-good", chosen);
      if (!chosen) head.querySelector("small")?.remove();
      else if (!head.querySelector("small")) head.append(element("small", {}, "best"));
    }
  };

  function draw() {
    const [key, title, format] = axes[axisPick.value], at = Number(slider.value), target = targetPick.value - 1;
    const drop = data.drops[at], text = data.budgets[at], width = Math.max(300, plot.clientWidth);
    const shown = points.filter(point => point[key] && (target < 0 || point.target === target));
    const best = points[data.recommended[target + 1][at]];
    const counts = Object.entries(STATES).map(([state, name]) =>
      `${shown.filter(point => point.states[at] === state).length} ${name}`);
    budget.textContent = `${text}${at === data.start ? " (the study’s)" : ""}`;
    slider.setAttribute("aria-valuetext", budget.textContent);
    answer.replaceChildren(element("strong", {}, best ? full(best) : "No variant"), best
      ? ` is recommended for a drop of at most ${text}: ${best.lines.slice(0, 2).join(", ")}.`
      : ` is better than the original and surely within ${text}.`, ` ${counts.join(", ")}.`);
    recolour(at, points[data.recommended[0][at]]);
    if (!shown.length) return plot.replaceChildren("Not measured.");

    const logs = shown.map(point => Math.log(point[key][0])), ups = shown.map(point => better * point.change[0]);
    const bar = quantile(shown.map(({change}) => (change[2] - change[1]) / 2 || 0), .5);
    const xs = scale(logs, key === "speedup" ? [0] : [], Math.log(5), 1.7), ends = shown.flatMap(({change}) => change.map(end => better * end));
    const ys = scale(ups, [-drop, 0, ...ends], Math.max(drop, data.drops[data.start], bar) || 1, 4);
    const [left, right] = xs.bands.map(size => 1.3 * size), [below, above] = ys.bands;
    const [x2, x3, y2, y3] = [50 + left, width - 12 - right, HEIGHT - 46 - below, 8 + above];
    const fitX = log => x2 + xs.share(log) * (x3 - x2), fitY = up => y2 + ys.share(up) * (y3 - y2);

    const name = `Change of ${data.metric} by ${title}: ${shown.length} points`;
    const root = svg("svg", {width, height: HEIGHT, role: "group", "aria-label": name});
    const line = (to, x1, y1, x2, y2, look) => to.append(svg("line", {x1, y1, x2, y2, ...look}));
    const write = (to, x, y, anchor, words, look) => to.append(svg("text", {x, y, "text-anchor": anchor, ...look}, words));
    const band = (x, y, width, height) => root.append(svg("rect", {x, y, width, height}));
    band(x2 - left, y3, left, y2 - y3);
    band(x3, y3, right, y2 - y3);
    band(x2, y2, x3 - x2, below);
    band(x2, y3 - above, x3 - x2, above);
    for (const tick of decades(Math.exp(xs.start), Math.exp(xs.end), width / 60)) {
      const x = fitX(Math.log(tick));
      line(root, x, y3, x, y2, {class: key === "speedup" && tick === 1 ? "sk-zero" : ""});
      write(root, x, HEIGHT - 30, "middle", format(tick));
    }
    for (const tick of grid(ys.start, ys.end)) {
      line(root, x2, fitY(tick), x3, fitY(tick), {class: tick ? "" : "sk-zero"});
      write(root, 44, fitY(tick) + 4, "end", signed(better * tick));
    }
    write(root, (x2 + x3) / 2, HEIGHT - 8, "middle", title);
    write(root, 0, 0, "middle", `Δ ${data.metric}${data.unit}`, {transform: `translate(11 ${(y2 + y3) / 2}) rotate(-90)`});
    line(root, x2, fitY(-drop), x3, fitY(-drop), {class: "sk-limit"});

    const rank = point => (point === best) + looks.has(point.name), written = [];
    placed = shown.toSorted((a, b) => rank(a) - rank(b)).map(point => {
      const value = point[key][0], log = Math.log(value), up = better * point.change[0], state = point.states[at];
      const sideX = xs.side(log), sideY = ys.side(up);
      const x = fitX(log) + 25 * sideX, y = fitY(up) + [0, -24, 12].at(sideY);
      const group = svg("g", {
        class: `sk-point sk-${state}`, role: "img", tabindex: -1, opacity: lit && lit !== point.name ? .12 : point.pale ? .4 : 1,
        "aria-label": [full(point), ...point.lines, STATES[state]].filter(Boolean).join(", "),
      });
      const [, lowX, highX] = point[key], [, lowY, highY] = point.change;
      if (lowX && !sideX) line(group, fitX(Math.log(lowX)), y, fitX(Math.log(highX)), y, {style: `stroke: ${paint(point.name)}`});
      if (lowY != null && !sideY) line(group, x, fitY(better * lowY), x, fitY(better * highY), {class: "sk-bar"});
      const hollow = state === "c" || state === "o" ? {fill: "var(--sk-paper)"} : {};
      const body = svg("g", {transform: `translate(${x} ${y})`}, mark(point.name, hollow));
      if (point === best) body.prepend(svg("circle", {r: 12, class: "sk-halo"}));
      group.append(body);
      if ((sideX || sideY) && written.every(([a, b]) => Math.abs(a - x) > 44 || Math.abs(b - y) > 24)) {
        const words = (sideX ? `${"◂ ▸"[sideX + 1]}${format(value)} ` : "") + (sideY ? `${"▾ ▴"[sideY + 1]}${signed(point.change[0])}` : "");
        const corner = sideX && sideY ? shown.filter(({[key]: [at], change}) => xs.side(Math.log(at)) === sideX && ys.side(better * change[0]) === sideY) : [];
        write(group, x, y + 20, "middle", corner.length > 1 ? `${corner.length} marks` : words, {class: "sk-beyond"});
        written.push([x, y]);
      }
      if (point === best) {
        const most = Math.min(24, Math.floor((x > width / 2 ? x - x2 : width - x) / 8));
        const name = point.name.length > most ? `${point.name.slice(0, most - 1)}…` : point.name;
        write(group, x, y - 18, x > width / 2 ? "end" : "start", name, {class: "sk-name"});
      }
      group.addEventListener("focus", () => explain({point, x, y}));
      group.addEventListener("blur", hide);
      root.append(group);
      return {point, group, x, y};
    });
    write(root, x3 - 4, fitY(-drop) - 5, "end", "budget", {class: "sk-budget"});
    placed.sort((a, b) => a.x - b.x || a.y - b.y);
    (placed.find(({point}) => point === best) ?? placed[0]).group.setAttribute("tabindex", 0);
    root.addEventListener("keydown", event => {
      const now = placed.findIndex(({group}) => group === document.activeElement);
      const next = placed[{ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: placed.length - 1}[event.key]];
      if (event.key === "Escape") hide();
      if (!next) return;
      event.preventDefault();
      placed[now].group.setAttribute("tabindex", -1);
      next.group.setAttribute("tabindex", 0);
      next.group.focus();
    });
    const seek = event => {
      const box = root.getBoundingClientRect(), far = ({x, y}) => Math.hypot(x + box.left - event.clientX, y + box.top - event.clientY);
      const nearest = placed.reduce((a, b) => far(b) <= far(a) ? b : a);
      far(nearest) < 24 ? explain(nearest) : hide();
    };
    for (const kind of ["pointermove", "pointerdown"]) root.addEventListener(kind, seek);
    root.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
    plot.replaceChildren(root, tip);
    hide();
  }

  function hide() { tip.hidden = true; }
  function explain({point, x, y}) {
    const verdict = STATES[point.states[slider.value]];
    const near = placed.filter(one => one.point !== point && Math.hypot(one.x - x, one.y - y) < 8);
    const also = near.slice(0, 4).map(one => `also here: ${full(one.point)}`);
    const lines = [...point.lines, verdict, ...also].filter(Boolean).map(words => element("div", {}, words));
    tip.replaceChildren(element("strong", {}, full(point)), ...lines);
    tip.hidden = false;
    const {offsetWidth: w, offsetHeight: h} = tip;
    tip.style.left = `${Math.max(0, Math.min(x - w / 2, plot.clientWidth - w))}px`;
    tip.style.top = `${y + 16 + h > HEIGHT && y > h ? y - h - 16 : y + 16}px`;
  }

  for (const [name] of variants) {
    const icon = svg("svg", {viewBox: "-8 -8 16 16", width: 14, height: 14}, mark(name));
    const item = element("button", {type: "button", "aria-pressed": "false"}, icon, name);
    item.addEventListener("click", () => {
      lit = lit === name ? "" : name;
      for (const each of legend.children) each.setAttribute("aria-pressed", String(each.textContent === lit));
      draw();
    });
    legend.append(item);
  }
  figure.before(element("div", {class: "sk-chart"},
    element("div", {class: "sk-filter"}, axisLabel, ...(targets.length > 1 ? [targetLabel] : []),
      element("span", {}, element("label", {}, "Budget ", slider), " ", budget)),
    answer, plot, legend, element("p", {class: "sk-note"}, data.note)));
  figure.classList.add("sk-static");
  draw();
  new ResizeObserver(() => { if (plot.firstChild.clientWidth !== plot.clientWidth) draw(); }).observe(plot);
})();
