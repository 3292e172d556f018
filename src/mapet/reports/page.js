// The page: sections of one run, or of several side by side, from the data that the report holds.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function section(id, title, ...content) {
  const shown = content.flat(Infinity).filter((part) => part !== null);
  return shown.length ? element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), shown) : null;
}

function warned(text) {
  return element("li", {}, marked(`⚠ ${text}${/[.?!]$/.test(text) ? "" : "."}`));
}

function warningList(run) {
  const well = run.early ? "Too few figures yet to say how this run goes." : "Nothing in the figures speaks against this run.";
  return element("div", {},
    run.warnings.length ? element("ul", { class: "warnings" }, run.warnings.map(warned)) : element("p", { class: run.early ? "note" : "fine" }, well),
    run.unjudged ? element("p", { class: "note" }, marked(run.unjudged)) : null);
}

function logged(run) {
  if (!run.log.length) return null;
  const which = run.logged > run.log.length ? `the last ${run.log.length} of ${run.logged}` : run.logged;
  return element("details", {}, element("summary", {}, `Warnings of train.log (${which})`), element("ul", {}, run.log.map((line) => element("li", {}, line))));
}

function recipe(run) {
  const rows = Object.entries(run.recipe);
  return rows.length ? element("details", {}, element("summary", {}, `The whole recipe, as resolved (${rows.length} options)`), table(`Recipe of ${run.name}`, null, rows)) : null;
}

function tokenizer(run) {
  if (!run.tokenizer.length) return null;
  const { warnings, figures } = run.health;
  return [facts(run.tokenizer), warnings.length ? element("ul", { class: "warnings" }, warnings.map(warned)) : null,
    figures.length ? element("details", {}, element("summary", {}, "Measures of `inspect --tokenizer`"), table("Health of the words", null, figures)) : null];
}

function stepThrough(run) {
  if (!run.steps || !run.steps.images.length) return null;
  return new Steps(run.steps).root;
}

function pictures(run) {
  return !run.pictures.length ? null : element("div", { class: "pictures" }, run.pictures.map((one) => {
    const image = element("img", { src: one.src, alt: one.caption, width: one.width, height: one.height });
    const button = element("button", { type: "button", "aria-pressed": "false", "aria-label": `${one.title}: show at full size`, onclick: () => {
      const large = button.classList.toggle("large");
      button.setAttribute("aria-pressed", String(large));
    } }, image);
    return element("figure", { class: "picture" }, element("h3", {}, one.title), element("figcaption", { class: "note" }, one.caption), button);
  }));
}

function notes(run) {
  return run.notes.map((text) => element("p", { class: "note" }, marked(`Note: ${text}`)));
}

/** Parts that a live page renews: id -> what draws it. */
const RENEWED = {
  warnings: (run) => [warningList(run), logged(run)],
  facts: (run) => [facts(run.facts), recipe(run)],
  figures: (run) => (Object.keys(run.figures).length ? [table(figuresTitle(run), null, Object.entries(run.figures))] : []),
};
const LOOKS = { facts: "What was run", warnings: "Worth knowing" };

function figuresTitle(...runs) {
  return runs.every((run) => run.finished) ? "Final figures" : "Figures so far";
}

function renewed(name, run, suffix) {
  return element("div", { id: `${name}-now${suffix}` }, RENEWED[name](run).filter((part) => part !== null));
}

/** The sections of a run; in a comparison they are folded away. */
function sections(run, curves, suffix = "") {
  const id = (name) => `${name}${suffix}`;
  return [
    section(id("facts"), LOOKS.facts, notes(run), renewed("facts", run, suffix)),
    section(id("warnings"), LOOKS.warnings, renewed("warnings", run, suffix)),
    curves ? section(id("curves"), "Curves", curves.root) : null,
    curves ? section(id("figures"), figuresTitle(run), renewed("figures", run, suffix)) : null,
    section(id("tokenizer"), "Tokenizer", tokenizer(run)),
    section(id("steps"), "Step by step", stepThrough(run)),
    section(id("pictures"), "Pictures", pictures(run)),
  ].filter((part) => part !== null);
}

function comparison(curves) {
  const head = (what) => [what, ...DATA.runs.map((run) => run.name)], { note, figures, options } = DATA.comparison, title = figuresTitle(...DATA.runs);
  return [
    section("figures", title, note ? element("p", { class: "note" }, marked(`Note: ${note}`)) : null, table(title, head("figure"), figures)),
    section("options", "Options that differ", options.length ? table("Options that differ", head("option"), options) : element("p", {}, "None but names of folders.")),
    section("curves", "Curves", curves.root),
    section("warnings", LOOKS.warnings, DATA.runs.flatMap((run) => [element("h3", {}, run.name), warningList(run)])),
    section("runs", "Each run", DATA.runs.map((run, i) => {
      const parts = element("details", {}, element("summary", {}, run.name));
      parts.addEventListener("toggle", () => parts.open && parts.childElementCount === 1 && parts.append(...sections(run, null, `-${i}`)), { once: false });
      return parts;
    })),
  ];
}

function theme() {
  const button = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  let dark = system.matches;
  const show = () => {
    document.documentElement.style.colorScheme = dark === system.matches ? "" : dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => { dark = !dark; show(); });
  system.addEventListener("change", () => { dark = system.matches; show(); });
  show();
}

/** Ask the server for what was recorded since, every two seconds; the zoom stays as it is. */
async function follow(run, curves) {
  let generation = null, have = 0, told = JSON.stringify([run.facts, run.warnings, run.early, run.figures, run.log]);
  for (;;) {
    let more = false;
    try {
      const answer = await fetch(`history?generation=${generation}&have=${have}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const news = await answer.json();
      if (news.first === 0) run.curves = {};
      for (const record of news.records) append(run, record);
      [generation, have, more] = [news.generation, news.first + news.records.length, news.more];
      if (!Object.keys(run.recipe).length && Object.keys(news.run.recipe).length) return location.reload(); // it has begun
      Object.assign(run, news.run);
      say(`${news.state}${news.pictures && !run.pictures.length ? " Reload this page for its pictures." : ""}`);
      if (news.records.length) curves.draw();
      if (told !== (told = JSON.stringify([run.facts, run.warnings, run.early, run.figures, run.log]))) renew(run);
    } catch (error) {
      say("The server does not answer; trying again.");
    }
    if (!more) await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function say(text) {
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

/** Draw the parts in words anew; what a person folded out stays so. */
function renew(run) {
  for (const [name, draw] of Object.entries(RENEWED)) {
    const place = byId(`${name}-now`), open = [...place.querySelectorAll("details")].map((part) => part.open);
    place.replaceChildren(...draw(run).filter((part) => part !== null));
    place.querySelectorAll("details").forEach((part, i) => { part.open = Boolean(open[i]); });
  }
  for (const place of [byId("figures-title"), document.querySelector("nav a[href='#figures']")]) place.textContent = figuresTitle(run);
}

function append(run, { step, ...figures }) {
  for (const [name, value] of Object.entries(figures)) {
    const [steps, values] = (run.curves[name] ||= [[], []]);
    steps.push(step);
    values.push(value);
  }
}

function start() {
  const curves = new Curves(DATA), one = DATA.runs.length === 1;
  byId("status").textContent = one ? DATA.runs[0].status : DATA.runs.map((run) => run.name).join(", ");
  const parts = one ? sections(DATA.runs[0], curves) : comparison(curves);
  byId("content").replaceChildren(...parts.filter((part) => part !== null));
  byId("sections").replaceChildren(...parts.filter((part) => part !== null).map((part) => element("a", { href: `#${part.id}` }, part.firstChild.textContent)));
  byId("footer").textContent = `mapet ${DATA.version}, ${DATA.live ? "live" : `made ${DATA.made}`}`;
  theme();
  curves.draw();
  if (DATA.live) follow(DATA.runs[0], curves);
}

start();
