// What several pages do with pictures: the reason in place of one that cannot be shown.

const explain = async (img) => {
  const reason = document.createElement("span");
  reason.className = "gone";
  reason.textContent = "This picture cannot be shown.";
  img.replaceWith(reason);
  const response = await fetch(img.src, { headers: { Accept: "application/json" } }).catch(() => null);
  const answer = await response?.json().catch(() => ({}));
  if (answer?.error) reason.textContent = answer.error.message;
};

document.addEventListener(
  "error",
  (event) => {
    if (event.target.matches?.("img[data-picture]")) explain(event.target);
  },
  true,
);
for (const img of document.querySelectorAll("img[data-picture]")) {
  if (img.complete && img.naturalWidth === 0) explain(img); // it failed before this script was there
}
