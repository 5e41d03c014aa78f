// Replaces the value in the line `name: type = value  # comment` of a cell of the notebook; returns whether there is one.
function write(notebook, name, value) {
  for (const content of notebook?.querySelectorAll(".cm-content") ?? []) {
    const view = (content.cmView ?? content.cmTile)?.view, text = view?.state.doc.toString() ?? "";
    const match = text.match(new RegExp(`^(${name}: [^=#\\n]+ = )(.+?)(  # .*)?$`, "m"));
    if (match) {
      const from = match.index + match[1].length;
      view.dispatch({ changes: { from, to: from + match[2].length, insert: value } });
      return true;
    }
  }
  return false;
}

export default {
  render({ model, el }) {
    el.innerHTML = `<button class="jupyter-button widget-button">Apply</button> <span role="status"></span><pre></pre>`;
    const [button, status, lines] = el.children;
    button.addEventListener("click", async () => {
      const notebook = el.closest(".jp-Notebook"), values = Object.entries(model.get("values"));
      const left = values.filter(([name, value]) => !write(notebook, name, value));
      lines.textContent = left.map((pair) => pair.join(" = ")).join("\n");
      const copied = left.length && await navigator.clipboard?.writeText(lines.textContent).then(() => "Copied. ", () => "");
      status.textContent = left.length ? `${copied ?? ""}Put these lines into the parameters cell:`
        : "Written into the parameters cell. Run all cells to use it.";
    });
  },
};
