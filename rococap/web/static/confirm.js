// Buttons that change something ask first; buttons that copy a command copy it.
//
// <button data-post="/path" data-body="{…}" data-title="…" data-text="…" data-yes="…">Do it</button>
// <button data-copy="rococap …">Copy</button>
// Once it is done, the document has the event `changed`. The template macros `ui.act` and `ui.shell` make both.

const dialog = document.getElementById("confirm");
const byId = (id) => document.getElementById(`confirm-${id}`);
const told = document.getElementById("told");
let asking = null;
let timer = 0;

/** Shows a sentence for some seconds. */
export const tell = (message) => {
  told.textContent = message;
  clearTimeout(timer);
  timer = setTimeout(() => (told.textContent = ""), 8000);
};

/** Posts JSON and returns the answer's JSON. Throws an Error whose message is for people, with the `answer`. */
export const post = async (path, body) => {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server cannot be reached. Is rococap serve still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const message = answer.error?.message ?? `The server answered with ${response.status}.`;
    throw Object.assign(new Error(message), { answer });
  }
  return answer;
};

const ask = (button) => {
  const { post: path, body, title, text, yes } = button.dataset;
  asking = { path, body: JSON.parse(body) };
  byId("title").textContent = title;
  byId("text").textContent = text;
  byId("error").textContent = "";
  byId("yes").textContent = yes;
  dialog.showModal();
};

const copy = async (button) => {
  // The clipboard is only there on this machine and over HTTPS: elsewhere the command is selected, for Ctrl-C.
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  } catch {
    getSelection().selectAllChildren(button.previousElementSibling);
  }
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-post], button[data-copy]");
  if (button) (button.dataset.post ? ask : copy)(button);
});

byId("no").addEventListener("click", () => dialog.close());
dialog.addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("yes").disabled = true;
  try {
    const { message } = await post(asking.path, asking.body);
    dialog.close();
    tell(message);
    document.dispatchEvent(new Event("changed"));
  } catch (error) {
    byId("error").textContent = error.message;
  } finally {
    byId("yes").disabled = false;
  }
});
