// The page of `vitrail serve`. Images are drawn on canvases: the page's security policy allows no data: or blob: URLs.

import { bars, element, find, onImages, percent } from "./images.js";

const AT_ONCE = 8; // requests
const SIDE = 1600; // pixels: longer side of the drawn image at most
const SMALL = 160; // pixels: an image up to this side is shown with square pixels
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

let model = null; // the answer of /model
let items = []; // {file, prediction | error, milliseconds, picture}
let shown = null;
let batch = 0; // number of the last drop; answers of earlier ones are discarded

// ---- the service

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  const body = await response.json().catch(() => ({ error: `The service answered with status ${response.status}.` }));
  if (response.status === 401) askForToken();
  if (response.status === 429) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * Number(response.headers.get("Retry-After") ?? 1)));
    return call(path, options);
  }
  if (!response.ok) throw new Error(body.error);
  return body;
}

function predict(file, query = "") {
  if (file.size > model.max_body) throw new Error(`The file has ${(file.size / 1e6).toFixed(0)} MB; the service takes ${Math.floor(model.max_body / 1e6)} MB at most.`);
  return call(`/predict${query}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
}

function askForToken() {
  find("token-form").hidden = false;
  find("token").focus();
}

async function loadModel() {
  model = await call("/model");
  find("token-form").hidden = true;
  document.title = `${model.name} · vitrail`;
  find("title").textContent = model.name;
  find("subtitle").textContent = `${model.architecture} · ${plural(model.classes, "class").replace("classs", "classes")}`;
  const method = find("method");
  method.replaceChildren(...["none", ...model.explain_methods].map((name) => new Option(name.replaceAll("_", " "), name)));
  method.value = model.explain_methods[0] ?? "none";
  find("explain").hidden = model.explain_methods.length === 0;
  const size = model.preprocess.size;
  const rows = {
    Architecture: model.architecture,
    Runtime: model.runtime,
    Classes: model.classes,
    "Input size": `${size[0]} × ${size[1]} pixels, ${model.preprocess.channels === 1 ? "grey" : "colour"}`,
    Resizing: `${model.preprocess.interpolation}, crop ${model.preprocess.crop_pct} (${model.preprocess.crop_mode})`,
    Mean: model.preprocess.mean.map((value) => value.toFixed(3)).join(", "),
    Std: model.preprocess.std.map((value) => value.toFixed(3)).join(", "),
    ...(model.notes.data ? { "Trained on": model.notes.data } : {}),
    ...(model.notes.figures?.top1 ? { "Top-1": `${model.notes.figures.top1.toFixed(2)} % (${model.notes.figures.split})` } : {}),
    ...(model.notes.source ? { Weights: model.notes.source } : {}),
    ...(model.notes.licence ? { Licence: model.notes.licence } : {}),
  };
  find("facts").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const row = document.createElement("tr");
    row.append(element("th", name), element("td", value));
    row.firstChild.scope = "row";
    return row;
  }));
}

// ---- images

async function take(files) {
  if (!model || !files.length) return;
  const mine = ++batch;
  items = files.map((file) => ({ file }));
  shown = null;
  find("problem").hidden = true;
  find("drop").classList.add("small");
  find("result").hidden = true;
  showList();
  const queue = [...items.entries()];
  let done = 0;
  const work = async () => {
    while (queue.length && mine === batch) {
      const [index, item] = queue.shift();
      await answer(item);
      if (mine !== batch) return;
      done += 1;
      find("status").textContent = done < items.length ? `${done} of ${items.length} images` : "";
      updateRow(index);
      if (shown === null && (!item.error || items.length === 1)) show(index);
    }
  };
  find("status").textContent = files.length === 1 ? "Classifying…" : `0 of ${files.length} images`;
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, files.length) }, work));
  if (mine !== batch) return;
  const failed = items.filter((item) => item.error).length;
  if (items.length > 1) find("status").textContent = `${plural(items.length, "image")}${failed ? `, ${failed} could not be read` : ""}`;
  if (shown === null) show(0);
}

async function answer(item) {
  const start = performance.now();
  try {
    item.prediction = await predict(item.file);
    item.milliseconds = performance.now() - start;
  } catch (error) {
    item.error = error.message;
  }
}

async function picture(file) {
  // Upright, as the service reads it. A browser cannot show every format that the service reads.
  try {
    const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1) return bitmap;
    return createImageBitmap(bitmap, { resizeWidth: Math.max(1, Math.round(bitmap.width * scale)), resizeHeight: Math.max(1, Math.round(bitmap.height * scale)), resizeQuality: "high" });
  } catch {
    return null;
  }
}

function draw(canvas, bitmap, small = false) {
  const factor = small ? Math.max(1, Math.floor(384 / Math.max(bitmap.width, bitmap.height))) : 1;
  canvas.width = bitmap.width * factor;
  canvas.height = bitmap.height * factor;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = !small;
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

// ---- one result

async function show(index) {
  const item = items[index];
  shown = index;
  for (const button of document.querySelectorAll("#rows button")) button.setAttribute("aria-current", String(Number(button.dataset.index) === index));
  find("problem").hidden = !item.error;
  find("result").hidden = Boolean(item.error);
  if (item.error) {
    find("problem").textContent = `${item.file.name || "The image"}: ${item.error}`;
    if (items.length === 1) find("status").textContent = "";
    return;
  }
  const { label, score, unsure, top } = item.prediction;
  find("label").textContent = label;
  find("score").textContent = percent(score);
  find("unsure").hidden = find("unsure-note").hidden = !unsure;
  find("file-name").textContent = item.file.name || "";
  find("latency").textContent = `Answered in ${item.milliseconds.toFixed(0)} ms, with the way to the service and back.`;
  find("top").replaceChildren(...bars(top));
  find("status").textContent = items.length === 1 ? `${label}, ${percent(score)}${unsure ? ", unsure" : ""}` : find("status").textContent;
  const canvas = find("image");
  find("heat").hidden = true;
  canvas.hidden = true;
  item.picture ??= await picture(item.file);
  if (shown !== index || items[index] !== item) return;
  canvas.hidden = item.picture === null;
  if (item.picture) {
    draw(canvas, item.picture, Math.max(item.picture.width, item.picture.height) <= SMALL);
    canvas.setAttribute("aria-label", `${item.file.name || "image"}: ${label}`);
  }
  await explain();
}

async function explain() {
  const method = find("method").value, heat = find("heat"), item = items[shown];
  heat.hidden = true;
  find("explain-note").textContent = "";
  if (method === "none" || !item?.prediction || !item.picture) return;
  find("frame").classList.add("busy");
  try {
    item.heatmaps ??= {};
    item.heatmaps[method] ??= (await predict(item.file, `?explain=${method}`)).heatmap;
    if (items[shown] !== item || find("method").value !== method) return;
    const found = item.heatmaps[method];
    const bytes = Uint8Array.from(atob(found.png), (character) => character.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const image = find("image");
    heat.width = image.width;
    heat.height = image.height;
    heat.getContext("2d").drawImage(bitmap, 0, 0, heat.width, heat.height);
    heat.setAttribute("aria-label", `heatmap of ${method}`);
    heat.hidden = false;
    find("explain-note").textContent = found.class_specific
      ? `Bright where the probability of “${found.target}” depends on the image. Grey was cut off by the preprocessing.`
      : "This map is the same for every class: it does not show why this one was predicted.";
  } catch (error) {
    find("explain-note").textContent = error.message;
  } finally {
    if (items[shown] === item) find("frame").classList.remove("busy");
  }
}

// ---- several results

function showList() {
  find("list").hidden = items.length < 2;
  find("list-title").textContent = plural(items.length, "image");
  find("rows").replaceChildren(...(items.length < 2 ? [] : items.map((item, index) => {
    const row = document.createElement("tr"), button = document.createElement("button"), thumbnail = document.createElement("canvas");
    button.type = "button";
    button.dataset.index = index;
    button.append(thumbnail, element("span", item.file.name || `image ${index + 1}`));
    button.addEventListener("click", () => { if (item.prediction || item.error) show(index); });
    const first = document.createElement("td");
    first.append(button);
    row.append(first, element("td", "…"), element("td", "", "n"));
    return row;
  })));
}

async function updateRow(index) {
  const row = find("rows").children[index], item = items[index];
  if (!row) return;
  const [first, label, score] = row.children;
  label.textContent = item.error ?? item.prediction.label + (item.prediction.unsure ? " (unsure)" : "");
  label.className = item.error ? "error" : "";
  score.textContent = item.error ? "" : percent(item.prediction.score);
  if (item.error) return;
  try {
    const bitmap = await createImageBitmap(item.file, { imageOrientation: "from-image", resizeHeight: 88, resizeQuality: "medium" });
    const canvas = first.querySelector("canvas"), side = Math.min(bitmap.width, bitmap.height);
    canvas.width = canvas.height = 88;
    canvas.getContext("2d").drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, 88, 88);
  } catch { /* a format that this browser cannot show */ }
}

function downloadCsv() {
  const quote = (text) => {
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // a spreadsheet would run it as a formula
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const lines = items.map(({ file, prediction, error }) => [file.name ?? "", prediction?.label ?? "", prediction?.score ?? "", prediction?.unsure ?? "", error ?? ""]);
  const text = [["image", "label", "score", "unsure", "error"], ...lines].map((line) => line.map((value) => quote(String(value))).join(",")).join("\r\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${text}\r\n`], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- snippets

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlSnippet(name) {
  const token = sessionStorage.getItem("token") ? ` -H "Authorization: Bearer $VITRAIL_TOKEN"` : "";
  return `curl -sS${token} -H 'Content-Type: application/octet-stream' --data-binary ${shell(`@${name}`)} '${location.origin}/predict?top=5'`;
}

function pythonSnippet(name) {
  const token = sessionStorage.getItem("token");
  const header = token ? `, "Authorization": f"Bearer {os.environ['VITRAIL_TOKEN']}"` : "";
  return `import json${token ? ", os" : ""}, urllib.request

with open(${JSON.stringify(name)}, "rb") as file:
    request = urllib.request.Request(
        "${location.origin}/predict?top=5",
        data=file.read(),
        headers={"Content-Type": "application/octet-stream"${header}},
    )
print(json.load(urllib.request.urlopen(request)))
`;
}

async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Could not copy";
  }
  find("status").textContent = button.textContent;
  setTimeout(() => { button.textContent = before; }, 1500);
}

// ---- camera

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    find("capture").click(); // a phone opens its own camera
    return;
  }
  try {
    find("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    find("viewfinder").showModal();
    await find("video").play();
  } catch {
    find("capture").click();
  }
}

function closeCamera() {
  for (const track of find("video").srcObject?.getTracks() ?? []) track.stop();
  find("video").srcObject = null;
  if (find("viewfinder").open) find("viewfinder").close();
}

function shoot() {
  const video = find("video"), canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    closeCamera();
    if (blob) take([new File([blob], "photo.jpg", { type: "image/jpeg" })]);
  }, "image/jpeg", 0.95);
}

// ---- events

onImages(take);
find("camera").addEventListener("click", openCamera);
find("shoot").addEventListener("click", shoot);
find("cancel-photo").addEventListener("click", closeCamera);
find("viewfinder").addEventListener("close", closeCamera);
find("method").addEventListener("change", explain);
find("opacity").addEventListener("input", (event) => { find("heat").style.opacity = event.target.value / 100; });
find("heat").style.opacity = find("opacity").value / 100;
find("csv").addEventListener("click", downloadCsv);
find("copy-curl").addEventListener("click", (event) => copy(event.currentTarget, curlSnippet(items[shown].file.name || "photo.jpg")));
find("copy-python").addEventListener("click", (event) => copy(event.currentTarget, pythonSnippet(items[shown].file.name || "photo.jpg")));
find("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", find("token").value);
  await start();
});

async function start() {
  try {
    await loadModel();
  } catch (error) {
    find("status").textContent = "";
    if (find("token-form").hidden) {
      find("problem").textContent = error.message;
      find("problem").hidden = false;
    }
  }
}
await start();
