// Replaces the value in the line `name: type = value  # comment` of a code cell of this notebook.
function write(notebook, name, value) {
  for (const content of notebook.querySelectorAll(".cm-content")) {
    const view = (content.cmView ?? content.cmTile)?.view;
    for (let i = 1; view && i <= view.state.doc.lines; i++) {
      const line = view.state.doc.line(i);
      const match = line.text.match(/^(\w+)(: [^=#]+)? = (.+?)(  # .*)?$/);
      if (match && match[1] === name && match[2]) {
        const from = line.from + line.text.indexOf(" = ") + 3;
        view.dispatch({ changes: { from, to: from + match[3].length, insert: value } });
        return true;
      }
    }
  }
  return false;
}

export default {
  render({ model, el }) {
    el.innerHTML = `<button class="jupyter-button widget-button">Apply</button> <span role="status"></span><pre></pre>`;
    const [button, status, lines] = el.children;
    button.addEventListener("click", async () => {
      const values = Object.entries(model.get("values")), notebook = el.closest(".jp-Notebook");
      const left = values.filter(([name, value]) => !(notebook && write(notebook, name, value)));
      lines.textContent = left.map(([name, value]) => `${name} = ${value}`).join("\n");
      status.textContent = "Written into the parameters cell. Run all cells to use it.";
      if (left.length) {
        const copied = await navigator.clipboard?.writeText(lines.textContent).then(() => "Copied. ", () => "");
        status.textContent = `${copied ?? ""}Put these lines into the parameters cell:`;
      }
    });
  },
};
