// Small plots as SVG, each with a text that says the same to those who cannot see it.

const SVG = "http://www.w3.org/2000/svg";

// Makes an element; text is always text, never markup.
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(name, attributes = {}, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
}

export function number(n) {
  return n.toLocaleString("en-US");
}

// Shares as bars: [{ text, share, title, said }].
export function bars(rows, label) {
  const list = make("dl", { class: "bars", "aria-label": label });
  for (const { text, share, title, said } of rows) {
    const picture = svg("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" });
    picture.append(svg("rect", { class: "track", width: 100, height: 12, rx: 2 }));
    picture.append(svg("rect", { class: "bar", width: Math.max(0.8, 100 * share), height: 12, rx: 2 }));
    list.append(make("dt", { title: title ?? text }, text), make("dd", {}, picture), make("dd", {}, said ?? percent(share)));
  }
  return list;
}

// Genes that go up and down, as bars on both sides of a line.
export function changes(up, down) {
  const rows = [...up, ...[...down].reverse()];
  const [width, line, name] = [360, 19, 92];
  const most = Math.max(...rows.map((row) => Math.abs(row.delta)), 1e-9);
  const height = rows.length * line + 4;
  const list = (genes) => genes.map((row) => `${row.feature_name} ${row.delta.toFixed(2)}`).join(", ") || "none";
  const picture = svg("svg", {
    class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Genes that go up: ${list(up)}. Genes that go down: ${list(down)}.`,
  });
  const room = (width - name - 84) / 2; // the values stand beside the bars
  const middle = name + 42 + room;
  rows.forEach((row, i) => {
    const y = i * line + 3;
    const length = Math.max(1, (Math.abs(row.delta) / most) * room);
    const rises = row.delta > 0;
    const text = svg("text", { x: name - 6, y: y + 11, "text-anchor": "end" }, short(row.feature_name || row.feature_id, 13));
    text.append(svg("title", {}, `${row.feature_name} (${row.feature_id}): ${row.control.toFixed(3)} to ${row.perturbed.toFixed(3)}`));
    picture.append(
      text,
      svg("rect", { class: rises ? "up" : "down", x: rises ? middle : middle - length, y, width: length, height: line - 6, rx: 2 }),
      svg("text", { x: rises ? middle + length + 4 : middle - length - 4, y: y + 11, "text-anchor": rises ? "start" : "end", class: "quiet" },
        `${rises ? "+" : "−"}${Math.abs(row.delta).toFixed(2)}`),
    );
  });
  picture.append(svg("line", { x1: middle, x2: middle, y1: 0, y2: height }));
  return picture;
}

function short(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// All genes: mean without the perturbation across, change upwards.
export function shiftPlot(control, delta, named) {
  const [width, height, left, right, top, bottom] = [360, 230, 44, 12, 10, 34];
  let [most, low, high] = [1e-9, -1e-9, 1e-9];
  for (let i = 0; i < control.length; i++) {
    most = Math.max(most, control[i]);
    low = Math.min(low, delta[i]);
    high = Math.max(high, delta[i]);
  }
  const far = Math.max(-low, high);
  const pad = 0.07 * (high - low);
  [low, high] = [low - pad, high + pad];
  const x = (value) => left + (value / most) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const picture = svg("svg", {
    class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Predicted change of ${number(control.length)} features against their mean; the largest is ${far.toFixed(2)}.`,
  });
  for (const value of ticks(low, high)) {
    picture.append(
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end", class: "quiet" }, plain(value)),
    );
  }
  for (const value of ticks(0, most)) {
    picture.append(svg("text", { x: x(value), y: height - bottom + 14, "text-anchor": "middle", class: "quiet" }, plain(value)));
  }
  picture.append(
    svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "mean without it (log1p per 10,000)"),
    svg("text", { x: -(top + height - bottom) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, "predicted change"),
  );
  const still = far / 250; // what moves less lies on the line: one mark in each place is enough
  const seen = new Set();
  let dots = "";
  for (let i = 0; i < control.length; i++) {
    const place = `${Math.round(x(control[i]))} ${Math.round(y(delta[i]))}`;
    if (Math.abs(delta[i]) < still && seen.has(place)) continue;
    seen.add(place);
    dots += `M${x(control[i]).toFixed(1)} ${y(delta[i]).toFixed(1)}m-1.7 0a1.7 1.7 0 1 0 3.4 0a1.7 1.7 0 1 0 -3.4 0`;
  }
  picture.append(svg("path", { d: dots, class: "dot" }));
  const taken = [];
  for (const row of named) {
    const [px, py] = [x(row.control), y(row.delta)];
    picture.append(svg("circle", { cx: px, cy: py, r: 3, class: row.delta > 0 ? "up" : "down" }));
    const text = short(row.feature_name || row.feature_id, 12);
    const wide = text.length * 6.4 + 8;
    const before = px + wide > width - right;
    const box = [before ? px - wide : px, py - 7, before ? px : px + wide, py + 6];
    if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
    taken.push(box);
    picture.append(svg("text", { x: before ? px - 6 : px + 6, y: py + 4, "text-anchor": before ? "end" : "start", class: "halo" }, text));
  }
  return picture;
}

function plain(value) {
  return String(Number(value.toPrecision(2))).replace("-", "−");
}

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-12; value += step) found.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return found;
}
