// Draws cells as points by WebGL2: positions and colours stay in the card's memory, so that moving the map costs one
// call for all points. Tells which cells are clicked, drawn around, or in the middle; knows nothing of what they are.

const VERTEX = `#version 300 es
in vec2 position; in vec3 colour; in float chosen;
uniform vec2 centre, scale; uniform float size, pass, fade, larger;
out vec4 tint;
void main() {
  bool drawn = pass < 0.5 ? true : chosen > 0.5;
  gl_Position = drawn ? vec4((position - centre) * scale, 0.0, 1.0) : vec4(9.0, 9.0, 0.0, 1.0);
  gl_PointSize = size * (pass < 0.5 ? 1.0 : larger);
  tint = vec4(colour, pass < 0.5 ? fade : 1.0);
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 tint; out vec4 shown;
void main() {
  float away = length(gl_PointCoord - 0.5);
  float alpha = tint.a * (1.0 - smoothstep(0.38, 0.5, away));
  if (alpha < 0.01) discard;
  shown = vec4(tint.rgb * alpha, alpha);
}`;
const SLOW_MS = 45; // a frame that takes longer draws fewer cells, while the map moves
const FAST_MS = 35;
const FEWEST = 10000;
const REST_MS = 160;
const HEAD = 46; // CSS pixels at the top, where the buttons are
const REACH = 14; // CSS pixels between a click and the cell that it takes

export class Scatter {
  constructor(canvas, over, { onSelect, onHover, onView }) {
    Object.assign(this, { canvas, over, onSelect, onHover, onView });
    this.n = 0;
    this.centre = [0, 0];
    this.zoom = 1; // CSS pixels per unit
    this.lassoing = false;
    this.path = null;
    this.labels = [];
    this.few = [];
    this.asked = false;
    this.moving = false;
    this.before = 0;
    this.start();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { this.start(); this.upload(); this.draw(); });
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
  }

  start() {
    const gl = this.canvas.getContext("webgl2", { antialias: false, alpha: true, premultipliedAlpha: true });
    if (!gl) throw new Error("This browser has no WebGL 2, which the map needs.");
    this.gl = gl;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ["position", "colour", "chosen"].forEach((name, place) => gl.bindAttribLocation(program, place, name));
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.at = {};
    for (const name of ["centre", "scale", "size", "pass", "fade", "larger"]) this.at[name] = gl.getUniformLocation(program, name);
    this.buffers = [0, 1, 2, 3].map(() => gl.createBuffer());
    [[2, gl.FLOAT, false], [3, gl.UNSIGNED_BYTE, true], [1, gl.UNSIGNED_BYTE, false]].forEach(([size, kind, unit], i) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[i]);
      gl.enableVertexAttribArray(i);
      gl.vertexAttribPointer(i, size, kind, unit, size === 3 ? 4 : 0, 0);
    });
  }

  // Shows other cells; positions holds x and y of each.
  show(positions) {
    this.positions = positions;
    this.n = positions.length / 2;
    this.colours = new Uint8Array(4 * this.n).fill(128);
    this.chosen = new Uint8Array(this.n);
    this.nChosen = 0;
    this.few = [];
    this.labels = [];
    this.part = this.n;
    this.index();
    this.mix();
    this.upload();
    this.reset();
  }

  // An order of chance, always the same: no group lies over all others, and the first cells are a fair part of all.
  mix() {
    this.mixed = Uint32Array.from({ length: this.n }, (_, i) => i);
    let seed = 1;
    for (let i = this.n - 1; i > 0; i--) {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      const j = seed % (i + 1);
      [this.mixed[i], this.mixed[j]] = [this.mixed[j], this.mixed[i]];
    }
  }

  upload() {
    [0, 1, 2].forEach((i) => this.fill(i));
    this.gl.bindBuffer(this.gl.ELEMENT_ARRAY_BUFFER, this.buffers[3]);
    if (this.n) this.gl.bufferData(this.gl.ELEMENT_ARRAY_BUFFER, this.mixed, this.gl.STATIC_DRAW);
  }

  fill(i) {
    if (!this.n) return;
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[i]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, [this.positions, this.colours, this.chosen][i], this.gl.DYNAMIC_DRAW);
  }

  // colours: red, green, blue and a byte of nothing for each cell.
  paint(colours, labels = []) {
    this.colours = colours;
    this.labels = labels;
    this.fill(1);
    this.ask();
  }

  choose(cells) {
    this.chosen.fill(0);
    for (const cell of cells) this.chosen[cell] = 1;
    this.nChosen = cells.length;
    this.few = cells.length < 20 ? [...cells] : [];
    this.fill(2);
    this.ask();
  }

  // A grid of cells, to find the nearest without looking at all.
  index() {
    const { positions, n } = this;
    const low = [Infinity, Infinity];
    const high = [-Infinity, -Infinity];
    for (let i = 0; i < n; i++) {
      for (let axis = 0; axis < 2; axis++) {
        low[axis] = Math.min(low[axis], positions[2 * i + axis]);
        high[axis] = Math.max(high[axis], positions[2 * i + axis]);
      }
    }
    this.box = { low, high };
    this.side = Math.max(1, Math.min(512, Math.ceil(Math.sqrt(n / 2))));
    this.step = [0, 1].map((axis) => Math.max((high[axis] - low[axis]) / this.side, 1e-9));
    const count = new Uint32Array(this.side * this.side + 1);
    const where = new Uint32Array(n);
    for (let i = 0; i < n; i++) {
      where[i] = this.tile(0, positions[2 * i]) + this.side * this.tile(1, positions[2 * i + 1]);
      count[where[i] + 1]++;
    }
    for (let i = 0; i < count.length - 1; i++) count[i + 1] += count[i];
    this.starts = count.slice();
    this.order = new Uint32Array(n);
    for (let i = 0; i < n; i++) this.order[count[where[i]]++] = i;
  }

  tile(axis, value) {
    return Math.max(0, Math.min(this.side - 1, Math.floor((value - this.box.low[axis]) / this.step[axis])));
  }

  *within(lowX, highX, lowY, highY) {
    for (let y = this.tile(1, lowY); y <= this.tile(1, highY); y++) {
      for (let x = this.tile(0, lowX); x <= this.tile(0, highX); x++) {
        const at = x + y * this.side;
        for (let k = this.starts[at]; k < this.starts[at + 1]; k++) yield this.order[k];
      }
    }
  }

  nearest(px, py, reach = REACH) {
    if (!this.n) return -1;
    const [x, y] = this.world(px, py);
    const far = reach / this.zoom;
    let best = far * far;
    let found = -1;
    for (const i of this.within(x - far, x + far, y - far, y + far)) {
      const d = (this.positions[2 * i] - x) ** 2 + (this.positions[2 * i + 1] - y) ** 2;
      if (d <= best) [best, found] = [d, i];
    }
    return found;
  }

  inside(path) {
    const points = path.map(([x, y]) => this.world(x, y));
    const xs = points.map((point) => point[0]);
    const ys = points.map((point) => point[1]);
    const cells = [];
    const [lowX, highX, lowY, highY] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    for (const i of this.within(lowX, highX, lowY, highY)) {
      const x = this.positions[2 * i];
      const y = this.positions[2 * i + 1];
      if (x < lowX || x > highX || y < lowY || y > highY) continue;
      let odd = false;
      for (let a = 0, b = points.length - 1; a < points.length; b = a++) {
        if (ys[a] > y !== ys[b] > y && x < ((xs[b] - xs[a]) * (y - ys[a])) / (ys[b] - ys[a]) + xs[a]) odd = !odd;
      }
      if (odd) cells.push(i);
    }
    return cells.sort((a, b) => a - b);
  }

  inSight() {
    const [left, bottom] = this.world(0, this.height);
    const [right, top] = this.world(this.width, 0);
    const cells = [];
    for (const i of this.within(left, right, bottom, top)) {
      const x = this.positions[2 * i];
      const y = this.positions[2 * i + 1];
      if (x >= left && x <= right && y >= bottom && y <= top) cells.push(i);
    }
    return cells.sort((a, b) => a - b);
  }

  world(px, py) {
    return [this.centre[0] + (px - this.width / 2) / this.zoom, this.centre[1] - (py - this.height / 2) / this.zoom];
  }

  screen(x, y) {
    return [(x - this.centre[0]) * this.zoom + this.width / 2, this.height / 2 - (y - this.centre[1]) * this.zoom];
  }

  resize() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const fits = this.zoom === this.whole?.zoom;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    for (const canvas of [this.canvas, this.over]) {
      canvas.width = Math.max(1, Math.round(this.width * ratio));
      canvas.height = Math.max(1, Math.round(this.height * ratio));
    }
    this.ratio = ratio;
    this.gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    if (fits || !this.whole) this.reset();
    this.draw();
  }

  reset() {
    if (!this.n || !this.width) return;
    const { low, high } = this.box;
    const span = [0, 1].map((axis) => Math.max(high[axis] - low[axis], 1e-6));
    this.zoom = Math.min((0.92 * this.width) / span[0], (0.94 * (this.height - HEAD)) / span[1]);
    this.centre = [0, 1].map((axis) => (low[axis] + high[axis]) / 2);
    this.centre[1] += HEAD / 2 / this.zoom;
    this.whole = { zoom: this.zoom };
    this.ask();
  }

  zoomBy(factor, px = this.width / 2, py = this.height / 2) {
    if (!this.whole) return;
    const [x, y] = this.world(px, py);
    this.zoom = Math.min(Math.max(this.zoom * factor, this.whole.zoom / 4), this.whole.zoom * 400);
    this.centre = [x - (px - this.width / 2) / this.zoom, y + (py - this.height / 2) / this.zoom];
    this.move();
  }

  moveBy(px, py) {
    this.centre = [this.centre[0] - px / this.zoom, this.centre[1] + py / this.zoom];
    this.move();
  }

  // Where drawing is slow, the map shows a part of the cells while it moves, and all of them when it rests.
  move() {
    this.moving = true;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => {
      this.moving = false;
      this.ask();
    }, REST_MS);
    this.ask();
  }

  pace() {
    const now = performance.now();
    const gap = now - this.before;
    this.before = now;
    if (!this.moving || gap > 2000) return this.moving ? this.part : this.n;
    if (gap > SLOW_MS) this.part = Math.max(Math.min(FEWEST, this.n), Math.floor(0.6 * this.part));
    else if (gap < FAST_MS) this.part = Math.min(this.n, Math.ceil(1.15 * this.part));
    return this.part;
  }

  ask() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => this.draw());
  }

  // The size of a point: smaller where there are many, larger where one is close.
  size() {
    const close = this.whole ? Math.sqrt(this.zoom / this.whole.zoom) : 1;
    const base = Math.min(7, Math.max(2.2, 190 / Math.sqrt(this.n + 1)));
    return Math.min(18, base * Math.max(0.8, Math.min(close, 3.5))) * this.ratio;
  }

  draw() {
    this.asked = false;
    if (!this.width) return;
    const { gl, at } = this;
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const shown = this.pace();
    if (this.n) {
      gl.uniform2f(at.centre, ...this.centre);
      gl.uniform2f(at.scale, (2 * this.zoom) / this.width, (2 * this.zoom) / this.height);
      gl.uniform1f(at.size, this.size());
      gl.uniform1f(at.fade, this.nChosen ? 0.28 : 0.85);
      gl.uniform1f(at.larger, this.nChosen < 20 ? 2.2 : 1.3);
      gl.uniform1f(at.pass, 0);
      gl.drawElements(gl.POINTS, shown, gl.UNSIGNED_INT, 0);
      if (this.nChosen) {
        gl.uniform1f(at.pass, 1);
        gl.drawElements(gl.POINTS, shown, gl.UNSIGNED_INT, 0);
      }
    }
    this.drawOver();
    this.onView?.();
  }

  // Names of groups, the path around cells, the mark in the middle.
  drawOver() {
    const pen = this.over.getContext("2d");
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    const style = getComputedStyle(this.canvas);
    const ink = style.getPropertyValue("--ink");
    const panel = style.getPropertyValue("--panel");
    pen.font = "600 12.5px system-ui, 'Noto Sans', 'DejaVu Sans', sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const taken = [];
    for (const { text, x, y } of this.labels) {
      const [px, py] = this.screen(x, y);
      const half = pen.measureText(text).width / 2 + 3;
      const left = Math.max(half, Math.min(this.width - half, px));
      const box = [left - half, py - 9, left + half, py + 9];
      if (py < 10 || py > this.height - 10 || px < 0 || px > this.width) continue;
      if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
      taken.push(box);
      pen.lineWidth = 4;
      pen.lineJoin = "round";
      pen.strokeStyle = panel;
      pen.strokeText(text, left, py);
      pen.fillStyle = ink;
      pen.fillText(text, left, py);
    }
    for (const cell of this.few) {
      pen.beginPath();
      pen.arc(...this.screen(this.positions[2 * cell], this.positions[2 * cell + 1]), 9, 0, 2 * Math.PI);
      pen.lineWidth = 2.5;
      pen.strokeStyle = ink;
      pen.stroke();
    }
    if (this.path) {
      pen.beginPath();
      this.path.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.fillStyle = "rgba(80, 140, 220, 0.15)";
      pen.fill();
      pen.lineWidth = 2;
      pen.strokeStyle = ink;
      pen.stroke();
    } else if (this.n && this.canvas.matches(":focus-visible")) {
      const [x, y] = [this.width / 2, this.height / 2];
      pen.lineWidth = 2;
      pen.strokeStyle = ink;
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        pen.moveTo(x + 5 * dx, y + 5 * dy);
        pen.lineTo(x + 13 * dx, y + 13 * dy);
      }
      pen.stroke();
    }
  }

  listen() {
    const { canvas } = this;
    const down = new Map();
    let moved = 0;
    const spot = (event) => [event.offsetX, event.offsetY];
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.n || event.button > 0) return;
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, spot(event));
      moved = 0;
      this.path = down.size === 1 && (this.lassoing || event.shiftKey) ? [spot(event)] : null;
      canvas.classList.toggle("drawing", !!this.path);
      canvas.classList.toggle("moving", !this.path);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = down.get(event.pointerId);
      if (!before) return this.onHover(down.size ? -1 : this.nearest(...spot(event)), event);
      const now = spot(event);
      moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (down.size === 2) {
        const other = [...down.entries()].find(([id]) => id !== event.pointerId)[1];
        const gap = (a) => Math.max(1, Math.hypot(a[0] - other[0], a[1] - other[1]));
        this.moveBy((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
        this.zoomBy(gap(now) / gap(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      } else if (this.path) {
        this.path.push(now);
        this.ask();
      } else {
        this.moveBy(now[0] - before[0], now[1] - before[1]);
      }
      down.set(event.pointerId, now);
    });
    const up = (event) => {
      if (!down.delete(event.pointerId)) return;
      canvas.classList.remove("moving", "drawing");
      const path = this.path;
      this.path = null;
      if (event.type === "pointercancel") return this.ask();
      if (moved < 5 && !down.size) {
        const cell = this.nearest(...spot(event));
        this.onSelect(cell < 0 ? [] : [cell]);
      } else if (path && path.length > 2) {
        this.onSelect(this.inside(path));
      }
      this.ask();
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", (event) => this.onHover(-1, event));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), ...spot(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.ask());
  }

  key(event) {
    if (!this.n || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 120 : 40;
    const act = {
      ArrowLeft: () => this.moveBy(step, 0),
      ArrowRight: () => this.moveBy(-step, 0),
      ArrowUp: () => this.moveBy(0, step),
      ArrowDown: () => this.moveBy(0, -step),
      "+": () => this.zoomBy(1.3),
      "=": () => this.zoomBy(1.3),
      "-": () => this.zoomBy(1 / 1.3),
      0: () => this.reset(),
      Enter: () => {
        const cell = this.nearest(this.width / 2, this.height / 2, 60);
        this.onSelect(cell < 0 ? [] : [cell]);
      },
      a: () => this.onSelect(this.inSight()),
      A: () => this.onSelect(this.inSight()),
      Escape: () => this.onSelect([]),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}
