// Run a Raptor on a photograph in the browser, and show the states of all its layers.
import { AutoImageProcessor, AutoModel, RawImage, env } from "@huggingface/transformers";

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const [folder, dtype] = [query.get("model") ?? "model", query.get("dtype") ?? "q4f16"];
const runtime = new URL("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", location.href).href;

// nothing is asked for outside of this folder
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false; // the browser's own asks whether a file has changed
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };

let model, processor;
export let shown; // of the last photograph

async function load() {
  const options = { model_file_name: "states", dtype, device: "wasm" };
  processor = await AutoImageProcessor.from_pretrained(folder);
  model = await AutoModel.from_pretrained(folder, options);
  const phases = model.config.phases;
  $("about").prepend(`${phases.length} blocks, applied ${phases.join(" + ")} times. `);
  await show("sample.jpg");
}

// An image's address to everything that the page shows.
async function show(address) {
  if (!model) return;
  delete document.body.dataset.milliseconds;
  $("status").textContent = "Running …";
  await new Promise((resolve) => setTimeout(resolve, 50)); // the line above is painted first
  const { pixel_values } = await processor(await RawImage.read(address));
  const begin = performance.now();
  const { hidden_states, logits } = await model({ pixel_values });
  const milliseconds = performance.now() - begin;

  const [, layers, tokens, channels] = hidden_states.dims;
  const [, , height, width] = pixel_values.dims;
  const patch = [model.config.teacher_config.patch_size].flat();
  const grid = [Math.floor(height / patch[0]), Math.floor(width / patch.at(-1))];
  const prefix = tokens - grid[0] * grid[1];
  const states = { data: hidden_states.data, layers, tokens, channels, prefix };
  shown = { states, grid, layers, colours: colours(states), turns: prefix ? turns(states) : null, logits };

  drawSeen(pixel_values);
  drawStrip();
  drawTurns();
  $("layer").max = layers - 1;
  $("layer").value = layers - 1;
  choose(layers - 1);
  $("results").hidden = false;
  $("status").textContent =
    `${milliseconds.toFixed(0)} ms an image, ${(milliseconds / (layers - 1)).toFixed(0)} ms an application.`;
  const bytes = { model: 0, runtime: 0 };
  for (const entry of performance.getEntriesByType("resource")) {
    bytes[entry.name.includes(`/${folder}/`) ? "model" : "runtime"] += entry.encodedBodySize;
  }
  $("facts").textContent =
    `Transferred at the first visit: model ${(bytes.model / 1e6).toFixed(1)} MB (${dtype}), ` +
    `page and runtime ${(bytes.runtime / 1e6).toFixed(1)} MB.`;
  document.body.dataset.milliseconds = milliseconds;
}

// Index of the block that makes a layer from 1 on.
function blockOf(layer) {
  let last = 0;
  return model.config.phases.findIndex((length) => layer <= (last += length));
}

// Patches of all layers to RGB in 0 … 1, by three principal components with one basis and scale.
function colours({ data, layers, tokens, channels, prefix }) {
  const patches = tokens - prefix;
  const rows = new Float32Array(layers * patches * channels);
  for (let layer = 0; layer < layers; layer++) {
    const part = rows.subarray(layer * patches * channels, (layer + 1) * patches * channels);
    const start = (layer * tokens + prefix) * channels;
    part.set(data.subarray(start, start + part.length));
    const mean = new Float32Array(channels);
    for (let at = 0; at < part.length; at += channels) {
      const row = part.subarray(at, at + channels);
      const length = Math.hypot(...row);
      for (let c = 0; c < channels; c++) mean[c] += (row[c] /= length) / patches;
    }
    for (let i = 0; i < part.length; i++) part[i] -= mean[i % channels];
  }

  // orthogonal iteration, from a start that is always the same
  let basis = [0, 1, 2].map((k) => Float32Array.from({ length: channels }, (_, c) => Math.sin((k + 1) * (c + 1))));
  let scores = null;
  for (let round = 0; round < 20; round++) {
    basis = orthonormal(basis);
    scores = new Float32Array(3 * layers * patches);
    const next = basis.map(() => new Float32Array(channels));
    for (let r = 0; r < layers * patches; r++) {
      const row = rows.subarray(r * channels, (r + 1) * channels);
      for (let k = 0; k < 3; k++) {
        let score = 0;
        for (let c = 0; c < channels; c++) score += row[c] * basis[k][c];
        scores[3 * r + k] = score;
        for (let c = 0; c < channels; c++) next[k][c] += score * row[c];
      }
    }
    basis = next;
  }
  const sorted = Float32Array.from(scores).sort();
  const [low, high] = [sorted[Math.floor(0.01 * sorted.length)], sorted[Math.floor(0.99 * sorted.length)]];
  return scores.map((score) => (score - low) / (high - low));
}

// Gram-Schmidt.
function orthonormal(vectors) {
  const done = [];
  for (const vector of vectors) {
    for (const other of done) {
      const share = vector.reduce((sum, value, c) => sum + value * other[c], 0);
      vector.forEach((value, c) => (vector[c] = value - share * other[c]));
    }
    const length = Math.hypot(...vector);
    done.push(vector.map((value) => value / length));
  }
  return done;
}

// Degrees by which each layer turns the cls token.
function turns({ data, layers, tokens, channels }) {
  const cls = (layer) => data.subarray(layer * tokens * channels, layer * tokens * channels + channels);
  const result = [];
  for (let layer = 1; layer < layers; layer++) {
    const [before, after] = [cls(layer - 1), cls(layer)];
    const product = before.reduce((sum, value, c) => sum + value * after[c], 0);
    const cosine = product / Math.hypot(...before) / Math.hypot(...after);
    result.push((Math.acos(Math.min(1, cosine)) * 180) / Math.PI);
  }
  return result;
}

// Fill a canvas of height × width pixels; `pixel` gives red, green, blue in 0 … 1.
function paint(canvas, height, width, pixel) {
  [canvas.height, canvas.width] = [height, width];
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    image.data.set([...pixel(i).map((value) => 255 * value), 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawSeen({ data, dims: [, , height, width] }) {
  const { image_mean, image_std } = processor;
  paint($("seen"), height, width, (i) =>
    [0, 1, 2].map((c) => data[c * height * width + i] * (image_std?.[c] ?? 1) + (image_mean?.[c] ?? 0)));
}

function drawPatches(canvas, layer) {
  const [rows, columns] = shown.grid;
  const start = 3 * layer * rows * columns;
  paint(canvas, rows, columns, (i) => [...shown.colours.subarray(start + 3 * i, start + 3 * i + 3)]);
}

function drawStrip() {
  $("strip").replaceChildren();
  for (let layer = 0; layer < shown.layers; layer++) {
    const item = document.createElement("div");
    const canvas = document.createElement("canvas");
    drawPatches(canvas, layer);
    item.append(canvas, layer);
    item.classList.toggle("odd", layer > 0 && blockOf(layer) % 2 === 0);
    item.onclick = () => choose(layer);
    $("strip").append(item);
  }
}

function drawTurns() {
  const degrees = shown.turns;
  $("turns").hidden = !degrees;
  if (!degrees) return;
  const top = Math.max(...degrees);
  const x = (layer) => 45 + (430 * (layer - 0.5)) / degrees.length;
  const y = (value) => 170 - (150 * value) / top;
  let drawn = `<text x="0" y="25">${top.toFixed(0)}°</text><text x="0" y="172">0°</text>`;
  drawn += `<text x="0" y="194">block</text>`;
  let [start, block] = [0, 0];
  for (const length of model.config.phases) {
    const [left, right] = [x(start + 0.5), x(start + length + 0.5)];
    if (block % 2 === 0) drawn += `<rect class="band" x="${left}" y="10" width="${right - left}" height="165"/>`;
    drawn += `<text x="${(left + right) / 2}" y="194" text-anchor="middle">${++block}</text>`;
    start += length;
  }
  const points = degrees.map((value, i) => `${x(i + 1)},${y(value)}`);
  drawn += `<path d="M${points.join("L")}"/><line id="mark" y1="10" y2="175"/>`;
  $("curve").innerHTML = drawn;
  $("curve").dataset.left = JSON.stringify([0, ...degrees.map((_, i) => x(i + 1))]);
  $("table").innerHTML = degrees
    .map((value, i) => `<tr><td>${i + 1}</td><td>${blockOf(i + 1) + 1}</td><td>${value.toFixed(2)}</td></tr>`)
    .join("");
}

function drawClasses(layer) {
  $("classes").hidden = !shown.logits;
  if (!shown.logits) return;
  const labels = shown.logits.dims[2];
  const logits = shown.logits.data.subarray(layer * labels, (layer + 1) * labels);
  const largest = Math.max(...logits);
  const total = logits.reduce((sum, value) => sum + Math.exp(value - largest), 0);
  const likeliest = [...logits]
    .map((value, label) => ({ label, share: Math.exp(value - largest) / total }))
    .sort((one, other) => other.share - one.share)
    .slice(0, 5);
  $("likeliest").replaceChildren(
    ...likeliest.map(({ label, share }) => {
      const [item, meter] = [document.createElement("li"), document.createElement("meter")];
      meter.value = share;
      item.append(meter, ` ${model.config.id2label?.[label] ?? label}, ${(100 * share).toFixed(0)} %`);
      return item;
    }),
  );
}

// Show a layer.
function choose(layer) {
  $("layer").value = layer;
  $("number").textContent = `${layer} of ${shown.layers - 1}`;
  const block = layer ? `block ${blockOf(layer) + 1} at work` : "the embeddings";
  $("layer").setAttribute("aria-valuetext", `${layer}, ${block}`);
  $("caption").textContent = `patches after layer ${layer}: ${block}`;
  $("patches").setAttribute("aria-label", `Patches after layer ${layer} as colours`);
  drawPatches($("patches"), layer);
  [...$("strip").children].forEach((item, i) => item.classList.toggle("now", i === layer));
  const mark = $("mark");
  if (mark) {
    const left = JSON.parse($("curve").dataset.left)[layer] || 45;
    mark.setAttribute("x1", left);
    mark.setAttribute("x2", left);
  }
  drawClasses(layer);
}

function play() {
  let layer = 0;
  $("play").disabled = true;
  const timer = setInterval(() => {
    choose(layer++);
    if (layer < shown.layers) return;
    clearInterval(timer);
    $("play").disabled = false;
  }, 400);
}

const fail = (error) => ($("status").textContent = `This did not work: ${error.message}`);
const showFile = (file) => file && show(URL.createObjectURL(file)).catch(fail);
for (const id of ["file", "camera"]) $(id).onchange = (event) => showFile(event.target.files[0]);
$("sample").onclick = () => show("sample.jpg").catch(fail);
$("layer").oninput = (event) => choose(Number(event.target.value));
$("play").onclick = play;
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") showFile(event.dataTransfer.files[0]);
  });
}
load().catch(fail);
