for (const button of document.querySelectorAll(".sk-copy")) {
  button.hidden = false;
  button.onclick = async () => {
    const code = button.nextElementSibling;
    await navigator.clipboard.writeText(button.dataset.copy ?? code.textContent);
    button.textContent = "Copied";
  };
}
