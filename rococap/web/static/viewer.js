// The large picture: zoom, move, brightness and contrast.

const STEP = 1.25;
const MOST = 16;
const MOVE = 60;
const viewer = document.getElementById("viewer");
const image = document.getElementById("picture");
const sliders = [...document.querySelectorAll(".slider input")];
let zoom = 1;
let x = 0;
let y = 0;

const within = (value, most) => Math.min(most, Math.max(-most, value));

const show = () => {
  x = within(x, (viewer.clientWidth * (zoom - 1)) / 2);
  y = within(y, (viewer.clientHeight * (zoom - 1)) / 2);
  image.style.transform = `translate(${x}px, ${y}px) scale(${zoom})`;
  image.style.filter = sliders.map((slider) => `${slider.id}(${slider.value}%)`).join(" ");
  viewer.classList.toggle("enlarged", zoom > 1);
  document.getElementById("zoom-is").textContent = `${Math.round(100 * zoom)} %`;
};

/** Zooms by a factor, so that the point at this distance from the middle stays where it is. */
const zoomBy = (factor, left = 0, top = 0) => {
  const next = Math.min(MOST, Math.max(1, zoom * factor));
  x = left - ((left - x) * next) / zoom;
  y = top - ((top - y) * next) / zoom;
  zoom = next;
  show();
};

const reset = () => {
  zoom = 1;
  for (const slider of sliders) slider.value = slider.defaultValue;
  show();
};

const fromMiddle = (event) => {
  const box = viewer.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
};

viewer.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    zoomBy(STEP ** (-Math.sign(event.deltaY)), ...fromMiddle(event));
  },
  { passive: false },
);
viewer.addEventListener("dblclick", (event) => (zoom > 1 ? reset() : zoomBy(STEP ** 4, ...fromMiddle(event))));
viewer.addEventListener("pointerdown", (event) => viewer.setPointerCapture(event.pointerId));
viewer.addEventListener("pointermove", (event) => {
  if (!viewer.hasPointerCapture(event.pointerId)) return;
  x += event.movementX;
  y += event.movementY;
  show();
});
const MOVES = { ArrowLeft: [MOVE, 0], ArrowRight: [-MOVE, 0], ArrowUp: [0, MOVE], ArrowDown: [0, -MOVE] };
viewer.addEventListener("keydown", (event) => {
  if (zoom === 1 || !(event.key in MOVES)) return;
  event.preventDefault();
  x += MOVES[event.key][0];
  y += MOVES[event.key][1];
  show();
});

document.getElementById("zoom-in").addEventListener("click", () => zoomBy(STEP));
document.getElementById("zoom-out").addEventListener("click", () => zoomBy(1 / STEP));
document.getElementById("reset").addEventListener("click", reset);
for (const slider of sliders) slider.addEventListener("input", show);
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-less], [data-more]");
  if (!button) return;
  const slider = document.getElementById(button.dataset.less ?? button.dataset.more);
  if (button.dataset.less) slider.stepDown();
  else slider.stepUp();
  show();
});
show();
