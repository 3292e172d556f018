// Step-through: the hidden patches of an image, predicted one after the other in permutation order.

const CANVAS = 448; // pixels of the larger side

class Steps {
  constructor(data) {
    this.data = data;
    this.atlas = picture(data.atlas.src);
    this.tile = new Map(data.atlas.codes.map((code, i) => [code, i]));
    this.images = data.images.map((image) => ({ ...image, pixels: picture(image.src) }));
    this.given = data.grid[0] * data.grid[1] - data.hidden;
    this.count = data.hidden || this.images[0].order.length;
    this.build();
    this.select(0);
    for (const one of [this.atlas, ...this.images.map((image) => image.pixels)]) one.decode().then(() => this.draw(), () => {});
  }

  build() {
    const { hidden, sees_targets } = this.data;
    const panel = (name, caption) => {
      const canvas = element("canvas", { role: "img" });
      this[name] = canvas;
      return element("figure", {}, element("figcaption", {}, caption), canvas);
    };
    this.chooser = element("select", { "aria-label": "Image", onchange: () => this.select(Number(this.chooser.value)) },
      this.images.map((image, i) => element("option", { value: i }, `${i + 1}: ${image.name}`)));
    this.slider = element("input", { type: "range", min: 0, max: this.count, value: 0, "aria-label": "Patches predicted", oninput: () => this.go(Number(this.slider.value)) });
    this.opacity = element("input", { type: "range", min: 0, max: 100, value: 55, "aria-label": "Strength of the words' colours", oninput: () => this.draw() });
    const button = (text, label, action) => element("button", { type: "button", "aria-label": label, onclick: action }, text);
    this.back = button("◀", "One patch back", () => this.go(this.at - 1));
    this.next = button("▶", "One patch on", () => this.go(this.at + 1));
    this.play = button("Play", "Play all steps", () => this.toggle());
    this.said = element("p", { class: "said", "aria-live": "polite" });
    this.root = element("div", { onkeydown: (event) => this.key(event) },
      element("div", { class: "toolbar" }, this.chooser, this.back, this.slider, this.next, this.play), this.said,
      element("div", { class: "steps" }, panel("whole", "The image"),
        panel("seen", sees_targets ? "Given: the context, then each true patch after its turn" : "Given: the context; all others are predicted at once"),
        hidden ? panel("guessed", "Predicted: the likeliest words, as mean patches") : null,
        hidden ? panel("true", "The true words, as mean patches") : null,
        panel("words", "Visual words over the image, a colour each")),
      element("div", { class: "toolbar" }, element("label", {}, "Strength of the words' colours ", this.opacity)));
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
    if (by) {
      event.preventDefault();
      this.go(this.at + by);
    }
  }

  sentence() {
    const { hidden, grid, sees_positions } = this.data, { order, tokens, predicted, sure, chance } = this.image;
    if (!hidden) return `Step ${this.at} of ${this.count}: the order of the patches; what is predicted are no words.`;
    if (!this.at) return `${this.given} patches are given; ${hidden} are to be predicted${sees_positions ? ", all of their positions known from the start" : ""}.`;
    const rank = this.at - 1, patch = order[this.given + rank], right = tokens[patch] === predicted[rank];
    const where = `Patch ${this.at} of ${hidden} (row ${Math.floor(patch / grid[1]) + 1}, column ${(patch % grid[1]) + 1})`;
    const so_far = predicted.slice(0, this.at).filter((word, i) => word === tokens[order[this.given + i]]).length;
    const verdict = right ? `right, with probability ${chance[rank]}` : `wrong: it is word ${tokens[patch]}, which got ${chance[rank]}`;
    return `${where}: word ${predicted[rank]} (probability ${sure[rank]}), ${verdict}. So far ${so_far} of ${this.at} right.`;
  }

  draw() {
    const { hidden, sees_targets, atlas } = this.data, { order, tokens, predicted } = this.image;
    const known = new Set(order.slice(0, hidden && !sees_targets ? this.given : this.given + Math.max(0, this.at - (hidden ? 1 : 0))));
    const now = this.at && hidden ? order[this.given + this.at - 1] : null;
    const done = new Map(order.slice(this.given, this.given + this.at).map((patch, rank) => [patch, rank]));
    this.paint(this.seen, now, (patch, box) => known.has(patch) && this.real(patch, box));
    if (hidden) {
      this.paint(this.guessed, now, (patch, box) => done.has(patch) ? this.word(predicted[done.get(patch)], box) : order.indexOf(patch) < this.given && this.real(patch, box));
      this.paint(this.true, now, (patch, box) => this.word(tokens[patch], box));
    }
    this.paint(this.words, null, (patch, box) => {
      this.real(patch, box);
      box.brush.globalAlpha = this.opacity.value / 100;
      box.brush.fillStyle = atlas.colors[this.tile.get(tokens[patch])];
      box.brush.fillRect(box.x, box.y, box.width, box.height);
      box.brush.globalAlpha = 1;
    });
    this.paint(this.whole, null, (patch, box) => this.real(patch, box));
    this.whole.setAttribute("aria-label", `The image ${this.image.name}`);
    this.seen.setAttribute("aria-label", `${known.size} of ${order.length} patches of ${this.image.name} are seen`);
    this.words.setAttribute("aria-label", `Visual words of ${this.image.name}`);
    if (hidden) this.guessed.setAttribute("aria-label", `${this.at} predicted patches. ${this.said.textContent}`);
    if (hidden) this.true.setAttribute("aria-label", `True words of ${this.image.name}`);
  }

  /** Every patch by `fill(patch, box)`; a frame around the one that is predicted now. */
  paint(canvas, now, fill) {
    const [rows, columns] = this.data.grid, [height, width] = this.data.size;
    const scale = Math.max(1, Math.round(CANVAS / Math.max(height, width)));
    canvas.width = width * scale;
    canvas.height = height * scale;
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = false;
    const box = { brush, width: canvas.width / columns, height: canvas.height / rows };
    for (let patch = 0; patch < rows * columns; patch++) {
      Object.assign(box, { row: Math.floor(patch / columns), column: patch % columns });
      Object.assign(box, { x: box.column * box.width, y: box.row * box.height });
      fill(patch, box);
    }
    if (now === null) return;
    brush.lineWidth = Math.max(3, canvas.width / 100);
    for (const [color, inset] of [["#ffffff", 0], ["#D55E00", brush.lineWidth / 2]]) {
      brush.strokeStyle = color;
      brush.strokeRect((now % columns) * box.width + inset, Math.floor(now / columns) * box.height + inset, box.width - 2 * inset, box.height - 2 * inset);
    }
  }

  real(patch, { brush, row, column, x, y, width, height }) {
    const { pixels } = this.image, [rows, columns] = this.data.grid;
    const w = pixels.naturalWidth / columns, h = pixels.naturalHeight / rows;
    if (w) brush.drawImage(pixels, column * w, row * h, w, h, x, y, width, height);
  }
  word(code, { brush, x, y, width, height }) {
    const { atlas, grid, size } = this.data, i = this.tile.get(code), h = size[0] / grid[0], w = size[1] / grid[1];
    if (this.atlas.naturalWidth) brush.drawImage(this.atlas, (i % atlas.columns) * w, Math.floor(i / atlas.columns) * h, w, h, x, y, width, height);
  }
}

function picture(source) {
  const image = new Image();
  image.src = source;
  return image;
}
