"use strict";
// Small helpers. Text from the data only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element: `element("p", {class: "note", onclick: f}, "text", child, ...)`; null children are left out. */
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A table in a box that scrolls sideways by itself; the first column names the rows. */
function table(caption, head, rows) {
  const cells = (row) => row.slice(1).map((text) => element("td", {}, text));
  return element("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    element("table", {},
      head ? element("thead", {}, element("tr", {}, head.map((text) => element("th", { scope: "col" }, text)))) : null,
      element("tbody", {}, rows.map((row) => element("tr", {}, element("th", { scope: "row" }, row[0]), cells(row))))));
}

/** Names and their values, one below the other on a phone. */
function facts(rows) {
  return element("dl", {}, rows.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

/** Text in which `words between backticks` are code. */
function marked(text) {
  return text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}

/** As many digits as tell. */
function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => 1.4 * factor * power >= rough); // the nearest, so that there are two at least
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}
