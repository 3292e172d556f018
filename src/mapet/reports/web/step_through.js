// Step-through: the masked patches of an image, predicted one after the other in permutation order.

const CANVAS_SIDE = 448; // pixels of the larger side
const FRAME_COLORS = ["#ffffff", "#D55E00"]; // a white frame around an orange one is visible on any image

/** Canvases and controls that show the predictions of an image up to a step. */
class StepThrough {
  /**
   * data: what `step_through` of figures.py returns: grid ([rows, columns]), size ([height, width]), num_masked (number of masked patches, 0 if no
   *   tokens are predicted), attends_to_targets, attends_to_positions, images (order and tokens of patches, predicted, sure, chance, image data).
   * root: the element that holds the canvases (data-shows) and controls.
   */
  constructor(data, root) {
    const loadImage = (src) => Object.assign(new Image(), { src });
    Object.assign(this, { data, root, timer: null });
    this.images = data.images.map((image) => ({
      ...image, photo: loadImage(image.src), trueTokens: loadImage(image.true_src),
      tokenColors: loadImage(image.colors_src), predictedTokens: image.predicted_src && loadImage(image.predicted_src),
    }));
    this.numPatches = data.grid[0] * data.grid[1];
    this.numContext = data.num_masked ? this.numPatches - data.num_masked : 0;
    this.numSteps = data.num_masked || this.numPatches;
    for (const name of ["slider", "opacity", "back", "next", "play"]) this[name] = root.querySelector(`[data-${name}]`);
    this.sentence = root.querySelector(".sentence");
    this.slider.max = this.numSteps;
    on(root, "select", "change", (select) => this.select(select.value));
    on(root, "[data-slider]", "input", (slider) => this.go(Number(slider.value)));
    on(root, "[data-opacity]", "input", () => this.draw());
    on(root, "[data-back]", "click", () => this.go(this.step - 1));
    on(root, "[data-next]", "click", () => this.go(this.step + 1));
    on(root, "[data-play]", "click", () => (this.timer ? this.stop() : this.start()));
    root.addEventListener("keydown", (event) => this.handleKey(event));
    this.select(0);
    const loaded = this.images.flatMap((image) => Object.values(image)).filter((value) => value instanceof Image);
    for (const image of loaded) image.decode().then(() => this.draw(), () => {}); // a damaged image stays blank
  }

  /** Show the image of an index, before its first prediction. */
  select(index) {
    this.image = this.images[index];
    this.go(0);
  }

  /** Show the state after `step` predictions (limited to those there are). */
  go(step) {
    this.step = Math.min(this.numSteps, Math.max(0, step));
    this.slider.value = this.step;
    this.back.disabled = this.step === 0;
    this.next.disabled = this.step === this.numSteps;
    this.sentence.textContent = this.describe();
    this.slider.setAttribute("aria-valuetext", this.sentence.textContent);
    this.draw();
  }

  /** Play all steps in about 12 seconds, from the first one if the last one is shown. */
  start() {
    if (this.step === this.numSteps) this.go(0);
    this.play.textContent = "Stop";
    this.timer = setInterval(() => {
      this.go(this.step + 1);
      if (this.step === this.numSteps) this.stop();
    }, Math.max(40, Math.min(600, 12000 / this.numSteps)));
  }

  /** Stop playing. */
  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  /** Take a step with an arrow key, unless a control that uses the arrows itself has the focus. */
  handleKey(event) {
    const change = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!change || event.target.tagName === "SELECT" || event.target.type === "range") return;
    event.preventDefault();
    this.go(this.step + change);
  }

  /** Return a sentence about the newest prediction: its patch, its token, the true token, and the accuracy so far. */
  describe() {
    const { num_masked, grid, attends_to_positions } = this.data, { order, tokens, predicted, sure, chance } = this.image;
    if (!num_masked) return `Step ${this.step} of ${this.numSteps}: the order of the patches; this objective predicts no tokens.`;
    const positions = attends_to_positions ? ", all of their positions known from the start" : "";
    if (!this.step) return `${this.numContext} patches are given; ${num_masked} are to be predicted${positions}.`;
    const masked = order.slice(this.numContext), newest = this.step - 1, patch = masked[newest];
    const isRight = (token, i) => token === tokens[masked[i]];
    const numRight = predicted.slice(0, this.step).filter(isRight).length;
    const verdict = isRight(predicted[newest], newest) ? `right, with probability ${chance[newest]}`
      : `wrong: it is token ${tokens[patch]}, which got ${chance[newest]}`;
    return `Patch ${this.step} of ${num_masked} (row ${Math.floor(patch / grid[1]) + 1}, column ${(patch % grid[1]) + 1}): `
      + `token ${predicted[newest]} (probability ${sure[newest]}), ${verdict}. So far ${numRight} of ${this.step} right.`;
  }

  /** Draw all canvases for the current image, step and opacity. */
  draw() {
    const { num_masked, attends_to_targets } = this.data, { name, order, photo, trueTokens, predictedTokens, tokenColors } = this.image;
    const context = order.slice(0, this.numContext), predicted = order.slice(this.numContext, this.numContext + this.step);
    const newest = num_masked ? predicted.at(-1) : undefined;
    // a prediction attends to the true patches before it, if to any; without predictions the steps show the order
    const seen = !num_masked ? predicted : attends_to_targets ? [...context, ...predicted.slice(0, -1)] : context;
    this.paint("image", `The image ${name}`, [[photo, order]]);
    this.paint("seen", `${seen.length} of ${order.length} patches of ${name} are seen`, [[photo, seen]], newest);
    if (num_masked) {
      const label = `${this.step} predicted patches. ${this.sentence.textContent}`;
      this.paint("predicted", label, [[photo, context], [predictedTokens, predicted]], newest);
      this.paint("true", `True tokens of ${name}`, [[trueTokens, order]], newest);
    }
    this.paint("tokens", `Visual tokens of ${name}`, [[photo, order], [tokenColors, order, this.opacity.value / 100]]);
  }

  /**
   * Draw a canvas of the step-through.
   * shows: the canvas, by its data-shows; label: its text for screen readers.
   * layers: lists [image, indices of its patches that are drawn, opacity 0 to 1 (by default 1)], from the lowest.
   * framed: index of the patch that gets a frame, or undefined.
   */
  paint(shows, label, layers, framed) {
    const canvas = this.root.querySelector(`[data-shows=${shows}]`), brush = canvas.getContext("2d");
    const [rows, columns] = this.data.grid, [height, width] = this.data.size;
    const scale = Math.max(1, Math.round(CANVAS_SIDE / Math.max(height, width)));
    canvas.setAttribute("aria-label", label);
    [canvas.width, canvas.height] = [width * scale, height * scale]; // this clears it
    brush.imageSmoothingEnabled = false;
    const w = canvas.width / columns, h = canvas.height / rows;
    const corner = (patch, width, height) => [(patch % columns) * width, Math.floor(patch / columns) * height];
    for (const [image, patches, opacity = 1] of layers) {
      if (!image.naturalWidth) continue; // not decoded yet
      const sourceW = image.naturalWidth / columns, sourceH = image.naturalHeight / rows;
      brush.globalAlpha = opacity;
      for (const patch of patches) brush.drawImage(image, ...corner(patch, sourceW, sourceH), sourceW, sourceH, ...corner(patch, w, h), w, h);
    }
    if (framed === undefined) return;
    brush.lineWidth = Math.max(3, canvas.width / 100);
    const [x, y] = corner(framed, w, h);
    FRAME_COLORS.forEach((color, i) => {
      const inset = (i * brush.lineWidth) / 2;
      brush.strokeStyle = color;
      brush.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
    });
  }
}
