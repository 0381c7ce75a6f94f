"use strict";
// Filters and sorts the cards. If scripts are disabled, the page shows all cards in data set order.
(() => {
  const filters = document.getElementById("filters");
  const list = document.getElementById("cards");
  const count = document.getElementById("count");
  const cards = [...list.children];

  const isWanted = (card, section, modality) =>
    (section === "all" || card.dataset.tags.split(" ").includes(section)) &&
    (modality === "all" || card.dataset.modality === modality);

  const orders = {
    dataset: (one, other) => one.dataset.number - other.dataset.number,
    best: (one, other) => other.dataset.mean - one.dataset.mean || orders.dataset(one, other),
    worst: (one, other) => one.dataset.mean - other.dataset.mean || orders.dataset(one, other),
    facts: (one, other) => other.dataset.facts - one.dataset.facts || orders.dataset(one, other),
  };
  const sortedBy = { dataset: "number", best: "mean", worst: "mean", facts: "facts" };

  const sort = () => {
    const order = filters.elements.order.value;
    const isKnown = (card) => card.dataset[sortedBy[order]] !== "";
    const others = cards.filter((card) => !isKnown(card));
    list.append(...cards.filter(isKnown).sort(orders[order]), ...others);
  };

  const show = () => {
    const { section, modality } = filters.elements;
    for (const card of cards) card.hidden = !isWanted(card, section.value, modality.value);
    const n = cards.filter((card) => !card.hidden).length;
    count.textContent = `${n} of ${cards.length} pictures`;
  };

  filters.hidden = false;
  filters.addEventListener("change", () => {
    sort();
    show();
  });
  filters.addEventListener("reset", () => setTimeout(() => {
    sort();
    show();
  }));
  sort();
  show();
})();
