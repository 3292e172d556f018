// Step-through: the masked patches of an image, predicted one after the other in permutation order.

const CANVAS = 448; // pixels of the larger side

class StepThrough {
  constructor(data, root) {
    const picture = (src) => Object.assign(new Image(), { src }), find = (selector) => root.querySelector(selector);
    this.data = data;
    this.atlas = picture(data.atlas.src);
    this.tile = new Map(data.atlas.codes.map((code, i) => [code, i]));
    this.images = data.images.map((image) => ({ ...image, pixels: picture(image.src) }));
    this.given = data.grid[0] * data.grid[1] - data.hidden;
    this.count = data.hidden || this.images[0].order.length;
    this.canvas = Object.fromEntries([...root.querySelectorAll("canvas")].map((canvas) => [canvas.dataset.shows, canvas]));
    [this.slider, this.opacity, this.back, this.next, this.play] = ["slider", "opacity", "back", "next", "play"].map((name) => find(`[data-${name}]`));
    this.said = find(".said");
    on(root, "select", "change", (select) => this.select(select.value));
    on(root, "[data-slider]", "input", (slider) => this.go(Number(slider.value)));
    on(root, "[data-opacity]", "input", () => this.draw());
    on(root, "[data-back]", "click", () => this.go(this.at - 1));
    on(root, "[data-next]", "click", () => this.go(this.at + 1));
    on(root, "[data-play]", "click", () => this.playOrStop());
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
  playOrStop(go = !this.timer) {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = go ? "Stop" : "Play";
    if (!go) return;
    if (this.at === this.count) this.go(0);
    this.timer = setInterval(() => {
      this.go(this.at + 1);
      if (this.at === this.count) this.playOrStop(false);
    }, Math.max(40, Math.min(600, 12000 / this.count)));
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
    const soFar = predicted.slice(0, this.at).filter((token, i) => token === tokens[order[this.given + i]]).length;
    const verdict = right ? `right, with probability ${chance[rank]}` : `wrong: it is token ${tokens[patch]}, which got ${chance[rank]}`;
    return `${where}: token ${predicted[rank]} (probability ${sure[rank]}), ${verdict}. So far ${soFar} of ${this.at} right.`;
  }

  draw() {
    const { hidden, sees_targets, atlas } = this.data, { name, order, tokens, predicted } = this.image;
    const known = new Set(order.slice(0, hidden && !sees_targets ? this.given : this.given + Math.max(0, this.at - (hidden ? 1 : 0))));
    const now = this.at && hidden ? order[this.given + this.at - 1] : null;
    this.paint("image", `The image ${name}`, null, (box) => this.real(box));
    this.paint("seen", `${known.size} of ${order.length} patches of ${name} are seen`, now, (box) => known.has(box.patch) && this.real(box));
    if (hidden) {
      this.paint("predicted", `${this.at} predicted patches. ${this.said.textContent}`, now, (box) => {
        const rank = order.indexOf(box.patch) - this.given;
        if (rank < 0) this.real(box);
        else if (rank < this.at) this.token(predicted[rank], box);
      });
      this.paint("true", `True tokens of ${name}`, now, (box) => this.token(tokens[box.patch], box));
    }
    this.paint("tokens", `Visual tokens of ${name}`, null, (box) => {
      this.real(box);
      box.brush.globalAlpha = this.opacity.value / 100;
      box.brush.fillStyle = atlas.colors[this.tile.get(tokens[box.patch])];
      box.brush.fillRect(...box.place);
      box.brush.globalAlpha = 1;
    });
  }

  /** Every patch by `fill`; a frame around the one that is predicted now. */
  paint(shows, label, now, fill) {
    const canvas = this.canvas[shows], brush = canvas.getContext("2d"), [rows, columns] = this.data.grid, [height, width] = this.data.size;
    const scale = Math.max(1, Math.round(CANVAS / Math.max(height, width)));
    canvas.setAttribute("aria-label", label);
    [canvas.width, canvas.height] = [width * scale, height * scale];
    brush.imageSmoothingEnabled = false;
    const w = canvas.width / columns, h = canvas.height / rows;
    for (let patch = 0; patch < rows * columns; patch++) fill({ brush, patch, place: [(patch % columns) * w, Math.floor(patch / columns) * h, w, h] });
    if (now === null) return;
    brush.lineWidth = Math.max(3, canvas.width / 100);
    for (const [color, inset] of [["#ffffff", 0], ["#D55E00", brush.lineWidth / 2]]) {
      brush.strokeStyle = color;
      brush.strokeRect((now % columns) * w + inset, Math.floor(now / columns) * h + inset, w - 2 * inset, h - 2 * inset);
    }
  }
  /** The patch as it is. */
  real(box) {
    const { pixels } = this.image, [rows, columns] = this.data.grid;
    this.tileOf(pixels, box.patch, columns, pixels.naturalWidth / columns, pixels.naturalHeight / rows, box);
  }
  /** The mean patch of a token. */
  token(code, box) {
    const { atlas, grid, size } = this.data;
    this.tileOf(this.atlas, this.tile.get(code), atlas.columns, size[1] / grid[1], size[0] / grid[0], box);
  }
  /** Draw tile i of a picture with so many columns of w x h pixels. */
  tileOf(picture, i, columns, w, h, { brush, place }) {
    if (picture.naturalWidth) brush.drawImage(picture, (i % columns) * w, Math.floor(i / columns) * h, w, h, ...place);
  }
}
