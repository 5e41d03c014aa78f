// The theme switch, and which section of the contents is in view. Nodes are made from text only, never from markup.
const filled = (node, attributes, content) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content);
  return node;
};
const element = (tag, attributes = {}, ...content) => filled(document.createElement(tag), attributes, content);
(() => {
  const themes = ["auto", "light", "dark"].map(theme => element("option", {}, theme));
  const select = element("select", {}, ...themes), {dataset} = document.documentElement;
  select.value = dataset.theme ?? "auto";
  select.addEventListener("change", () => {
    dataset.theme = select.value;
    // Storage is refused where cookies are.
    try { localStorage.setItem("shrinkkit-theme", select.value); } catch { }
  });
  document.querySelector(".sk-header").append(element("label", {class: "sk-theme"}, "Theme ", select));
  const links = new Map([...document.querySelectorAll(".sk-nav a")].map(link => [link.hash.slice(1), link]));
  const mark = () => {
    const above = [...document.querySelectorAll("h2[id]")].filter(head => head.getBoundingClientRect().top < 160);
    for (const [id, link] of links)
      id === above.at(-1)?.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  };
  addEventListener("scroll", mark, {passive: true});
  mark();
})();
