// Draws rates over time as lines in an SVG, with a cursor that tells the values.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 44;
const BOTTOM = 22;
const TOP = 8;
const COLOURS = 6;
const SHORTEST_MS = 30 * 60_000;
const MOST = 75;

const element = (name, attributes = {}, text = "") => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};

export const nameOf = ({ run, split }) => `${run} ${split}`;
export const classOf = (number) => `series-${number % COLOURS}`;

const shown = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const clock = (at) => new Date(at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** A round number at or above `value`: 1, 2 or 5 times a power of ten. */
const roundUp = (value) => {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((round) => round >= value);
};

/** Rates per second, from the first minute with a caption on, but for half an hour at least. In a long time, each is
 * the mean of several minutes: a batch is stored at once, so that single minutes tell little. */
const windowOf = (data, values) => {
  const minutes = (data.until - data.from) / data.every;
  const first = Math.min(...data.series.map((one) => one[values].findIndex((n) => n > 0)).filter((at) => at >= 0));
  const seen = minutes - Math.max(0, Math.min(first, minutes - SHORTEST_MS / data.every));
  const width = [1, 2, 5].find((width) => seen / width <= MOST) ?? 5;
  const n = Math.ceil(seen / width);
  const every = width * data.every;
  const from = data.until - n * every;
  const mean = (all, at) => {
    const end = minutes - (n - 1 - at) * width;
    return all.slice(Math.max(0, end - width), end).reduce((sum, one) => sum + one, 0) / (every / 1000);
  };
  const rates = data.series.map((one) => Array.from({ length: n }, (_, at) => mean(one[values], at)));
  return { from, until: data.until, every, rates };
};

const axes = (svg, { from, until }, top, x, y, width) => {
  for (const value of [0, top / 2, top]) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width, y1: y(value), y2: y(value) }));
    svg.append(element("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, value === 0 ? "0" : shown(value)));
  }
  const hour = 3_600_000;
  const steps = [5, 10, 15, 30, 60, 120].map((minutes) => (minutes * hour) / 60);
  const step = steps.find((ms) => (until - from) / ms <= width / 90) ?? 2 * hour;
  for (let at = Math.ceil(from / step) * step; at <= until; at += step) {
    svg.append(element("text", { x: x(at), y: y(0) + 18, "text-anchor": "middle" }, clock(at)));
  }
};

const line = (rates, from, every, x, y) =>
  rates.map((rate, at) => `${at ? "L" : "M"}${x(from + (at + 0.5) * every).toFixed(1)} ${y(rate).toFixed(1)}`).join("");

/** Draws into `box`, an element of a fixed height. */
export const draw = (box, data) => {
  const values = box.dataset.values;
  const title = document.getElementById(box.getAttribute("aria-labelledby"))?.textContent ?? "";
  if (!data.series.length) {
    box.replaceChildren(Object.assign(document.createElement("p"), { className: "none" }));
    box.firstChild.textContent = "Nothing was captioned in the last six hours. A minute appears here once it is over.";
    return;
  }
  const seen = windowOf(data, values);
  const { clientWidth: width, clientHeight: height } = box;
  const top = roundUp(Math.max(...seen.rates.flat(), 0.01));
  const x = (at) => LEFT + ((at - seen.from) / (seen.until - seen.from)) * (width - LEFT);
  const y = (value) => height - BOTTOM - (value / top) * (height - BOTTOM - TOP);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}` });
  axes(svg, seen, top, x, y, width);
  seen.rates.forEach((rates, number) => {
    svg.append(element("path", { class: classOf(number), d: line(rates, seen.from, seen.every, x, y) }));
  });
  const now = data.series.map((one, number) => `${nameOf(one)} ${shown(seen.rates[number].at(-1))}`).join(", ");
  box.setAttribute("aria-label", `${title} since ${clock(seen.from)}. At the end: ${now}.`);
  box.removeAttribute("aria-labelledby");
  box.replaceChildren(svg);
  box.onpointermove = (event) => point(box, svg, data, seen, x, event.offsetX);
  box.onpointerleave = () => box.querySelectorAll(".cursor, .tip").forEach((one) => one.remove());
};

const point = (box, svg, data, seen, x, offset) => {
  const share = (offset - LEFT) / (box.clientWidth - LEFT);
  const at = Math.floor(share * seen.rates[0].length);
  box.onpointerleave();
  if (at < 0 || at >= seen.rates[0].length) return;
  const middle = x(seen.from + (at + 0.5) * seen.every);
  svg.append(element("line", { class: "cursor", x1: middle, x2: middle, y1: TOP, y2: box.clientHeight - BOTTOM }));
  const tip = document.createElement("div");
  tip.className = "tip";
  const lines = [clock(seen.from + at * seen.every), ...data.series.map((one, n) => `${nameOf(one)}: ${shown(seen.rates[n][at])}`)];
  tip.append(...lines.map((text) => Object.assign(document.createElement("p"), { textContent: text })));
  box.append(tip);
  tip.style.left = `${Math.min(middle + 8, box.clientWidth - tip.offsetWidth)}px`;
};

/** The names of the series beside a piece of their line. */
export const legend = (box, data) => {
  box.replaceChildren(
    ...data.series.map((one, number) => {
      const entry = Object.assign(document.createElement("span"), { className: "run" });
      const sample = element("svg", { viewBox: "0 0 30 8", "aria-hidden": "true" });
      sample.append(element("path", { class: classOf(number), d: "M1 4H29", fill: "none" }));
      entry.append(sample, nameOf(one));
      return entry;
    }),
  );
};
