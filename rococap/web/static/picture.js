// The page of one picture: verdicts and edits are saved without leaving it, unless one goes on to the next.
import { post, tell } from "./confirm.js";
import "./help.js";
import "./viewer.js"; // before what takes a picture that cannot be shown out of the page
import "./pictures.js";

const SAVED = "rococap-saved";
const PARTS = ["texts", "reviews", "history"];
const byId = (id) => document.getElementById(id);
const review = byId("review");
const edit = byId("edit");
const next = byId("next");

let looks = 0;

/** Puts what the server now says into the page, around the forms that people are filling in. */
const refresh = async () => {
  const look = ++looks;
  const response = await fetch(location.href).catch(() => null);
  if (!response?.ok) throw new Error("It is saved, but the page cannot be brought up to date: load it again.");
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  if (look < looks) return fresh; // what was asked for later may have come before
  for (const id of PARTS) byId(id)?.replaceChildren(...fresh.getElementById(id).childNodes);
  return fresh;
};

/** Runs what a form does, with its buttons off, and shows what goes wrong in it. */
const trying = async (form, action) => {
  const error = form.querySelector(".error");
  const buttons = form.querySelectorAll("button");
  error.textContent = "";
  for (const button of buttons) button.disabled = true;
  try {
    await action();
  } catch (problem) {
    if (problem.answer?.theirs) showConflict(problem.answer);
    else error.textContent = problem.message;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
};

// --- Verdicts ---

const given = () => {
  const data = new FormData(review);
  return { verdict: data.get("verdict"), errors: data.getAll("errors"), note: data.get("note") };
};

const goOn = (message) => {
  if (!next) return tell(`${message} This is the last picture of the list.`);
  sessionStorage.setItem(SAVED, message);
  location.assign(next.href);
};

const saveReview = (stay) =>
  trying(review, async () => {
    const now = given();
    if (now.verdict === null) throw new Error("Choose a verdict first: 1, 2, 3 or 4.");
    if (!stay && isEdited()) throw new Error("The caption was changed, but not saved: save it or start again first.");
    // What was judged before and is left as it was needs no second row.
    if (JSON.stringify(now) === judged) return stay ? tell("Already saved.") : goOn("Left as it was.");
    const { message } = await post(review.dataset.path, { run: review.dataset.run, ...now });
    judged = JSON.stringify(now);
    if (stay || !next) await refresh();
    if (stay) tell(message);
    else goOn(message);
  });

let judged = null;
if (review) {
  judged = JSON.stringify(given());
  review.addEventListener("submit", (event) => {
    event.preventDefault();
    saveReview(false);
  });
  byId("save")?.addEventListener("click", () => saveReview(true));
  // A correct caption has no errors, so that one of the two goes when the other is chosen.
  review.addEventListener("change", ({ target }) => {
    const correct = review.querySelector("[value=correct]");
    if (target === correct) for (const box of review.querySelectorAll("[name=errors]")) box.checked = false;
    if (target.name === "errors" && target.checked) correct.checked = false;
  });
}

// --- Edits ---

const text = byId("text");
const isEdited = () => text !== null && text.value !== text.defaultValue;

const begin = (fresh) => {
  const field = fresh.getElementById("text");
  text.defaultValue = text.value = field.defaultValue;
  text.dataset.seen = field.dataset.seen;
  byId("conflict").replaceChildren();
};

const saveEdit = () =>
  trying(edit, async () => {
    const seen = text.dataset.seen === "" ? null : Number(text.dataset.seen);
    const { message } = await post(edit.dataset.path, { run: edit.dataset.run, text: text.value, seen });
    begin(await refresh());
    tell(message);
  });

const showConflict = ({ theirs, html }) => {
  byId("conflict").innerHTML = html;
  refresh().catch(() => {}); // their text is in the answer already
  byId("mine").addEventListener("click", () => {
    text.dataset.seen = theirs.id;
    saveEdit();
  });
  byId("theirs").addEventListener("click", () => trying(edit, async () => begin(await refresh())));
  byId("conflict").firstElementChild.focus();
};

if (edit) {
  edit.addEventListener("reset", () => byId("conflict").replaceChildren());
  edit.addEventListener("submit", (event) => {
    event.preventDefault();
    saveEdit();
  });
  byId("history").addEventListener("click", ({ target }) => {
    const button = target.closest("[data-undo]");
    if (!button) return;
    trying(edit, async () => {
      if (isEdited()) throw new Error("The caption was changed, but not saved: save it or start again first.");
      const path = edit.dataset.path.replace(/edits$/, "undo");
      const undone = post(path, { run: edit.dataset.run, edit: Number(button.dataset.undo) });
      const { message } = await undone.finally(async () => begin(await refresh()));
      tell(message);
    });
  });
}

// --- The way through the list ---

const saved = sessionStorage.getItem(SAVED);
sessionStorage.removeItem(SAVED);
if (saved) tell(saved);
addEventListener("beforeunload", (event) => {
  const isJudged = review !== null && JSON.stringify(given()) !== judged;
  if (isEdited() || isJudged) event.preventDefault();
});
if (next) new Image().src = next.dataset.image;
