// Single keys that do something on a page, and the window that lists them: see the template keys.html.

const help = document.getElementById("help");
const on = document.getElementById("help-on");
const KEPT = "rococap-keys";

on.checked = localStorage.getItem(KEPT) !== "off";
on.addEventListener("change", () => localStorage.setItem(KEPT, on.checked ? "on" : "off"));
document.getElementById("help-open").addEventListener("click", () => help.showModal());

/** Calls the function of a key, unless somebody is typing, answering a question, or wants no such keys. */
export const keys = (actions) => {
  const all = { ...actions, "?": () => help.showModal() };
  document.addEventListener("keydown", (event) => {
    if (!on.checked || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]") || event.target.closest("input, textarea, select")) return;
    const action = all[event.key];
    if (action === undefined || action() === false) return;
    event.preventDefault();
  });
};
