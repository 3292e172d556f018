// The page of a run, or of several: color scheme, charts, step-through, figures at full size, updates of a live page.

const byId = (id) => document.getElementById(id);
/** Return the data of a page, the JSON that run.html wrote: runs, charts, line_styles, live, and stage (waiting, running, complete). */
const readData = (page) => JSON.parse(page.getElementById("data").textContent);
const DATA = readData(document);

/** Fill the navigation with a link to each section of the page, named after its h2. */
function navigation() {
  byId("sections").replaceChildren(...[...document.querySelectorAll("main > section")].map((section) =>
    Object.assign(document.createElement("a"), { href: `#${section.id}`, textContent: section.querySelector("h2").textContent })));
}

/**
 * Let a button switch between light and dark colors; until it is clicked, and when the system changes, the system's choice holds.
 * redraw: called after each change, since charts are drawn in the page's colors.
 */
function colorScheme(redraw) {
  const button = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  let dark = system.matches;
  const show = () => {
    document.documentElement.style.colorScheme = dark === system.matches ? "" : dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colors`);
    redraw();
  };
  button.addEventListener("click", () => { dark = !dark; show(); });
  system.addEventListener("change", () => { dark = system.matches; show(); });
  show();
}

/**
 * Request a live page from its server every two seconds, and show its new texts and metrics, until the run is complete.
 * run: the run's data, which is replaced in place; charts: the Charts that draw it; their zoom stays.
 */
async function follow(run, charts) {
  while (DATA.stage !== "complete") {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      const response = await fetch(location.href, { cache: "no-store" });
      if (!response.ok) throw new Error(response.statusText);
      const newest = new DOMParser().parseFromString(await response.text(), "text/html"), data = readData(newest);
      if (data.stage !== DATA.stage) return location.reload(); // it has other sections
      for (const id of ["status", "facts", "warnings", "metrics"]) replaceContent(byId(id), newest.getElementById(id));
      navigation();
      Object.assign(run, data.runs[0]);
      charts.draw();
    } catch (error) {
      byId("status").textContent = "The server does not answer; trying again.";
    }
  }
}

/** Replace an element's content by that of `newest`, if it has changed; open <details> stay open, by their order. */
function replaceContent(element, newest) {
  const open = [...element.querySelectorAll("details")].map((details) => details.open);
  newest.querySelectorAll("details").forEach((details, i) => { details.open = Boolean(open[i]); });
  if (element.innerHTML !== newest.innerHTML) element.innerHTML = newest.innerHTML;
}

navigation();
const charts = new Charts(byId("content"), DATA);
colorScheme(() => charts.recolor());
for (const root of document.querySelectorAll(".step-through")) new StepThrough(DATA.runs[root.dataset.runIndex].steps, root);
on(document, ".figure button", "click", (button) => button.setAttribute("aria-pressed", String(button.classList.toggle("large"))));
if (DATA.live) follow(DATA.runs[0], charts);
