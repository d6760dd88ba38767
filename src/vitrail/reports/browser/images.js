// What pages that classify images share: how a person gives images, and how the classes are shown.

export const find = (id) => document.getElementById(id);
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

// Call `take` with the files that are chosen, dropped or pasted.
export function onImages(take) {
  find("choose").addEventListener("click", () => find("files").click());
  for (const input of document.querySelectorAll("input[type=file]")) {
    input.addEventListener("change", (event) => {
      take([...event.target.files]);
      event.target.value = "";
    });
  }
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    take([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => take([...event.clipboardData.files]));
}

export function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The most probable classes as bars: items of a list.
export function bars(top) {
  return top.map(({ label, score }) => {
    const row = document.createElement("li"), track = element("span", "", "track"), fill = element("div", "", "fill");
    fill.style.width = `${100 * score}%`;
    track.append(fill);
    row.append(element("span", label), element("span", percent(score), "n"), track);
    return row;
  });
}
