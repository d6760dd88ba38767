// A classifier in the browser: the model's graph resizes and normalises, so this file only decodes the image.

import { bars, find, onImages, percent } from "./images.js";

const UNSURE = 0.5; // below this probability of the best class, all others together are more probable
const SIDE = 1200; // pixels: longer side of the drawn image at most

const model = await (await fetch("model.json")).json();
const ort = await import(model.runtime);
ort.env.wasm.wasmPaths = new URL("ort/", document.baseURI).href;
let session = null;

async function start() {
  document.title = `${model.name} · vitrail`;
  find("title").textContent = model.name;
  find("subtitle").textContent = `${model.architecture} · ${model.class_names.length.toLocaleString("en")} classes`;
  const data = new URL("onnx/model.onnx_data", document.baseURI).href;
  session = await ort.InferenceSession.create("onnx/image.onnx", {
    executionProviders: ["wasm"],
    externalData: [{ path: "model.onnx_data", data }],
  });
  find("status").textContent = "Ready.";
}

// The pixels of an image, upright, on white: uint8 H W C, as the model takes them.
async function read(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const pixels = new Uint8Array(width * height * model.channels);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    if (model.channels === 1) {
      // Grey as Pillow computes it (ITU-R 601-2, in integers).
      pixels[to++] = (19595 * data[from] + 38470 * data[from + 1] + 7471 * data[from + 2] + 0x8000) >> 16;
    } else {
      pixels[to++] = data[from];
      pixels[to++] = data[from + 1];
      pixels[to++] = data[from + 2];
    }
  }
  return { pixels, width, height, bitmap };
}

export async function classify(file) {
  const { pixels, width, height, bitmap } = await read(file);
  const begin = performance.now();
  const image = new ort.Tensor("uint8", pixels, [height, width, model.channels]);
  const { probabilities } = await session.run({ image }, ["probabilities"]);
  const top = [...probabilities.data.entries()].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 5);
  return {
    top: top.map(([index, score]) => ({ label: model.class_names[index], score })),
    milliseconds: performance.now() - begin,
    bitmap,
  };
}

async function take(file) {
  if (!file || !session) return;
  find("problem").hidden = find("result").hidden = true;
  find("status").textContent = "Classifying…";
  await new Promise((resolve) => setTimeout(resolve)); // the text appears before the model runs
  try {
    show(file, await classify(file));
  } catch {
    find("status").textContent = "";
    find("problem").textContent = `${file.name || "This file"} is not an image that this browser can read.`;
    find("problem").hidden = false;
  }
}

function show(file, { top, milliseconds, bitmap }) {
  const best = top[0], canvas = find("image"), scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", `${file.name || "image"}: ${best.label}`);
  find("file-name").textContent = file.name || "";
  find("label").textContent = best.label;
  find("unsure").hidden = best.score >= UNSURE;
  find("latency").textContent = `${milliseconds.toFixed(0)} ms in this browser`;
  find("status").textContent = `${best.label}, ${percent(best.score)}${best.score < UNSURE ? ", unsure" : ""}`;
  find("top").replaceChildren(...bars(top));
  find("result").hidden = false;
}

onImages(([file]) => take(file));

try {
  await start();
} catch (error) {
  find("status").textContent = "";
  find("problem").textContent = `The model could not be loaded: ${error.message}`;
  find("problem").hidden = false;
}
