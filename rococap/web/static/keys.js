// Keys: an element with `aria-keyshortcuts` is clicked, or a field entered, when one of its keys is pressed. Escape leaves
// a field, and Ctrl-Enter sends its form. A checkbox with the id `keys-on` turns single keys off.

const WORDS = { "+": "Plus", " ": "Space" };
const FIELDS = "textarea, select, input:not([type=checkbox], [type=radio], [type=range])";
const KEPT = "rococap-keys";

/** Whether somebody wants no single keys. */
export const off = () => localStorage.getItem(KEPT) === "off";

const nameOf = (event) => {
  const name = WORDS[event.key] ?? (event.key.length === 1 ? event.key.toLowerCase() : event.key);
  return event.shiftKey && name.length > 1 && name !== "Plus" ? `Shift+${name}` : name;
};

/** Whether the element that has the focus needs this key for itself. */
const isNeeded = (target, name) => {
  if (name.endsWith("Enter")) return target.closest("a, button, summary, input, [contenteditable]") !== null;
  if (name.startsWith("Arrow")) return target.closest("input, #viewer.enlarged, .scroll") !== null;
  return false;
};

const inField = (event, field) => {
  if (event.key === "Escape") field.blur();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) field.form?.requestSubmit();
};

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const field = event.target.closest(FIELDS);
  if (field) return inField(event, field);
  if (off() || event.ctrlKey || event.metaKey || event.altKey) return;
  const name = nameOf(event);
  const wanted = document.querySelector(`[aria-keyshortcuts~="${CSS.escape(name)}"]`);
  if (!wanted || isNeeded(event.target, name)) return;
  event.preventDefault();
  if (wanted.matches(FIELDS)) wanted.focus();
  else wanted.click();
});

const box = document.getElementById("keys-on");
if (box) {
  box.checked = !off();
  box.addEventListener("change", () => localStorage.setItem(KEPT, box.checked ? "on" : "off"));
}
