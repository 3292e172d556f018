// Line charts, drawn by uPlot: they share their x axis, zoom and cursor.

const HEIGHT = 210; // pixels of a chart
const MAX_ZOOM = 5000; // the narrowest range is this fraction of the whole

/** Return a number with four significant digits, or as an integer from 1,000 on; very small and large ones with an exponent. */
function formatNumber(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** Call `action` with each control of `root` that matches `selector` when it has an event. */
function on(root, selector, event, action) {
  root.querySelectorAll(selector).forEach((control) => control.addEventListener(event, () => action(control)));
}

/**
 * All charts of a page.
 * axis: "step" or "epoch"; log: whether y axes are logarithmic, where all values are positive.
 * domain: the range of x that is shown, [low, high], or null for all of it.
 */
class Charts {
  /**
   * root: the section that holds the elements .chart and their controls.
   * data: runs (name, steps_per_epoch, curves: metric -> [steps, values]), charts (see Chart) and line_styles ([color, dashes]).
   */
  constructor(root, data) {
    Object.assign(this, { root, runs: data.runs, axis: "step", log: false, domain: null, charts: [] });
    const elements = [...root.querySelectorAll(".chart")];
    this.charts = data.charts.map((spec, i) => new Chart(this, spec, data.line_styles, elements[i]));
    on(root, "[data-zoom]", "click", (button) => this.zoom(Number(button.dataset.zoom)));
    on(root, "[data-axis]", "change", (select) => this.rebuild({ axis: select.value, domain: null }));
    on(root, "[data-log]", "change", (box) => this.rebuild({ log: box.checked }));
    on(root, "[data-run], [data-key]", "change", () => this.show(this.domain));
    this.draw();
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resize())).observe(root);
  }

  /** Return the x of a run's step: the step, or the epoch. */
  toX(run, step) { return this.axis === "step" ? step : step / (run.steps_per_epoch || 1); }

  /** [low, high]: the range of x of all visible lines; half a unit around a single x; [0, 1] without lines. */
  get full() {
    const lines = this.charts.flatMap((chart) => chart.visible);
    const ends = lines.flatMap(({ run, steps }) => [this.toX(run, steps[0]), this.toX(run, steps.at(-1))]);
    const [low, high] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  /** The range of x that is shown. */
  get shown() { return this.domain || this.full; }

  /** Show a range of x, moved and clipped into the whole one; null shows all. */
  show(domain) {
    const [low, high] = this.full;
    if (domain) {
      const width = Math.max((high - low) / MAX_ZOOM, domain[1] - domain[0]);
      const start = Math.min(Math.max(domain[0], low), high - width);
      domain = width < high - low ? [start, start + width] : null;
    }
    this.domain = domain;
    this.draw();
  }

  /** Show `factor` times as much, with `center` (by default the middle) staying where it is; a factor of 0 shows all. */
  zoom(factor, center) {
    const [low, high] = this.shown, fixed = center ?? (low + high) / 2;
    this.show(factor ? [fixed - (fixed - low) * factor, fixed + (high - fixed) * factor] : null);
  }

  /** Rebuild all charts with other axes; `changes` are attributes of this object. */
  rebuild(changes) {
    Object.assign(this, changes);
    this.charts.forEach((chart) => chart.build());
    this.draw();
  }

  /** Draw what the runs hold now. */
  draw() { this.charts.forEach((chart) => chart.draw()); }

  /** Draw the same in new colors. */
  recolor() { this.charts.forEach((chart) => chart.plot.redraw(false)); }
}

/** One chart: a plot, and the text below it with the values at the cursor. */
class Chart {
  /**
   * charts: the Charts that it belongs to; element: its section .chart, with .plot and .readout.
   * spec: title, lines (metric -> name) and percent (whether values are fractions) of the chart, see run_texts.html.
   * lineStyles: [color, dashes] of each line.
   */
  constructor(charts, spec, lineStyles, element) {
    Object.assign(this, { charts, spec, element, plotElement: element.querySelector(".plot"), readout: element.querySelector(".readout") });
    this.format = spec.percent ? (value) => `${formatNumber(100 * value)}%` : formatNumber;
    const isComparison = charts.runs.length > 1;
    this.lines = charts.runs.flatMap((run, runIndex) => Object.entries(spec.lines).map(([metric, name], i) => ({
      run,
      name: isComparison ? `${run.name}, ${name}` : name,
      style: lineStyles[(isComparison ? runIndex : i) % lineStyles.length],
      width: i > 0 ? 1.2 : 2, // baselines are thinner
      boxes: [charts.root.querySelector(`[data-run="${runIndex}"]`), element.querySelector(`[data-key="${metric}"]`)].filter(Boolean),
      get steps() { return run.curves[metric]?.[0] ?? []; }, // a live page replaces the curves
      get values() { return run.curves[metric]?.[1] ?? []; },
      get isChecked() { return this.boxes.every((box) => box.checked); },
    })));
    this.plotElement.addEventListener("keydown", (event) => this.handleKey(event));
    this.plotElement.addEventListener("wheel", (event) => this.handleWheel(event), { passive: false });
    this.build();
  }

  /** The lines that have values and are not switched off. */
  get visible() { return this.lines.filter((line) => line.steps.length && line.isChecked); }

  /** Width of the plot, pixels: at least 120; 320 while the element is hidden. */
  get width() { return Math.max(120, this.plotElement.clientWidth || 320); }

  /**
   * Replace the uPlot plot by a new one without data, for the axes chosen now; draw() fills it.
   * The y axis is logarithmic if that is switched on and all values are above 0.
   */
  build() {
    this.plot?.destroy();
    const css = getComputedStyle(this.element), grid = { stroke: () => css.borderTopColor, width: 1 };
    const axis = (format, size) => ({
      size, grid, ticks: grid, stroke: () => css.color, font: "11px system-ui, sans-serif",
      values: (plot, splits) => splits.map((value) => (value === null ? "" : format(value))),
    });
    const isPositive = this.lines.every((line) => line.values.every((value) => value > 0));
    this.plot = new uPlot({
      width: this.width, height: HEIGHT, legend: { show: false }, padding: [10, 20, 0, 0],
      scales: { x: { time: false, range: () => this.charts.shown }, y: { distr: this.charts.log && isPositive ? 3 : 1 } }, // 3: logarithmic
      axes: [axis(formatNumber, 26), axis(this.format, 56)],
      series: [{}, ...this.lines.map(({ style: [stroke, dash], width }) => ({ stroke, dash, width }))],
      cursor: {
        y: false, drag: { dist: 6, setScale: false }, hover: { skip: [undefined, null] }, bind: { dblclick: () => () => this.charts.show(null) },
        sync: { key: "charts", setSeries: false, scales: ["x", null], filters: { pub: (type) => ["mousemove", "mouseleave"].includes(type) } },
      },
      hooks: { setCursor: [() => this.read()], setSelect: [() => this.zoomToSelection()] },
    }, [[]], this.plotElement);
  }

  /** Fit the plot to the width of its element; the page calls it when its size changes. */
  resize() {
    if (this.plot.width !== this.width) this.plot.setSize({ width: this.width, height: HEIGHT });
  }

  /** Draw the lines that are switched on, in the range that is shown; a chart without values is hidden. */
  draw() {
    this.element.hidden = !this.lines.some((line) => line.steps.length);
    const data = this.lines.map(({ run, steps, values }) => [steps.map((step) => this.charts.toX(run, step)), values]);
    this.plot.batch(() => {
      this.plot.setData(uPlot.join(data));
      this.lines.forEach((line, i) => this.plot.setSeries(i + 1, { show: line.isChecked }));
    });
    this.read();
  }

  /** Write the values at the cursor, or the last ones, below the chart, and describe the chart to screen readers. */
  read() {
    const { data, cursor } = this.plot, isHovered = cursor.left >= 0 && cursor.idx !== null;
    const indexOf = (line) => (isHovered ? cursor.idxs[this.lines.indexOf(line) + 1] : null);
    const texts = this.visible.map((line) => {
      const index = indexOf(line) ?? null; // null: its value nearest to the cursor is far away
      return `${line.name} ${this.format(index === null ? line.values.at(-1) : data[this.lines.indexOf(line) + 1][index])}`;
    });
    const unit = this.charts.axis, [low, high] = this.charts.shown.map(formatNumber);
    const place = isHovered ? `${unit[0].toUpperCase()}${unit.slice(1)} ${formatNumber(data[0][indexOf(this.visible[0]) ?? cursor.idx])}` : "Last";
    this.readout.textContent = texts.length ? `${place}: ${texts.join("; ")}` : "";
    this.plotElement.setAttribute("aria-label", `${this.spec.title}, ${unit}s ${low} to ${high}. ${this.readout.textContent}`);
  }

  /** Zoom to the range that was dragged over. */
  zoomToSelection() {
    const { left, width } = this.plot.select;
    if (!width) return;
    this.plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.charts.show([this.plot.posToVal(left, "x"), this.plot.posToVal(left + width, "x")]);
  }

  /** Zoom around the pointer, if the chart has the focus or Ctrl is held; else the page scrolls. */
  handleWheel(event) {
    if (document.activeElement !== this.plotElement && !event.ctrlKey) return;
    event.preventDefault();
    const left = event.clientX - this.plot.over.getBoundingClientRect().left;
    this.charts.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.plot.posToVal(left, "x"));
  }

  /** Move the cursor with the arrows (ten points with Shift), Home and End; zoom with + and -; show all with 0 or Escape. */
  handleKey(event) {
    const { charts } = this, count = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowRight: () => this.moveCursor(count), ArrowLeft: () => this.moveCursor(-count),
      Home: () => this.moveCursor(-Infinity), End: () => this.moveCursor(Infinity),
      "+": () => charts.zoom(0.5), "=": () => charts.zoom(0.5), "-": () => charts.zoom(2), 0: () => charts.show(null),
      Escape: () => { this.plot.setCursor({ left: -10, top: -10 }); charts.show(null); }, // outside: no cursor
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  /** Move the cursor by `count` points (Infinity: to the end); without a cursor it starts at the edge of what is shown. */
  moveCursor(count) {
    const xs = this.plot.data[0], [low, high] = this.charts.shown, { left, idx } = this.plot.cursor;
    const start = count > 0 ? xs.findIndex((x) => x >= low) : xs.findLastIndex((x) => x <= high);
    const target = Math.abs(count) < Infinity && !(left >= 0 && idx !== null) ? start : (idx ?? 0) + count;
    const x = xs[Math.min(xs.length - 1, Math.max(0, target))];
    if (x === undefined) return; // no points
    if (x < low || x > high) this.charts.show([x - (high - low) / 2, x + (high - low) / 2]);
    this.plot.setCursor({ left: this.plot.valToPos(x, "x"), top: HEIGHT / 2 }, true, true);
    this.readout.setAttribute("aria-live", "polite");
  }
}
