// Step-through: the masked patches of an image, predicted one after the other in permutation order.

const CANVAS = 448; // pixels of the larger side

class StepThrough {
  constructor(data, root) {
    Object.assign(this, { data, root });
    this.atlas = picture(data.atlas.src);
    this.tile = new Map(data.atlas.codes.map((code, i) => [code, i]));
    this.images = data.images.map((image) => ({ ...image, pixels: picture(image.src) }));
    this.given = data.grid[0] * data.grid[1] - data.hidden;
    this.count = data.hidden || this.images[0].order.length;
    this.canvas = Object.fromEntries([...root.querySelectorAll("canvas")].map((canvas) => [canvas.dataset.shows, canvas]));
    const find = (selector, event, action) => {
      const control = root.querySelector(selector);
      control.addEventListener(event, () => action(control));
      return control;
    };
    find("select", "change", (select) => this.select(select.value));
    this.slider = find("[data-slider]", "input", (slider) => this.go(Number(slider.value)));
    this.opacity = find("[data-opacity]", "input", () => this.draw());
    this.back = find("[data-back]", "click", () => this.go(this.at - 1));
    this.next = find("[data-next]", "click", () => this.go(this.at + 1));
    this.play = find("[data-play]", "click", () => this.toggle());
    this.said = root.querySelector(".said");
    root.addEventListener("keydown", (event) => this.key(event));
    this.slider.max = this.count;
    this.select(0);
    for (const one of [this.atlas, ...this.images.map((image) => image.pixels)]) one.decode().then(() => this.draw(), () => {});
  }

  select(number) {
    this.image = this.images[number];
    this.go(0);
  }

  go(step) {
    this.at = Math.min(this.count, Math.max(0, step));
    this.slider.value = this.at;
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === this.count;
    this.said.textContent = this.sentence();
    this.slider.setAttribute("aria-valuetext", this.said.textContent);
    this.draw();
  }

  /** Play all steps, or stop. */
  toggle() {
    if (this.timer) return this.stop();
    if (this.at === this.count) this.go(0);
    this.play.textContent = "Stop";
    this.timer = setInterval(() => {
      this.go(this.at + 1);
      if (this.at === this.count) this.stop();
    }, Math.max(40, Math.min(600, 12000 / this.count)));
  }
  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  key(event) {
    if (event.target.tagName === "SELECT" || event.target.type === "range") return; // they use the arrows themselves
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    this.go(this.at + by);
  }

  sentence() {
    const { hidden, grid, sees_positions } = this.data, { order, tokens, predicted, sure, chance } = this.image;
    if (!hidden) return `Step ${this.at} of ${this.count}: the order of the patches; this objective predicts no tokens.`;
    if (!this.at) return `${this.given} patches are given; ${hidden} are to be predicted${sees_positions ? ", all of their positions known from the start" : ""}.`;
    const rank = this.at - 1, patch = order[this.given + rank], right = tokens[patch] === predicted[rank];
    const where = `Patch ${this.at} of ${hidden} (row ${Math.floor(patch / grid[1]) + 1}, column ${(patch % grid[1]) + 1})`;
    const so_far = predicted.slice(0, this.at).filter((token, i) => token === tokens[order[this.given + i]]).length;
    const verdict = right ? `right, with probability ${chance[rank]}` : `wrong: it is token ${tokens[patch]}, which got ${chance[rank]}`;
    return `${where}: token ${predicted[rank]} (probability ${sure[rank]}), ${verdict}. So far ${so_far} of ${this.at} right.`;
  }

  draw() {
    const { hidden, sees_targets, atlas } = this.data, { name, order, tokens, predicted } = this.image;
    const known = new Set(order.slice(0, hidden && !sees_targets ? this.given : this.given + Math.max(0, this.at - (hidden ? 1 : 0))));
    const now = this.at && hidden ? order[this.given + this.at - 1] : null;
    const done = new Map(order.slice(this.given, this.given + this.at).map((patch, rank) => [patch, rank]));
    const paint = (shows, label, now, fill) => this.paint(this.canvas[shows], label, now, fill);
    paint("image", `The image ${name}`, null, (patch, box) => this.real(patch, box));
    paint("seen", `${known.size} of ${order.length} patches of ${name} are seen`, now, (patch, box) => known.has(patch) && this.real(patch, box));
    if (hidden) {
      paint("predicted", `${this.at} predicted patches. ${this.said.textContent}`, now, (patch, box) =>
        done.has(patch) ? this.token(predicted[done.get(patch)], box) : order.indexOf(patch) < this.given && this.real(patch, box));
      paint("true", `True tokens of ${name}`, now, (patch, box) => this.token(tokens[patch], box));
    }
    paint("tokens", `Visual tokens of ${name}`, null, (patch, box) => {
      this.real(patch, box);
      box.brush.globalAlpha = this.opacity.value / 100;
      box.brush.fillStyle = atlas.colors[this.tile.get(tokens[patch])];
      box.brush.fillRect(box.x, box.y, box.width, box.height);
      box.brush.globalAlpha = 1;
    });
  }

  /** Every patch by `fill(patch, box)`; a frame around the one that is predicted now. */
  paint(canvas, label, now, fill) {
    canvas.setAttribute("aria-label", label);
    const [rows, columns] = this.data.grid, [height, width] = this.data.size;
    const scale = Math.max(1, Math.round(CANVAS / Math.max(height, width)));
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = false;
    const w = canvas.width / columns, h = canvas.height / rows;
    const place = (patch) => ({ row: Math.floor(patch / columns), column: patch % columns });
    for (let patch = 0; patch < rows * columns; patch++) {
      const { row, column } = place(patch);
      fill(patch, { brush, row, column, x: column * w, y: row * h, width: w, height: h });
    }
    if (now === null) return;
    const { row, column } = place(now);
    brush.lineWidth = Math.max(3, canvas.width / 100);
    for (const [color, inset] of [["#ffffff", 0], ["#D55E00", brush.lineWidth / 2]]) {
      brush.strokeStyle = color;
      brush.strokeRect(column * w + inset, row * h + inset, w - 2 * inset, h - 2 * inset);
    }
  }

  real(patch, { brush, row, column, x, y, width, height }) {
    const { pixels } = this.image, [rows, columns] = this.data.grid;
    const w = pixels.naturalWidth / columns, h = pixels.naturalHeight / rows;
    if (w) brush.drawImage(pixels, column * w, row * h, w, h, x, y, width, height);
  }
  token(code, { brush, x, y, width, height }) {
    const { atlas, grid, size } = this.data, i = this.tile.get(code), h = size[0] / grid[0], w = size[1] / grid[1];
    if (this.atlas.naturalWidth) brush.drawImage(this.atlas, (i % atlas.columns) * w, Math.floor(i / atlas.columns) * h, w, h, x, y, width, height);
  }
}

function picture(source) {
  const image = new Image();
  image.src = source;
  return image;
}
