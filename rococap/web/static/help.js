// The window that lists the keys of a page: see the template keys.html.
import "./keys.js";

document.getElementById("help-open").addEventListener("click", () => document.getElementById("help").showModal());
