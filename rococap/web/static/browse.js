// The gallery: from picture to picture by keyboard, short addresses, and when the search index is ready.
import "./help.js";
import { off } from "./keys.js";
import "./pictures.js";

const links = [...document.querySelectorAll(".card h2 a")];
const search = document.getElementById("search");
const filling = document.getElementById("filling");

const move = (step) => {
  const at = links.indexOf(document.activeElement?.closest(".card")?.querySelector("h2 a"));
  const link = links[at < 0 ? 0 : Math.min(Math.max(at + step, 0), links.length - 1)];
  link?.focus();
  link?.closest(".card").scrollIntoView({ block: "nearest" });
};

const STEPS = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 };
document.addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  if (!step || off() || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]") || event.target.closest("input, textarea, select")) return;
  // Where no picture has the focus, arrows scroll.
  if (event.key.startsWith("Arrow") && !document.activeElement?.closest(".card")) return;
  event.preventDefault();
  move(step);
});

// Fields that ask for nothing stay out of the address, which people share.
search?.addEventListener("formdata", ({ formData }) => {
  const usual = JSON.parse(search.dataset.usual);
  const entries = [...formData].filter(([name, value]) => value !== "" && usual[name] !== value);
  for (const name of new Set(formData.keys())) formData.delete(name);
  for (const [name, value] of entries) formData.append(name, value);
});

const watch = async () => {
  const response = await fetch("/pictures/index").catch(() => null);
  const status = response?.ok ? await response.json() : null;
  if (status?.state === "ready") {
    filling.querySelector("p").hidden = true;
    filling.querySelector("#filled").hidden = false;
    return;
  }
  const progress = filling.querySelector("progress");
  if (status?.total && progress) progress.value = status.done / status.total;
  setTimeout(watch, 1000);
};
if (filling) watch();
