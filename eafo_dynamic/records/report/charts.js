"use strict";

// Charts as SVG elements; a chart is drawn anew at the width that it has on the page.

const SVG = "http://www.w3.org/2000/svg";
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function mix(left, right, share) {
  const part = (colour, at) => parseInt(colour.slice(at, at + 2), 16);
  return [1, 3, 5].map((at) => Math.round(part(left, at) * (1 - share) + part(right, at) * share));
}

// Red, green, blue of a place between 0 and 1 on a scale; around zero the middle is close to the ground.
function shade(place, aroundZero) {
  const stops = !aroundZero ? VIRIDIS : isDark() ? ["#56b4e9", "#23272e", "#e69f00"] : ["#0072b2", "#f7f7f7", "#d55e00"];
  const span = !aroundZero && isDark() ? [0.15, 1] : !aroundZero ? [0, 0.92] : [0, 1];
  const at = Math.min(1, Math.max(0, span[0] + (span[1] - span[0]) * place)) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  return mix(stops[low], stops[low + 1], at - low);
}

function rgb(parts) {
  return `rgb(${parts.join(",")})`;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && value !== undefined) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  return low === high ? [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)] : [low, high];
}

function padded([low, high], share = 0.05) {
  const pad = (high - low) * share;
  return [low - pad, high + pad];
}

function ticks([low, high], count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || power;
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
  return found;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const text = Number.isInteger(value) ? String(value) : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  return text.replace("-", "−");
}

// Ticks of one axis have the same number of decimals.
function tickName(all) {
  const step = all.length > 1 ? Math.abs(all[1] - all[0]) : 0;
  const decimals = step ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  return (value) => !step || decimals > 6 ? number(value) : value.toFixed(decimals).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "−");
}

// An empty chart with axes: {plot, x, y, width, height, left, top} with x and y from values to pixels.
function frame(box, options) {
  const margin = { left: options.left || 52, right: options.right || 20, top: options.yLabel ? 24 : 10, bottom: 36 };
  // a window may be drawn before it has its size
  const width = Math.max(box.clientWidth, margin.left + margin.right + 60), height = options.height || 260;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label });
  const span = { x: width - margin.left - margin.right, y: height - margin.top - margin.bottom };
  const x = (value) => margin.left + (value - options.x[0]) / (options.x[1] - options.x[0]) * span.x;
  const y = (value) => margin.top + span.y - (value - options.y[0]) / (options.y[1] - options.y[0]) * span.y;
  const xTicks = options.xTicks || ticks(options.x, options.ticks || span.x / 70), yTicks = options.yTicks || ticks(options.y, options.ticks || span.y / 45);
  const xName = options.xName || tickName(xTicks), yName = options.yName || tickName(yTicks);
  for (const tick of xTicks) {
    root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: margin.top, y2: margin.top + span.y }));
    root.append(svg("text", { x: x(tick), y: height - 20, "text-anchor": "middle" }, xName(tick)));
  }
  for (const tick of yTicks) {
    root.append(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick) }));
    root.append(svg("text", { x: margin.left - 6, y: y(tick) + 4, "text-anchor": "end" }, yName(tick)));
  }
  root.append(svg("text", { x: margin.left + span.x, y: height - 5, "text-anchor": "end" }, options.xLabel || ""));
  if (options.yLabel) root.append(svg("text", { class: "title", x: 2, y: 11 }, options.yLabel));
  const plot = svg("g");
  root.append(plot);
  box.replaceChildren(root);
  if (box.tabIndex >= 0) box.setAttribute("aria-label", options.label);
  return { root, plot, x, y, width, height, ...margin, span };
}

function path(chart, xs, ys) {
  let text = "", pen = false;
  for (let k = 0; k < xs.length; k += 1) {
    if (ys[k] === null || ys[k] === undefined) { pen = false; continue; }
    text += `${pen ? "L" : "M"}${chart.x(xs[k]).toFixed(1)} ${chart.y(ys[k]).toFixed(1)}`;
    pen = true;
  }
  return text;
}

function line(chart, xs, ys, colour, width = 1.5, more = {}) {
  const node = svg("path", { d: path(chart, xs, ys), fill: "none", stroke: colour, "stroke-width": width, "stroke-linejoin": "round", ...more });
  chart.plot.append(node);
  return node;
}

function dot(chart, x, y, colour, radius = 3, more = {}) {
  const node = svg("circle", { cx: chart.x(x).toFixed(1), cy: chart.y(y).toFixed(1), r: radius, fill: colour, ...more });
  chart.plot.append(node);
  return node;
}

function sparkline(values) {
  const width = 84, height = 20, [low, high] = extent(values);
  const known = values.map((value, k) => [k, value]).filter(([, value]) => value !== null);
  const place = ([k, value]) => `${(2 + k / Math.max(values.length - 1, 1) * (width - 6)).toFixed(1)} ${(height - 3 - (value - low) / (high - low) * (height - 6)).toFixed(1)}`;
  const root = svg("svg", { width, height, "aria-hidden": "true" });
  if (!known.length) return root;
  root.append(svg("path", { d: "M" + known.map(place).join("L"), fill: "none", stroke: "var(--accent)", "stroke-width": 1.4 }));
  const [cx, cy] = place(known[known.length - 1]).split(" ");
  root.append(svg("circle", { cx, cy, r: 2, fill: "var(--accent)" }));
  return root;
}

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = !text;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 8 : event.clientY + 18}px`;
}

// Ask `at` what is under the pointer, in pixels of the chart; it answers with a text, `pick` takes a click.
function onPointer(chart, at, pick) {
  const place = (event) => { const box = chart.root.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  chart.root.addEventListener("pointermove", (event) => showTip(event, at(...place(event)) || ""));
  chart.root.addEventListener("pointerleave", () => { tip.hidden = true; });
  if (pick) chart.root.addEventListener("click", (event) => pick(...place(event)));
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, k) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = k; });
  return best;
}
