// The gallery: keys, short addresses, and when the search index is ready.
import { keys } from "./keys.js";
import "./pictures.js";

const cards = [...document.querySelectorAll(".card h2 a")];
const search = document.getElementById("search");

const move = (step) => {
  const at = cards.indexOf(document.activeElement?.closest(".card")?.querySelector("h2 a"));
  const next = cards[at < 0 ? 0 : Math.min(Math.max(at + step, 0), cards.length - 1)];
  next?.focus();
  next?.closest(".card").scrollIntoView({ block: "nearest" });
};
/** Arrows move between cards only from a card, so that they scroll the page elsewhere. */
const within = (step) => (document.activeElement?.closest(".card") ? move(step) : false);
const press = (rel) => document.querySelector(`a[rel=${rel}]`)?.click();

keys({
  j: () => move(1),
  k: () => move(-1),
  ArrowDown: () => within(1),
  ArrowUp: () => within(-1),
  n: () => press("next"),
  p: () => press("prev"),
  "/": () => {
    document.getElementById("q").focus();
    document.getElementById("q").select();
  },
});

// Fields that ask for nothing stay out of the address, which people share.
search?.addEventListener("formdata", (event) => {
  const usual = new Map(Object.entries(JSON.parse(search.dataset.usual)));
  for (const [name, value] of [...event.formData]) {
    if (value === "" || usual.get(name) === value) event.formData.delete(name);
  }
});

const filling = document.getElementById("filling");
const watch = async () => {
  const response = await fetch("/pictures/index").catch(() => null);
  const status = response?.ok ? await response.json() : null;
  if (status?.state === "ready") {
    filling.querySelector("p").hidden = true;
    filling.querySelector("#filled").hidden = false;
    return;
  }
  if (status?.total) filling.querySelector("progress").value = status.done / status.total;
  setTimeout(watch, 1000);
};
if (filling) watch();
