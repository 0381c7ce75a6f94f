// The page of a study shows its results once its key was opened.
document.addEventListener("changed", () => location.reload());
