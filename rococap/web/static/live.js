// Keeps the parts of a page up to date: the server renders them, and this puts what has changed into the page.
//
// <div id="workers" data-live>…</div> shows the event `workers` of the stream.

const trouble = document.getElementById("trouble");

const keyOf = (node) => node.dataset?.key;

/** Makes `node` equal to `wanted` by changing only what differs, so that focus, selection and scrolling stay. */
const morph = (node, wanted) => {
  if (node.nodeType !== wanted.nodeType || node.nodeName !== wanted.nodeName || keyOf(node) !== keyOf(wanted)) {
    node.replaceWith(wanted);
    return;
  }
  if (node.nodeType !== Node.ELEMENT_NODE) {
    if (node.nodeValue !== wanted.nodeValue) node.nodeValue = wanted.nodeValue;
    return;
  }
  for (const { name } of [...node.attributes]) if (!wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of wanted.attributes) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  morphChildren(node, wanted);
};

const morphChildren = (node, wanted) => {
  const keyed = new Map([...node.childNodes].filter(keyOf).map((child) => [keyOf(child), child]));
  let at = node.firstChild;
  for (const next of [...wanted.childNodes]) {
    const known = keyed.get(keyOf(next));
    if (known && known !== at) {
      node.insertBefore(known, at);
      at = known;
    } else if (!known && keyOf(at ?? {}) !== undefined && keyOf(next) !== undefined) {
      node.insertBefore(next, at);
      continue;
    }
    if (at === null) {
      node.append(next);
      continue;
    }
    const following = at.nextSibling;
    morph(at, next);
    at = following;
  }
  while (at) {
    const following = at.nextSibling;
    at.remove();
    at = following;
  }
};

const show = (part, html) => {
  const wanted = document.createElement("template");
  wanted.innerHTML = html;
  morphChildren(part, wanted.content);
};

const connect = (path) => {
  const source = new EventSource(path);
  for (const part of document.querySelectorAll("[data-live]")) {
    source.addEventListener(part.id, (event) => show(part, event.data));
  }
  source.addEventListener("trouble", (event) => (trouble.textContent = event.data));
  source.addEventListener("error", () => {
    trouble.textContent = "The server cannot be reached. This page tries again by itself.";
    // After an answer that is no stream (another token, another server) browsers give up.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 5000);
  });
  return source;
};

/** Follows a stream of events while the page is seen: browsers allow few connections, and hidden pages need none. */
export const follow = (path) => {
  let source = null;
  const start = () => (source ??= connect(path));
  const stop = () => {
    source?.close();
    source = null;
  };
  const startOrStop = () => (document.hidden ? stop() : start());
  document.addEventListener("visibilitychange", startOrStop);
  addEventListener("pagehide", stop);
  addEventListener("pageshow", startOrStop);
  startOrStop();
};
