// The page of a run, or of several: color scheme, charts, step-through, figures at full size, updates of a live page.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** Links to all sections. */
function navigation() {
  byId("sections").replaceChildren(...[...document.querySelectorAll("main > section")].map((section) =>
    Object.assign(document.createElement("a"), { href: `#${section.id}`, textContent: section.querySelector("h2").textContent })));
}

/** A button that switches between light and dark; until then the system decides. */
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

/** Ask the server every two seconds for what is new; the zoom stays as it is. */
async function follow(run, charts) {
  let generation = null, have = 0;
  for (;;) {
    let more = false;
    try {
      const answer = await fetch(`updates?generation=${generation}&have=${have}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const news = await answer.json();
      if (news.started && !DATA.started) return location.reload();
      if (news.first === 0) run.curves = {};
      for (const { step, ...metrics } of news.records) {
        for (const [name, value] of Object.entries(metrics)) {
          const [steps, values] = (run.curves[name] ||= [[], []]);
          steps.push(step);
          values.push(value);
        }
      }
      [generation, have, more, run.steps_per_epoch] = [news.generation, news.first + news.records.length, news.more, news.steps_per_epoch];
      say(news.status);
      for (const [id, html] of Object.entries(news.sections)) renew(byId(id), html);
      if (news.records.length) charts.draw();
    } catch (error) {
      say("The server does not answer; trying again.");
    }
    if (!more) await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function say(text) {
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

/** Replace what has changed; what is folded out stays so. */
function renew(place, html) {
  if (place.dataset.html === html) return;
  const open = [...place.querySelectorAll("details")].map((part) => part.open);
  place.innerHTML = place.dataset.html = html;
  place.querySelectorAll("details").forEach((part, i) => { part.open = Boolean(open[i]); });
  navigation();
}

navigation();
const charts = new Charts(byId("curves"), DATA);
colorScheme(() => charts.redraw());
for (const root of document.querySelectorAll(".step-through")) new StepThrough(DATA.runs[root.dataset.runIndex].steps, root);
on(document, ".figure button", "click", (button) => button.setAttribute("aria-pressed", String(button.classList.toggle("large"))));
if (DATA.live) follow(DATA.runs[0], charts);
