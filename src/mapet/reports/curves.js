// Curves: panels that share their x axis, zoom and cursor.

const HEIGHT = 210, MARGIN = { left: 52, right: 12, top: 10, bottom: 24 };
const MOST_DOTS = 40;

/** One line of a panel; its points are the run's own arrays, which a live run appends to. */
class Line {
  constructor(run, key, name, look, thin) {
    Object.assign(this, { run, key, name, thin });
    [this.color, this.dashes] = look;
  }
  get steps() { return (this.run.curves[this.key] || [[], []])[0]; }
  get values() { return (this.run.curves[this.key] || [[], []])[1]; }
  /** The index of the first point at or after a step. */
  index(step) {
    let low = 0, high = this.steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low;
  }
  nearest(step) {
    const i = this.index(step);
    return i > 0 && (i === this.steps.length || step - this.steps[i - 1] < this.steps[i] - step) ? i - 1 : i;
  }
}

/** All panels: what is shown of the x axis, where the cursor is, which lines are hidden. */
class Curves {
  constructor(data) {
    this.runs = data.runs;
    this.several = data.runs.length > 1;
    this.axis = "step";
    this.domain = null; // [from, to] in the unit of the axis; null shows all
    this.cursor = null;
    this.hidden = new Set(); // runs that are switched off
    this.charts = data.panels.map((panel) => new Chart(this, panel, data.looks));
    this.root = element("div", {}, this.toolbar(data.looks), element("div", { class: "charts" }, this.charts.map((chart) => chart.root)));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  toolbar(looks) {
    const button = (text, label, action) => element("button", { type: "button", "aria-label": label, onclick: action }, text);
    const axis = element("select", { "aria-label": "Horizontal axis", onchange: () => this.setAxis(axis.value) },
      element("option", { value: "step" }, "against steps"), element("option", { value: "epoch" }, "against epochs"));
    const toggles = this.runs.map((run, i) => legendButton(run.name, looks[i % looks.length], false, (on) => {
      this.hidden[on ? "delete" : "add"](run);
      this.draw();
    }));
    return element("div", {},
      element("div", { class: "toolbar" }, button("+", "Zoom in", () => this.zoom(0.5)), button("−", "Zoom out", () => this.zoom(2)),
        button("Reset zoom", "Reset zoom", () => this.show(null)), axis),
      this.several ? element("div", { class: "legend", role: "group", "aria-label": "Runs" }, toggles) : null,
      element("p", { class: "note" }, "Drag across a chart to zoom, or click it and use the wheel or + and −; ← and → read values, Esc or a double click shows all again."));
  }

  /** From a step to the unit of the axis. */
  x(run, step) { return this.axis === "step" ? step : step / (run.steps_per_epoch || 1); }
  step(run, x) { return this.axis === "step" ? x : x * (run.steps_per_epoch || 1); }

  get full() {
    let low = Infinity, high = -Infinity;
    for (const line of this.charts.flatMap((chart) => chart.lines)) {
      if (!line.steps.length || this.hidden.has(line.run)) continue;
      low = Math.min(low, this.x(line.run, line.steps[0]));
      high = Math.max(high, this.x(line.run, line.steps.at(-1)));
    }
    return low > high ? [0, 1] : low === high ? [low - 0.5, high + 0.5] : [low, high];
  }
  get shown() { return this.domain || this.full; }

  setAxis(axis) {
    Object.assign(this, { axis, domain: null, cursor: null });
    this.draw();
  }
  show(domain) {
    const [low, high] = this.full;
    if (domain) {
      const width = Math.max((high - low) / 5000, Math.min(domain[1] - domain[0], high - low));
      const from = Math.min(Math.max(domain[0], low), high - width);
      domain = width >= high - low ? null : [from, from + width];
    }
    this.domain = domain;
    this.draw();
  }
  /** Show `factor` times as much, leaving `around` where it is. */
  zoom(factor, around = this.cursor) {
    const [low, high] = this.shown;
    const centre = around ?? (low + high) / 2;
    this.show([centre - (centre - low) * factor, centre + (high - centre) * factor]);
  }
  pointAt(x) {
    this.cursor = x;
    for (const chart of this.charts) chart.drawCursor();
  }
  draw() {
    for (const chart of this.charts) chart.draw();
  }
}

class Chart {
  constructor(curves, panel, looks) {
    this.curves = curves;
    this.panel = panel;
    this.off = new Set(); // keys that are switched off
    this.text = panel.percent ? (value) => `${number(100 * value)}%` : number;
    const keys = Object.entries(panel.lines);
    this.lines = curves.runs.flatMap((run, i) => keys.map(([key, name], j) =>
      new Line(run, key, name, looks[(curves.several ? i : j) % looks.length], j > 0)));
    this.svg = drawn("svg", {
      tabindex: 0, role: "img", height: HEIGHT, onpointerdown: (e) => this.press(e), onpointermove: (e) => this.move(e),
      onpointerup: (e) => this.release(e), onpointercancel: () => this.cancel(), onpointerleave: () => this.leave(),
      onwheel: (e) => this.wheel(e), ondblclick: () => curves.show(null), onkeydown: (e) => this.key(e),
    });
    this.readout = element("p", { class: "readout" });
    const legend = keys.length > 1 ? element("div", { class: "legend", role: "group", "aria-label": `Lines of ${panel.title}` },
      keys.map(([key, name], j) => legendButton(name, curves.several ? ["currentColor", []] : looks[j], j > 0, (on) => {
        this.off[on ? "delete" : "add"](key);
        this.draw();
      }))) : null;
    this.root = element("section", { class: "chart", "aria-label": panel.title },
      element("h3", {}, panel.title, element("small", {}, panel.unit)), this.svg, this.readout, legend,
      panel.hint ? element("p", { class: "note" }, panel.hint) : null);
  }

  get visible() { return this.lines.filter((line) => line.steps.length && !this.off.has(line.key) && !this.curves.hidden.has(line.run)); }

  draw() {
    this.root.hidden = !this.lines.some((line) => line.steps.length);
    this.width = Math.max(120, this.svg.clientWidth || 320);
    const [low, high] = this.curves.shown;
    this.toPixel = (x) => MARGIN.left + ((x - low) / (high - low)) * (this.width - MARGIN.left - MARGIN.right);
    this.fromPixel = (pixel) => low + ((pixel - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right)) * (high - low);
    const parts = this.visible.map((line) => [line, this.points(line, low, high)]);
    const heights = parts.flatMap(([, points]) => points.map(([, y]) => y));
    let [bottom, top] = heights.length ? [extreme(heights, Math.min), extreme(heights, Math.max)] : [0, 1];
    const pad = (top - bottom) * 0.06 || Math.abs(top) * 0.1 || 1;
    [bottom, top] = [bottom - (bottom >= 0 ? Math.min(pad, bottom) : pad), top + pad];
    this.toHeight = (y) => HEIGHT - MARGIN.bottom - ((y - bottom) / (top - bottom)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    this.marks = drawn("g", {});
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren(drawn("title", {}, this.summary()), this.axes(low, high, bottom, top),
      drawn("svg", { x: MARGIN.left, y: 0, width: this.width - MARGIN.left - MARGIN.right, height: HEIGHT, viewBox: `${MARGIN.left} 0 ${this.width - MARGIN.left - MARGIN.right} ${HEIGHT}`, overflow: "hidden" },
        parts.map(([line, points]) => this.path(line, points))), this.marks);
    this.svg.setAttribute("aria-label", this.summary());
    this.drawCursor();
  }

  /** Points in view and one on each side; of many in a pixel's column only the lowest and the highest. */
  points(line, low, high) {
    const { run, steps, values } = line, { curves } = this;
    const first = Math.max(0, line.index(curves.step(run, low)) - 1);
    const last = Math.min(steps.length - 1, line.index(curves.step(run, high)) + 1);
    const all = [];
    for (let i = first; i <= last; i++) all.push([this.toPixel(curves.x(run, steps[i])), values[i]]);
    if (all.length <= 3 * this.width) return all;
    const columns = new Map();
    for (const point of all) {
      const column = Math.round(point[0]), held = columns.get(column);
      if (!held) columns.set(column, [point, point]);
      else if (point[1] < held[0][1]) held[0] = point;
      else if (point[1] > held[1][1]) held[1] = point;
    }
    return [...columns.values()].flatMap(([least, most]) => (least[0] <= most[0] ? [least, most] : [most, least]));
  }

  path(line, points) {
    const places = points.map(([x, y]) => `${x.toFixed(1)},${this.toHeight(y).toFixed(1)}`);
    const crowded = points.length > MOST_DOTS || (points.length > 1 && points.at(-1)[0] - points[0][0] < 6 * points.length);
    const dots = crowded ? [] : points.map(([x, y]) => drawn("circle", { cx: x, cy: this.toHeight(y), r: 2, fill: line.color }));
    return drawn("g", { class: "line", "data-key": line.key },
      drawn("path", { d: `M${places.join("L")}`, fill: "none", stroke: line.color, "stroke-width": line.thin ? 1.2 : 2, "stroke-dasharray": line.dashes.join(" ") || null, "stroke-linejoin": "round" }), dots);
  }

  axes(low, high, bottom, top) {
    const group = drawn("g", {});
    for (const y of ticks(bottom, top, 4)) {
      const height = this.toHeight(y);
      group.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: height, y2: height }),
        drawn("text", { x: MARGIN.left - 6, y: height + 4, "text-anchor": "end" }, Math.abs(y) >= 1e5 ? y.toExponential() : this.text(y)));
    }
    for (const x of ticks(low, high, Math.max(2, this.width / 100))) {
      group.append(drawn("text", { x: this.toPixel(x), y: HEIGHT - 7, "text-anchor": "middle" }, number(x)));
    }
    group.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: HEIGHT - MARGIN.bottom, y2: HEIGHT - MARGIN.bottom }));
    return group;
  }

  label(line) { return this.curves.several ? `${line.run.name}, ${line.name}` : line.name; }

  summary() {
    return `${this.panel.title}: ${this.visible.map((line) => `${this.label(line)} ${this.text(line.values.at(-1))}`).join("; ")} at the end`;
  }

  drawCursor() {
    if (!this.marks) return;
    this.marks.replaceChildren();
    const { curves } = this, x = curves.cursor;
    if (x === null) {
      this.readout.textContent = this.visible.length ? `Last: ${this.visible.map((line) => `${this.label(line)} ${this.text(line.values.at(-1))}`).join("; ")}` : "";
      return;
    }
    const pixel = this.toPixel(x);
    this.marks.append(drawn("line", { class: "cursor", x1: pixel, x2: pixel, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    const said = this.visible.map((line) => {
      const i = line.nearest(curves.step(line.run, x));
      const at = this.toPixel(curves.x(line.run, line.steps[i]));
      if (at >= MARGIN.left - 1 && at <= this.width - MARGIN.right + 1)
        this.marks.append(drawn("circle", { cx: at, cy: this.toHeight(line.values[i]), r: 3.5, fill: line.color, stroke: "var(--paper)" }));
      return [curves.x(line.run, line.steps[i]), `${this.label(line)} ${this.text(line.values[i])}`];
    });
    const where = `${curves.axis === "step" ? "Step" : "Epoch"} ${number(said.length ? said[0][0] : x)}`;
    this.readout.textContent = `${where}: ${said.map(([, text]) => text).join("; ")}`;
  }

  at(event) {
    const box = this.svg.getBoundingClientRect();
    return ((event.clientX - box.left) * this.width) / box.width;
  }
  press(event) {
    if (event.button || event.pointerType === "touch") return this.move(event); // a finger reads, and scrolls the page
    this.svg.setPointerCapture(event.pointerId);
    this.from = this.at(event);
  }
  move(event) {
    const pixel = this.at(event), [low, high] = this.curves.shown;
    this.curves.pointAt(Math.min(high, Math.max(low, this.fromPixel(pixel))));
    if (this.from === undefined) return;
    this.marks.append(drawn("rect", { class: "selection", x: Math.min(this.from, pixel), y: MARGIN.top, width: Math.abs(pixel - this.from), height: HEIGHT - MARGIN.top - MARGIN.bottom }));
  }
  release(event) {
    const from = this.from, to = this.at(event);
    this.from = undefined;
    if (from === undefined || Math.abs(to - from) < 6) return this.curves.pointAt(this.curves.cursor);
    this.curves.show([this.fromPixel(Math.min(from, to)), this.fromPixel(Math.max(from, to))]);
  }
  cancel() { this.from = undefined; }
  leave() {
    if (this.from === undefined && document.activeElement !== this.svg) this.curves.pointAt(null);
  }
  wheel(event) {
    if (document.activeElement !== this.svg && !event.ctrlKey) return; // else the page scrolls
    event.preventDefault();
    this.curves.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.fromPixel(this.at(event)));
  }
  key(event) {
    const { curves } = this, [low, high] = curves.shown, line = this.visible[0];
    const to = (i) => {
      const x = curves.x(line.run, line.steps[Math.min(line.steps.length - 1, Math.max(0, i))]);
      if (x < low || x > high) curves.show([x - (high - low) / 2, x + (high - low) / 2]);
      curves.pointAt(x);
      this.readout.setAttribute("aria-live", "polite");
    };
    const by = (count) => { // from the cursor, or else from the edge that is left behind
      if (curves.cursor !== null) to(line.nearest(curves.step(line.run, curves.cursor)) + count);
      else to(count > 0 ? line.index(curves.step(line.run, low)) : line.nearest(curves.step(line.run, high)));
    };
    const actions = {
      ArrowRight: () => by(event.shiftKey ? 10 : 1), ArrowLeft: () => by(event.shiftKey ? -10 : -1), Home: () => to(0), End: () => to(Infinity),
      "+": () => curves.zoom(0.5), "=": () => curves.zoom(0.5), "-": () => curves.zoom(2), 0: () => curves.show(null),
      Escape: () => { curves.pointAt(null); curves.show(null); },
    };
    if (!line || !actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }
}

function extreme(values, pick) {
  return values.reduce((a, b) => pick(a, b));
}

/** A piece of the line and its name, which switches it on and off. */
function legendButton(name, [color, dashes], thin, onchange) {
  const button = element("button", {
    type: "button", class: "line-button", "aria-pressed": "true", onclick: () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      onchange(on);
    },
  }, drawn("svg", { "aria-hidden": "true" }, drawn("line", { x1: 0, x2: 28, y1: 4, y2: 4, stroke: color, "stroke-width": thin ? 1.2 : 3, "stroke-dasharray": dashes.join(" ") || null })), name);
  return button;
}
