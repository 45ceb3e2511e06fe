// The page: opens cells, shows them, asks what selected ones are and what a perturbation would do to them.

import { array, ask, hasToken, Refused, useToken } from "./api.js";
import { bars, changes, make, number, percent, shiftPlot } from "./charts.js";
import { COLOURED, onTheme, ramp, rgb, theme, word } from "./colours.js";
import { Scatter } from "./scatter.js";

const $ = (id) => document.getElementById(id);
const PAUSE_MS = 400;
const LONGEST_PAUSE_MS = 3000;
const UNKNOWN = "unknown";
const state = {
  model: null, limits: null, session: null, view: null, selected: [], targets: [], known: new Set(), opening: 0,
  again: null, // opens the cells that are shown once more
};

const map = begin();

function begin() {
  try {
    return new Scatter($("map"), $("over"), { onSelect: select, onHover: hover });
  } catch (error) {
    $("alert").textContent = error.message;
    $("alert").hidden = false;
    throw error;
  }
}

function say(text) {
  $("live").textContent = text;
}

function warn(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refused)) console.error(error);
  if (error.status === 401) $("tokenForm").hidden = false;
  const asks = hasToken() ? "The server does not know this token: check it, and type it again." : "This server asks for a token: type it at the top of the page.";
  const box = $("alert");
  box.replaceChildren(error.status === 401 ? asks : error.message);
  if (error.status === 404 && state.again) { // the server has let the session go
    $("dataset").value = ""; // so that the same can be chosen
    box.append(" ", make("button", { type: "button", onclick: state.again }, "Open again"));
  }
  box.hidden = false;
  if (error.status === 401) $("token").focus();
}

function fine() {
  $("alert").hidden = true;
}

// ---------------------------------------------------------------- the model
async function meet() {
  const [models, offered, perturbations] = await Promise.all([
    ask("GET", "/v1/models"), ask("GET", "/v1/datasets"), ask("GET", "/v1/perturbations"),
  ]);
  state.model = models.models[0];
  state.limits = { ...offered.limits, body_bytes: offered.body_bytes };
  $("dataset").replaceChildren(
    make("option", { value: "" }, offered.datasets.length ? "choose …" : "none offered"),
    ...offered.datasets.map(({ name }) => make("option", { value: name }, name)),
  );
  state.known = new Set(perturbations.perturbations);
  $("targets").replaceChildren(...perturbations.perturbations.map((name) => make("option", { value: name })));
  $("target").placeholder = perturbations.perturbations.length
    ? `one of ${number(perturbations.perturbations.length)}, as ${perturbations.perturbations[0]}` : "this model knows none";
  $("served").textContent = `model ${state.model.id}`;
  $("card").replaceChildren(...card(state.model));
  fine();
}

function table(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)))));
}

function figure(value) {
  return Number.isInteger(value) ? number(value) : String(Number(value.toPrecision(4)));
}

function card(model) {
  const from = model.provenance;
  const code = (text) => make("code", {}, text || "none");
  const measured = Object.entries(model.measurements).map(([name, n]) => `${name} (${number(n)})`).join(", ");
  const rows = [
    ["id", model.id],
    ["weights", code(from.model_sha256)],
    ["snapshot", from.snapshot_name],
    ["snapshot id", code(from.snapshot_id)],
    ["lake commit", code(from.commit_id)],
    ["vocabulary", code(from.vocabulary_hash)],
    ["steps", number(from.global_step)],
    ["made", model.created],
    ["measures", `${measured} features`],
    ["embedding", `${model.embedding_size} numbers`],
    ["can be told", model.prompts.join(", ")],
  ];
  const words = { loss_first: "loss, first step", loss_last: "loss, last steps", loss_test: "loss, test split", loss_test_first: "loss, test split, untrained",
    cells_per_s: "cells/s in training", data_wait_share: "time waiting for data", parameters: "parameters", steps: "steps", resumed_from: "resumed from step" };
  const figures = Object.entries(model.figures ?? {}).map(([name, value]) => [words[name] ?? name.replaceAll("_", " "), figure(value)]);
  const limits = Object.entries({ ...model.limits, ...prefixed(state.limits) }).map(([name, value]) => [name.replaceAll("_", " "), figure(value)]);
  const said = "Predictions of a model, on cells like those that it was trained on; not for clinical use.";
  return [
    make("p", { class: "quiet small" }, said),
    table(rows.slice(0, 3)),
    make("details", {}, make("summary", {}, "Where it comes from, what it reads"), table(rows.slice(3))),
    figures.length ? make("details", {}, make("summary", {}, "Metrics of its training"), table(figures)) : null,
    make("details", {}, make("summary", {}, "Limits of requests"), table(limits)),
  ].filter(Boolean);
}

function prefixed(limits) {
  return Object.fromEntries(Object.entries(limits).filter(([name]) => name !== "body_bytes").map(([name, value]) => [`explore ${name}`, value]));
}

// ---------------------------------------------------------------- opening cells
async function open(send, name) {
  const mine = ++state.opening;
  const before = state.session;
  const wanted = () => mine === state.opening;
  forget();
  busy(`Sending ${name} …`, null);
  try {
    if (before) ask("DELETE", `/v1/explore/${before}`).catch(() => {});
    let reply = await patiently(send, wanted);
    let pause = PAUSE_MS;
    while (reply.state !== "ready") {
      if (!wanted()) return void ask("DELETE", `/v1/explore/${reply.session}`).catch(() => {});
      const doing = {
        reading: `Reading ${name} …`,
        embedding: `Embedding ${number(reply.cells)} cells: ${Math.round(100 * reply.share)} %`,
        placing: `Laying out ${number(reply.cells)} cells …`,
      }[reply.state];
      busy(doing, reply.state === "embedding" ? reply.share : null);
      await sleep(pause);
      pause = Math.min(1.2 * pause, LONGEST_PAUSE_MS); // an owner of a token may have few requests
      reply = await patiently(() => ask("GET", `/v1/explore/${reply.session}`), () => true);
    }
    if (!wanted()) return void ask("DELETE", `/v1/explore/${reply.session}`).catch(() => {});
    show(reply, name);
    state.again = () => open(send, name);
    fine();
  } catch (error) {
    if (!wanted()) return;
    $("busy").hidden = true;
    $("empty").hidden = false;
    $("dataset").value = "";
    warn(error);
  }
}

function sleep(ms) {
  return new Promise((done) => setTimeout(done, ms));
}

// Asks again as long as the server says that it is only busy, and the answer is wanted.
async function patiently(call, wanted) {
  for (;;) {
    try {
      return await call();
    } catch (error) {
      if (error.status !== 429 || !wanted()) throw error;
      busy(`Waiting: ${error.message}`, null);
      await sleep(1000 * (error.retryAfterS ?? 1));
      if (!wanted()) throw error;
    }
  }
}

function busy(text, share) {
  $("empty").hidden = true;
  $("busy").hidden = false;
  if ($("busyText").textContent !== text) {
    $("busyText").textContent = text;
    if (share === null || Math.round(share * 100) % 25 === 0) say(text);
  }
  if (share === null) $("busyBar").removeAttribute("value");
  else $("busyBar").value = share;
}

function forget() {
  state.session = state.view = state.again = null;
  for (const id of ["colour", "gene"]) $(id).disabled = true;
  for (const id of ["tools", "legend", "about", "tip"]) $(id).hidden = true;
  $("shift").replaceChildren();
  map.show(new Float32Array(0));
  select([]);
}

function openFile(file) {
  if (!file) return;
  if (state.limits && file.size > state.limits.body_bytes) {
    const most = (state.limits.body_bytes / 2 ** 20).toFixed(0);
    return warn(new Refused(413, `${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; this server takes ${most} MB (limits.body_bytes). Send fewer cells.`));
  }
  $("dataset").value = "";
  open(() => ask("POST", "/v1/explore/h5ad", { body: file, type: "application/x-hdf5" }), file.name);
}

function show(reply, name) {
  const { view } = reply;
  state.session = reply.session;
  state.view = {
    ...view, n: reply.cells, positions: array(view.positions), type: array(view.type),
    probability: array(view.probability), novelty: array(view.novelty_p),
    labels: view.labels.map((label) => ({ ...label, codes: array(label.codes), numbers: array(label.numbers) })),
  };
  $("busy").hidden = true;
  for (const id of ["tools", "legend", "about"]) $(id).hidden = false;
  const told = view.types.length
    ? [["annotation", "annotation (model)"], ["probability", "its probability"], ...(view.novelty_p ? [["novelty", "novelty p"]] : [])] : [];
  const group = (label, options) => options.length
    ? [make("optgroup", { label }, ...options.map(([value, text]) => make("option", { value }, text)))] : [];
  $("colour").replaceChildren(
    ...group("said by the model", told),
    ...group("known of the cells", state.view.labels.map(({ name }, i) => [`label ${i}`, name])),
    ...(told.length || view.labels.length ? [] : [make("option", { value: "none" }, "one colour")]),
    ...group("measured", [["gene", "a gene"]]),
  );
  for (const id of ["colour", "gene"]) $(id).disabled = false;
  $("gene").value = "";
  map.show(state.view.positions);
  paint();
  const how = view.projection === "umap" ? "UMAP of the model's embeddings" : "Two principal components of the model's embeddings";
  const fitted = view.fitted < reply.cells ? `, fitted to ${number(view.fitted)} of them` : "";
  const known = Object.entries(view.coverage).map(([name, c]) => `${percent(c.share_of_counts)} of the ${name} counts are known to the model`);
  $("map").setAttribute("aria-label", `Map of ${number(reply.cells)} cells of ${name}`);
  $("about").textContent = `${[`${name}: ${number(reply.cells)} cells. ${how}${fitted}`, ...known, ...reply.notes].join("; ")}.`;
  say(`${number(reply.cells)} cells are shown.`);
}

// ---------------------------------------------------------------- colours and legend
const least = { leastProbability: $("leastProbability").valueAsNumber, leastNovelty: $("leastNovelty").valueAsNumber };

function setLeast({ target }) {
  const value = target.valueAsNumber;
  if (!(value >= 0 && value <= 1)) {
    target.value = least[target.id];
    return warn(new Refused(422, `“${target.getAttribute("aria-label")}” takes a number from 0 to 1; it stays at ${target.value}.`));
  }
  least[target.id] = value;
  fine();
  paint();
  if (state.selected.length) select(state.selected);
}

function called(view) {
  const { leastProbability: probability, leastNovelty: novelty } = least;
  const unknown = view.types.length;
  const codes = new Int32Array(view.n);
  for (let i = 0; i < view.n; i++) {
    codes[i] = view.probability[i] < probability || (view.novelty && view.novelty[i] < novelty) ? unknown : view.type[i];
  }
  return { codes, values: [...view.types, UNKNOWN], grey: unknown };
}

function paint() {
  const { view } = state;
  if (!view) return;
  const by = $("colour").value;
  if (by === "annotation") return paintWords({ ...called(view), title: "annotation" });
  if (by === "probability") return paintNumbers(view.probability, "probability of the likeliest type", 0, 1);
  if (by === "novelty") return paintNumbers(view.novelty, "novelty p", 0, 1);
  if (by === "gene") return view.expression ? paintNumbers(view.expression.values, view.expression.title) : paintNothing("type a gene");
  if (by === "none") return paintNumbers(new Float32Array(view.n).fill(0.6), "cells", 0, 1);
  const label = view.labels[Number(by.split(" ")[1])];
  if (label.values) paintWords({ codes: label.codes, values: label.values, grey: -1, title: label.name });
  else paintNumbers(label.numbers, label.name);
}

function paintWords({ codes, values, grey, title }) {
  const { view } = state;
  const counts = new Uint32Array(values.length);
  for (const code of codes) if (code >= 0) counts[code]++;
  const order = [...counts.keys()].filter((code) => counts[code]).sort((a, b) => counts[b] - counts[a]);
  const place = new Int32Array(values.length).fill(-1);
  order.filter((code) => code !== grey).forEach((code, i) => { place[code] = i; });
  const tints = values.map((_, code) => rgb(word(place[code])));
  const other = rgb(word(-1));
  const colours = new Uint8Array(4 * view.n);
  for (let i = 0; i < view.n; i++) colours.set(codes[i] < 0 ? other : tints[codes[i]], 4 * i);
  view.hover = (cell) => `${title}: ${codes[cell] < 0 ? "not known" : values[codes[cell]]}`;
  map.paint(colours, centres(codes, order.filter((code) => code !== grey).slice(0, 14), values));
  const shown = order.slice(0, 40);
  $("legend").replaceChildren(
    make("span", { class: "quiet small" }, `${title}:`),
    ...shown.map((code) => {
      const swatch = make("span", { class: "swatch" });
      swatch.style.background = word(place[code]);
      const all = () => select([...codes.keys()].filter((cell) => codes[cell] === code));
      return make("button", { type: "button", class: "small", title: "Select these cells", onclick: all },
        swatch, make("span", { class: "name", title: values[code] }, values[code] || "not said"), " ", make("span", { class: "quiet" }, number(counts[code])));
    }),
    order.length > shown.length ? make("span", { class: "quiet small" }, `and ${order.length - shown.length} more`) : "",
    order.length > COLOURED ? make("span", { class: "quiet small" }, `the ${COLOURED} most frequent have colours`) : "",
  );
}

// Where a group's name stands: at the cell nearest the median of the group.
function centres(codes, wanted, values) {
  const { positions } = state.view;
  return wanted.map((code) => {
    const [xs, ys] = [[], []];
    for (let i = 0; i < codes.length; i++) {
      if (codes[i] === code) { xs.push(positions[2 * i]); ys.push(positions[2 * i + 1]); }
    }
    const middle = (list) => list.sort((a, b) => a - b)[list.length >> 1];
    return { text: values[code].length > 30 ? `${values[code].slice(0, 29)}…` : values[code], x: middle(xs), y: middle(ys) };
  }).filter(({ text }) => text);
}

function paintNumbers(values, title, low, high) {
  const { view } = state;
  if (low === undefined) {
    const sorted = values.filter(Number.isFinite).sort();
    if (!sorted.length) return paintNothing(`${title}: no cell has a finite number`);
    low = sorted[0];
    high = Math.max(sorted[Math.floor(0.995 * (sorted.length - 1))], low);
    if (high === low) high = Math.max(sorted[sorted.length - 1], low + 1e-6);
  }
  const steps = Array.from({ length: 64 }, (_, i) => ramp(i / 63));
  const none = rgb(word(-1));
  const colours = new Uint8Array(4 * view.n);
  for (let i = 0; i < view.n; i++) {
    const step = Math.round((63 * (values[i] - low)) / (high - low));
    colours.set(Number.isNaN(values[i]) ? none : steps[Math.min(63, Math.max(0, step))], 4 * i);
  }
  view.hover = (cell) => `${title}: ${Number.isNaN(values[cell]) ? "not known" : figure(values[cell])}`;
  map.paint(colours);
  const strip = make("canvas", { width: 128, height: 12, "aria-hidden": "true" });
  const pen = strip.getContext("2d");
  for (let i = 0; i < 128; i++) {
    pen.fillStyle = `rgb(${ramp(i / 127).join(",")})`;
    pen.fillRect(i, 0, 1, 12);
  }
  $("legend").replaceChildren(make("span", { class: "small" }, `${title}: `), make("span", { class: "quiet small" }, figure(low)), strip, make("span", { class: "quiet small" }, figure(high)));
}

function paintNothing(text) {
  const { view } = state;
  const [none, colours] = [rgb(word(-1)), new Uint8Array(4 * view.n)];
  for (let i = 0; i < view.n; i++) colours.set(none, 4 * i);
  view.hover = () => text;
  map.paint(colours);
  $("legend").replaceChildren(make("span", { class: "small" }, text));
}

async function showGene(name) {
  const session = state.session;
  if (!name.trim() || !state.view) return;
  try {
    const found = await ask("GET", `/v1/explore/${session}/expression?${new URLSearchParams({ feature: name.trim(), measurement: measured() })}`);
    if (session !== state.session) return;
    state.view.expression = { values: array(found.values), title: `${found.feature_name}, ${found.unit}` };
    $("colour").value = "gene";
    paint();
    fine();
    say(`Coloured by ${found.feature_name}.`);
  } catch (error) {
    if (error.status !== 422 || session !== state.session) return warn(error);
    state.view.expression = null; // not the colours of the gene before under this one's name
    paint();
    warn(new Refused(422, `The model does not know the gene ${name.trim()}; choose one of those that the field offers.`));
  }
}

function measured() {
  const names = Object.keys(state.view.measurements);
  return names.includes("RNA") ? "RNA" : names[0];
}

let looking = 0;
async function suggest() {
  const mine = ++looking;
  const session = state.session;
  await sleep(150);
  if (mine !== looking || session !== state.session || !state.view) return; // cells may have gone meanwhile
  const like = new URLSearchParams({ like: $("gene").value.trim(), measurement: measured(), limit: "12" });
  const found = await ask("GET", `/v1/explore/${session}/features?${like}`).catch(() => ({ features: [] }));
  if (mine !== looking) return;
  $("genes").replaceChildren(...found.features.map((one) => make("option", { value: one.feature_name || one.feature_id }, `${number(one.cells)} cells`)));
}

// ---------------------------------------------------------------- selected cells
function hover(cell, event) {
  const tip = $("tip");
  tip.hidden = cell < 0 || !state.view?.hover;
  if (!tip.hidden) tip.textContent = state.view.hover(cell);
  if (event.type === "pointermove") $("map").style.cursor = cell < 0 ? "" : "pointer";
}

let annotating = null;
async function select(cells) {
  if (state.selected.length && !cells.length && state.view) say("No cells are selected.");
  state.selected = cells;
  map.choose(cells);
  annotating?.abort();
  $("clear").disabled = !cells.length;
  $("predict").disabled = !cells.length || !state.targets.length;
  $("shift").replaceChildren();
  $("count").textContent = cells.length ? `${number(cells.length)} of ${number(state.view.n)}` : "None: click a cell, draw around some, or take a group of the legend.";
  $("annotation").replaceChildren();
  if (!cells.length) return;
  if (!state.view.types.length) {
    $("annotation").replaceChildren(make("p", { class: "quiet" }, "This model does not tell cell types."));
    return;
  }
  annotating = new AbortController();
  try {
    const options = { top: 5, min_probability: least.leastProbability, min_novelty_p: least.leastNovelty };
    const whole = cells.length === state.view.n ? {} : { cells };
    const reply = await ask("POST", `/v1/explore/${state.session}/annotate`, { json: { ...whole, options }, signal: annotating.signal });
    $("annotation").replaceChildren(...annotation(reply));
    say(`${number(reply.cells)} selected: mostly ${reply.called[0].cell_type}.`);
    fine();
  } catch (error) {
    warn(error);
  }
}

function annotation(reply) {
  const one = reply.cells === 1 ? reply.each[0] : null;
  const verdict = one ? one.cell_type : reply.called[0].cell_type;
  const share = one ? (verdict === UNKNOWN ? ` · perhaps ${one.types[0].cell_type}` : "") : ` · ${percent(reply.called[0].cells / reply.cells)} of them`;
  const under = reply.covering ? `${reply.covering} (${reply.covering_id})` : "none";
  const novelty = reply.novelty_p == null ? "not told by this model" : `${figure(reply.novelty_p)}${reply.novelty_p < 0.05 ? ": unlike what it was trained on" : ""}`;
  const unknown = reply.called.find((called) => called.cell_type === UNKNOWN)?.cells ?? 0;
  const parts = [
    make("p", { class: "verdict" }, make("strong", {}, verdict), make("span", { class: "quiet" }, share)),
    table([
      ...(one ? [["cell", one.name]] : [["unknown", `${number(unknown)} (${percent(unknown / reply.cells)})`]]),
      ["covering type", under],
      [one ? "novelty p" : "median novelty p", novelty],
    ]),
    make("h3", {}, one ? "Probability of types" : "Mean probability of types"),
    bars(reply.types.map((type) => ({ text: type.cell_type, share: type.probability, title: `${type.cell_type} ${type.cell_type_id}` })), "Probability of types"),
  ];
  if (one) return parts;
  parts.push(
    make("h3", {}, "What they are called"),
    bars(reply.called.slice(0, 6).map((called) => ({ text: called.cell_type, share: called.cells / reply.cells, said: number(called.cells) })), "Cells called so"),
  );
  const head = make("tr", {}, ...["cell", "likeliest type", "p", "novelty p"].map((text, i) => make("th", { scope: "col", class: i > 1 ? "number" : null }, text)));
  const rows = reply.each.map((cell) => make("tr", {},
    make("td", {}, cell.name), make("td", {}, cell.cell_type === UNKNOWN ? `unknown (${cell.types[0].cell_type}?)` : cell.cell_type),
    make("td", { class: "number" }, cell.types[0].probability.toFixed(2)),
    make("td", { class: "number" }, cell.novelty_p == null ? "" : figure(Number(cell.novelty_p.toPrecision(2))))));
  parts.push(make("details", {}, make("summary", {}, `The first ${reply.each.length}, one by one`), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  return parts;
}

// ---------------------------------------------------------------- perturbations
// The targets that a text names. A name may hold blanks and commas: what is split least, and known, counts.
function namedIn(text) {
  const [whole, ...finer] = [/[+]/, /[+,;]/, /[+,;\s]/].map((sign) => text.split(sign).map((name) => name.trim()).filter(Boolean));
  return [[text.trim()], whole, ...finer].find((names) => names.every((name) => state.known.has(name))) ?? whole;
}

// Says whether all that was typed is known.
function addTarget() {
  const names = namedIn($("target").value);
  const strange = names.find((name) => !state.known.has(name));
  if (strange) {
    warn(new Refused(422, `The model has not seen the target ${strange}; choose one of the list.`));
    return false;
  }
  state.targets = [...new Set([...state.targets, ...names])];
  $("target").value = "";
  fine();
  showTargets();
  return true;
}

function showTargets() {
  $("chosen").replaceChildren(...state.targets.map((name) => make("li", {}, make("button", {
    type: "button", "aria-label": `Take ${name} away`,
    onclick: () => { state.targets = state.targets.filter((one) => one !== name); showTargets(); $("target").focus(); },
  }, `${name} ×`))));
  $("predict").disabled = !state.targets.length || !state.selected.length;
  if (state.targets.length) say(`Targets: ${state.targets.join(", ")}.`);
}

async function predict() {
  if ($("target").value && !addTarget()) return;
  if (!state.targets.length || !state.selected.length) return;
  const [session, selected] = [state.session, state.selected];
  $("predict").disabled = true;
  $("shift").replaceChildren(make("p", { class: "quiet" }, "Predicting …"));
  try {
    const whole = selected.length === state.view.n ? {} : { cells: selected };
    const reply = await ask("POST", `/v1/explore/${session}/perturb`, { json: { ...whole, perturbations: [state.targets], top: 8 } });
    if (session !== state.session || selected !== state.selected) return;
    $("shift").replaceChildren(...shifted(reply));
    say(`The shift of ${reply.shifts[0].perturbation} is shown.`);
    fine();
  } catch (error) {
    $("shift").replaceChildren();
    warn(error);
  } finally {
    $("predict").disabled = !state.targets.length || !state.selected.length;
  }
}

function shifted(reply) {
  const [shift] = reply.shifts;
  const over = reply.averaged < reply.cells ? `${number(reply.averaged)} of the ${number(reply.cells)} cells, drawn at random` : `${number(reply.cells)} cells`;
  const parts = [make("p", { class: "verdict" }, make("strong", {}, shift.perturbation), make("span", { class: "quiet" }, ` · mean over ${over}`))];
  for (const [name, effect] of Object.entries(shift.effects)) {
    const [control, delta] = [array(effect.control), array(effect.delta)];
    parts.push(
      make("h3", {}, `${name}: most changed features`),
      effect.up.length + effect.down.length ? changes(effect.up, effect.down) : make("p", { class: "quiet" }, "Nothing changes."),
      make("h3", {}, `${name}: shift of all ${number(control.length)} features`),
      shiftPlot(control, delta, [...effect.up, ...effect.down].sort((a, b) => Math.abs(b.delta) - Math.abs(a.delta)).slice(0, 8)),
      make("p", { class: "quiet small" }, `Root mean squared change ${figure(effect.size)}. A mean that the model predicts, without an interval.`),
      listed(name, effect),
    );
  }
  return parts;
}

function listed(name, effect) {
  const head = make("tr", {}, ...["feature", "without", "with", "change"].map((text, i) => make("th", { scope: "col", class: i ? "number" : null }, text)));
  const rows = [...effect.up, ...effect.down].map((row) => make("tr", {}, make("td", { title: row.feature_id }, row.feature_name || row.feature_id),
    ...[row.control, row.perturbed, row.delta].map((value) => make("td", { class: "number" }, value.toFixed(3)))));
  return make("details", {}, make("summary", {}, `${name} as a table`), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

// ---------------------------------------------------------------- what a person does
$("dataset").addEventListener("change", (event) => {
  const dataset = event.target.value;
  if (dataset) open(() => ask("POST", "/v1/explore/dataset", { json: { dataset } }), dataset);
});
$("file").addEventListener("change", (event) => { openFile(event.target.files[0]); event.target.value = ""; });
$("colour").addEventListener("change", () => { paint(); if ($("colour").value === "gene") $("gene").focus(); });
$("gene").addEventListener("input", suggest);
$("gene").addEventListener("focus", suggest);
$("gene").addEventListener("change", (event) => showGene(event.target.value));
for (const id of ["leastProbability", "leastNovelty"]) {
  $(id).addEventListener("change", setLeast);
}
$("lasso").addEventListener("click", () => {
  map.lassoing = !map.lassoing;
  $("lasso").setAttribute("aria-pressed", String(map.lassoing));
});
$("zoomIn").addEventListener("click", () => map.zoomBy(1.5));
$("zoomOut").addEventListener("click", () => map.zoomBy(1 / 1.5));
$("reset").addEventListener("click", () => map.reset());
$("clear").addEventListener("click", () => { select([]); $("map").focus(); });
$("addTarget").addEventListener("click", addTarget);
$("target").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && $("target").value) { event.preventDefault(); addTarget(); }
});
$("perturbForm").addEventListener("submit", (event) => { event.preventDefault(); predict(); });
$("tokenForm").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    useToken($("token").value);
  } catch (error) {
    return warn(error);
  }
  meet().then(() => { $("tokenForm").hidden = true; say("The token is good."); }, warn);
});
$("alert").addEventListener("click", fine);
for (const name of ["dragover", "dragenter"]) {
  window.addEventListener(name, (event) => { event.preventDefault(); $("stage").classList.add("target"); });
}
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("stage").classList.remove("target"); });
window.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("target");
  openFile(event.dataTransfer.files[0]);
});
window.addEventListener("pagehide", (event) => { // a page that is kept may come back, and asks about its cells then
  if (state.session && !event.persisted) ask("DELETE", `/v1/explore/${state.session}`).catch(() => {});
});
onTheme(paint);
document.documentElement.dataset.theme = theme();
window.somaflow = { map, state }; // for those who measure or test the page
meet().catch(warn);
