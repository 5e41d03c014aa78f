export default {
  render({ model, el }) {
    el.innerHTML = model.get("svg");
    el.querySelectorAll('[id*="-point-"]').forEach((point) => {
      const index = Number(point.id.split("-point-")[1]);
      const choose = () => { model.set("chosen", index); model.save_changes(); };
      point.setAttribute("tabindex", "0");
      point.setAttribute("role", "button");
      point.setAttribute("aria-label", model.get("names")[index]);
      point.style.cursor = "pointer";
      point.addEventListener("click", choose);
      point.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
      });
    });
  },
};
