// The dashboard: live parts from the server's events, and the charts from its history.
import { draw, legend } from "./chart.js";
import { follow } from "./live.js";

const EVERY_MS = 15_000;
const charts = [...document.querySelectorAll(".chart")];
let data = null;

const redraw = () => {
  if (data === null) return;
  for (const chart of charts) draw(chart, data);
  legend(document.getElementById("throughput-legend"), data);
};

const load = async () => {
  if (document.hidden) return;
  const response = await fetch("/throughput").catch(() => null);
  if (!response?.ok) return; // the stream says what is wrong
  data = await response.json();
  redraw();
};

follow("/live");
load();
setInterval(load, EVERY_MS);
document.addEventListener("visibilitychange", load);
new ResizeObserver(redraw).observe(document.getElementById("throughput"));
