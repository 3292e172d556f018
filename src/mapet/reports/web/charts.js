// Line charts, drawn by uPlot: they share their x axis, zoom and cursor.

const HEIGHT = 210;

/** As many digits as tell. */
function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** Listen to controls; `action` gets the one that was used. */
function on(root, selector, event, action) {
  root.querySelectorAll(selector).forEach((control) => control.addEventListener(event, () => action(control)));
}

/** All charts of a page: the unit of the x axis, the part of it that is shown, the runs that are switched off. */
class Charts {
  constructor(root, data) {
    Object.assign(this, { runs: data.runs, axis: "step", log: false, domain: null, hidden: new Set(), charts: [] });
    const sections = [...root.querySelectorAll(".chart")];
    this.charts = data.charts.map((chart, i) => new Chart(this, chart, data.line_styles, sections[i]));
    on(root, "[data-zoom]", "click", (button) => this.zoom(Number(button.dataset.zoom)));
    on(root, "[data-axis]", "change", (select) => this.rebuild({ axis: select.value, domain: null }));
    on(root, "[data-log]", "change", (box) => this.rebuild({ log: box.checked }));
    on(root, "[data-run]", "change", (box) => {
      this.hidden[box.checked ? "delete" : "add"](this.runs[box.dataset.run]);
      this.toggled();
    });
    this.draw();
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resize())).observe(root);
  }

  /** From a step to the unit of the axis. */
  x(run, step) { return this.axis === "step" ? step : step / (run.steps_per_epoch || 1); }

  /** The range of all visible lines. */
  get full() {
    const ends = this.charts.flatMap((chart) => chart.visible).flatMap(({ run, steps }) => [this.x(run, steps[0]), this.x(run, steps.at(-1))]);
    const [low, high] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }
  get shown() { return this.domain || this.full; }

  show(domain) {
    const [low, high] = this.full;
    if (domain) {
      const width = Math.max((high - low) / 5000, domain[1] - domain[0]);
      const from = Math.min(Math.max(domain[0], low), high - width);
      domain = width >= high - low ? null : [from, from + width];
    }
    this.domain = domain;
    this.charts.forEach((chart) => chart.rescale());
  }
  /** Show `factor` times as much, leaving `center` where it is; a factor of 0 shows all. */
  zoom(factor, center = null) {
    const [low, high] = this.shown, middle = center ?? (low + high) / 2;
    this.show(factor ? [middle - (middle - low) * factor, middle + (high - middle) * factor] : null);
  }
  rebuild(changed) {
    Object.assign(this, changed);
    this.charts.forEach((chart) => chart.build());
    this.draw();
  }
  toggled() {
    this.charts.forEach((chart) => chart.toggle());
    this.show(this.domain);
  }
  draw() { this.charts.forEach((chart) => chart.draw()); }
  redraw() { this.charts.forEach((chart) => chart.plot.redraw(false)); }
}

class Chart {
  constructor(charts, spec, looks, root) {
    Object.assign(this, { charts, spec, root, off: new Set(), place: root.querySelector(".plot"), readout: root.querySelector(".readout") });
    this.text = spec.percent ? (value) => `${number(100 * value)}%` : number;
    const several = charts.runs.length > 1;
    this.lines = charts.runs.flatMap((run, i) => Object.entries(spec.lines).map(([key, name], j) => ({
      run, key, name: several ? `${run.name}, ${name}` : name, look: looks[(several ? i : j) % looks.length], thin: j > 0,
      get steps() { return run.curves[key]?.[0] ?? []; }, // the run's own arrays, which a live run appends to
      get values() { return run.curves[key]?.[1] ?? []; },
    })));
    on(root, "[data-key]", "change", (box) => {
      this.off[box.checked ? "delete" : "add"](box.dataset.key);
      charts.toggled();
    });
    this.place.addEventListener("keydown", (event) => this.key(event));
    this.place.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.build();
  }

  get visible() { return this.lines.filter((line) => line.steps.length && this.shows(line)); }
  shows(line) { return !this.off.has(line.key) && !this.charts.hidden.has(line.run); }

  build() {
    this.plot?.destroy();
    const style = getComputedStyle(this.root), ink = () => style.color, grid = { stroke: () => style.borderTopColor, width: 1 };
    const axis = { stroke: ink, grid, ticks: grid, font: "11px system-ui, sans-serif" };
    const positive = this.lines.every((line) => line.values.every((value) => value > 0));
    const toText = (format) => (plot, splits) => splits.map((value) => (value === null ? "" : format(value)));
    this.plot = new uPlot({
      width: this.width, height: HEIGHT, legend: { show: false }, padding: [10, 20, 0, 0],
      scales: { x: { time: false, range: () => this.charts.shown }, y: { distr: this.charts.log && positive ? 3 : 1 } },
      axes: [{ ...axis, values: toText(number), size: 26 }, { ...axis, values: toText(this.text), size: 56 }],
      series: [{}, ...this.lines.map(({ look: [stroke, dash], thin }) => ({ stroke, dash, width: thin ? 1.2 : 2 }))],
      cursor: {
        y: false, drag: { dist: 6, setScale: false }, hover: { skip: [undefined, null] }, bind: { dblclick: () => () => this.charts.show(null) },
        sync: { key: "charts", setSeries: false, scales: ["x", null], filters: { pub: (type) => ["mousemove", "mouseleave"].includes(type) } },
      },
      hooks: { setCursor: [() => this.read()], setSelect: [() => this.select()] },
    }, [[]], this.place);
    this.toggle();
  }

  get width() { return Math.max(120, this.place.clientWidth || 320); }
  resize() {
    if (this.plot.width !== this.width) this.plot.setSize({ width: this.width, height: HEIGHT });
  }
  /** Take up what the lines hold now; the zoom stays. */
  draw() {
    this.root.hidden = !this.lines.some((line) => line.steps.length);
    this.plot.setData(uPlot.join(this.lines.map(({ run, steps, values }) => [steps.map((step) => this.charts.x(run, step)), values])));
    this.read();
  }
  rescale() {
    const [min, max] = this.charts.shown;
    this.plot.setScale("x", { min, max });
    this.read();
  }
  toggle() {
    this.plot.batch(() => this.lines.forEach((line, i) => this.plot.setSeries(i + 1, { show: this.shows(line) })));
  }

  /** Say the values under the cursor, else the last ones. */
  read() {
    const { data, cursor } = this.plot, at = cursor.left >= 0 && cursor.idx !== null ? cursor.idxs : [];
    const values = this.lines.map((line, i) => (at[i + 1] == null ? line.values.at(-1) : data[i + 1][at[i + 1]]));
    const said = this.visible.map((line) => `${line.name} ${this.text(values[this.lines.indexOf(line)])}`).join("; ");
    const unit = this.charts.axis, [low, high] = this.charts.shown.map(number);
    const where = at.length ? `${unit[0].toUpperCase()}${unit.slice(1)} ${number(data[0][at[this.lines.indexOf(this.visible[0]) + 1] ?? cursor.idx])}` : "Last";
    this.readout.textContent = said && `${where}: ${said}`;
    this.place.setAttribute("aria-label", `${this.spec.title}, ${unit}s ${low} to ${high}. ${this.readout.textContent}`);
  }
  select() {
    const { left, width } = this.plot.select;
    if (!width) return;
    this.plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.charts.show([this.plot.posToVal(left, "x"), this.plot.posToVal(left + width, "x")]);
  }
  wheel(event) {
    if (document.activeElement !== this.place && !event.ctrlKey) return; // else the page scrolls
    event.preventDefault();
    this.charts.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.plot.posToVal(event.clientX - this.plot.over.getBoundingClientRect().left, "x"));
  }
  key(event) {
    const { charts } = this, by = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowRight: () => this.move(by), ArrowLeft: () => this.move(-by), Home: () => this.move(-Infinity), End: () => this.move(Infinity),
      "+": () => charts.zoom(0.5), "=": () => charts.zoom(0.5), "-": () => charts.zoom(2), 0: () => charts.show(null),
      Escape: () => { this.plot.setCursor({ left: -10, top: -10 }); charts.show(null); },
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }
  /** Move the cursor by so many points, from where it is or from the edge that is left behind. */
  move(count) {
    const xs = this.plot.data[0], [low, high] = this.charts.shown, { left, idx } = this.plot.cursor;
    const from = left >= 0 && idx !== null ? idx + count : count > 0 ? xs.findIndex((x) => x >= low) : xs.findLastIndex((x) => x <= high);
    const x = xs[Math.min(xs.length - 1, Math.max(0, Number.isFinite(count) ? from : count))];
    if (x === undefined) return;
    if (x < low || x > high) this.charts.show([x - (high - low) / 2, x + (high - low) / 2]);
    this.plot.setCursor({ left: this.plot.valToPos(x, "x"), top: HEIGHT / 2 }, true, true);
    this.readout.setAttribute("aria-live", "polite");
  }
}
