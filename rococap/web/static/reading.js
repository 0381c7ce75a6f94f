// Reading one picture of a study: answers by keyboard or pointer, and how long the reader looked at it. A checkbox turns
// single keys off, for people who speak to their browser, as on other pages.
import { post } from "./confirm.js";

const byId = (id) => document.getElementById(id);
const form = byId("reading");
const picture = byId("picture");
const questions = [...form.querySelectorAll("fieldset")];
const radios = (question) => [...question.querySelectorAll("input")];
const chosen = (question) => radios(question).find((radio) => radio.checked);
const keysOn = byId("keys-on");
const KEPT = "rococap-keys";
let shownAt = Number(form.dataset.shownAt);

// The clock starts when the picture can be seen, not when the server began to answer.
const [loading] = performance.getEntriesByType("navigation");
picture
  .decode()
  .then(() => (shownAt += Math.round(performance.now() - loading.responseStart)))
  .catch(() => (byId("no-picture").textContent = "The picture cannot be shown. Tell whoever runs this study, and read no further."));

const current = () =>
  questions.find((question) => question.contains(document.activeElement)) ??
  questions.find((question) => !chosen(question)) ??
  questions[0];

/** Gives the current question the answer with this key, and moves on to the next question. */
const choose = (key) => {
  const question = current();
  const radio = radios(question).find((radio) => radio.dataset.key === key);
  if (!radio) return;
  radio.checked = true;
  const next = questions[questions.indexOf(question) + 1];
  (next ? (chosen(next) ?? radios(next)[0]) : radio).focus();
};

const answers = () => {
  const ratings = [];
  let preference = null;
  for (const question of questions) {
    const value = Number(chosen(question).value);
    const { text, scale } = question.dataset;
    if (scale) (ratings[text] ??= {})[scale] = value;
    else preference = value;
  }
  return { shown_at: shownAt, preference, ratings };
};

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const open = questions.find((question) => !chosen(question));
  if (open) {
    byId("problem").textContent = `Not answered yet: ${open.querySelector("legend").textContent}`;
    radios(open)[0].focus();
    return;
  }
  const button = form.querySelector("button[type=submit]");
  if (button.disabled) return;
  button.disabled = true;
  try {
    await post(form.dataset.path, answers());
    location.replace(form.dataset.next);
  } catch (error) {
    byId("problem").textContent = error.message;
    button.disabled = false;
  }
});

keysOn.checked = localStorage.getItem(KEPT) !== "off";
keysOn.addEventListener("change", () => localStorage.setItem(KEPT, keysOn.checked ? "on" : "off"));

document.addEventListener("keydown", (event) => {
  if (!keysOn.checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "Enter" && !event.target.closest("a, button")) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Backspace" && byId("back")) {
    location.replace(byId("back").href);
  } else if (/^\d$/.test(event.key)) {
    choose(event.key);
  }
});
