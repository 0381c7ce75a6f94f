// Find and replace: shows what has become of the captions once something was changed.

document.addEventListener("changed", async () => {
  const address = new URL(location);
  for (const name of ["after", "cutoff", "last_edit"]) address.searchParams.delete(name);
  const response = await fetch(address, { headers: { Accept: "text/html" } }).catch(() => null);
  if (!response?.ok) return location.assign(address);
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const id of ["preview", "acts"]) document.getElementById(id).replaceWith(page.getElementById(id));
  history.replaceState(null, "", address);
});
