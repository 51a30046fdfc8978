// The page: what is chosen, and what is drawn anew when it changes. `step` is a place in the run's list of steps.

const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
// `snapshot` is a place in the film of the chosen site, `frame` one in the steps at which any run has a snapshot.
const chosen = { run: 0, site: 0, step: 0, column: "entropy", snapshot: 0, frame: 0, shown: "function" };
const run = () => data.runs[chosen.run];
const values = (site, column = chosen.column) => run().series[column][site];
const unit = (column) => { const known = data.columns[column]; return known && known.unit !== "1" && known.unit ? ` ${known.unit}` : ""; };
const colour = (site) => run().sites.length <= 7 ? `var(--line-${site})` : rgb(shade(site / (run().sites.length - 1), false));
const runColour = (place) => data.runs.length === 1 ? "var(--accent)" : `var(--line-${place % 7})`;
const still = matchMedia("(prefers-reduced-motion: reduce)");
let timer = null, frameSteps = [];

function valueText(site, step) {
  return `${run().sites[site]}, step ${run().steps[step]}: ${chosen.column} ${number(values(site)[step])}${unit(chosen.column)}`;
}

function axisName() {
  return `${chosen.column}${unit(chosen.column) && ","}${unit(chosen.column)}`;
}

function shortName(site, room = innerWidth < 600 ? 15 : 26) {
  const name = run().short[site];
  return name.length <= room ? name : `…${name.slice(name.length - room + 1)}`;
}

function drawHeatmap() {
  const { steps, sites } = run();
  const all = sites.flatMap((_, site) => values(site));
  const [low, high] = extent(all), around = low < 0 && high > 0, reach = Math.max(-low, high);
  const share = (value) => around ? 0.5 + value / reach / 2 : (value - low) / (high - low);
  const picture = document.createElement("canvas");
  picture.width = steps.length; picture.height = sites.length;
  const pen = picture.getContext("2d"), pixels = pen.createImageData(steps.length, sites.length);
  sites.forEach((_, site) => values(site).forEach((value, step) => {
    if (value !== null) pixels.data.set([...shade(share(value), around), 255], 4 * (site * steps.length + step));
  }));
  pen.putImageData(pixels, 0, 0);
  const named = sites.length <= 40;
  const left = named ? 8 + 6.3 * Math.max(...sites.map((_, site) => shortName(site).length)) : 40;
  const height = 92 + Math.min(420, Math.max(120, 16 * sites.length));
  const stride = Math.ceil(steps.length / Math.max(2, (by("heatmap").clientWidth - left) / 80));
  const chart = frame(by("heatmap"), {
    label: `Heatmap of ${chosen.column}, ${sites.length} sites over ${run().updates} updates, from ${number(low)} to ${number(high)}${unit(chosen.column)}`,
    x: [-0.5, steps.length - 0.5], y: [sites.length - 0.5, -0.5], left, height: height - 36, xLabel: "step",
    xTicks: steps.map((_, k) => k).filter((k) => k % stride === 0), xName: (k) => steps[k],
    yTicks: named ? sites.map((_, k) => k) : [0, sites.length - 1], yName: (k) => named ? shortName(k) : k + 1,
  });
  chart.plot.append(svg("image", { href: picture.toDataURL(), x: chart.left, y: chart.top, width: chart.span.x, height: chart.span.y, preserveAspectRatio: "none", style: "image-rendering:pixelated" }));
  const cell = { x: chart.span.x / steps.length, y: chart.span.y / sites.length };
  chart.plot.append(svg("rect", { class: "cross", x: chart.x(chosen.step) - cell.x / 2, y: chart.y(chosen.site) - cell.y / 2, width: Math.max(cell.x, 3), height: Math.max(cell.y, 3) }));
  by("heatmap").append(legend(low, high, around, reach));
  const at = (px, py) => [Math.floor((py - chart.top) / cell.y), Math.floor((px - chart.left) / cell.x)];
  const inside = (site, step) => site >= 0 && site < sites.length && step >= 0 && step < steps.length;
  onPointer(chart, (px, py) => { const [site, step] = at(px, py); return inside(site, step) ? valueText(site, step) : ""; },
    (px, py) => { const [site, step] = at(px, py); if (inside(site, step)) choose({ site, step }); });
}

function legend(low, high, around, reach) {
  const ends = around ? [-reach, reach] : [low, high], width = 160;
  const root = svg("svg", { width: 320, height: 30, "aria-hidden": "true" });
  for (let k = 0; k < 40; k += 1) root.append(svg("rect", { x: 60 + k * width / 40, y: 4, width: width / 40 + 0.5, height: 12, fill: rgb(shade(k / 39, around)) }));
  root.append(svg("text", { x: 54, y: 14, "text-anchor": "end" }, number(ends[0])), svg("text", { x: 66 + width, y: 14 }, `${number(ends[1])}${unit(chosen.column)}`));
  return root;
}

function drawLines() {
  const { steps, sites } = run();
  const chart = frame(by("lines"), {
    label: `${chosen.column} over steps, one line a site; ${valueText(chosen.site, chosen.step)}`,
    x: extent(steps), y: padded(extent(sites.flatMap((_, site) => values(site)))), height: 56 + Math.min(420, Math.max(200, 16 * sites.length)), xLabel: "optimiser steps",
    yLabel: axisName(),
  });
  const strong = () => line(chart, steps, values(chosen.site), colour(chosen.site), 3);
  sites.forEach((_, site) => { if (site !== chosen.site) line(chart, steps, values(site), colour(site), 1.3, { opacity: 0.75 }); });
  strong();
  const value = values(chosen.site)[chosen.step];
  chart.plot.append(svg("line", { class: "axis", x1: chart.x(steps[chosen.step]), x2: chart.x(steps[chosen.step]), y1: chart.top, y2: chart.top + chart.span.y }));
  if (value !== null) dot(chart, steps[chosen.step], value, colour(chosen.site), 4, { class: "cross" });
  const at = (px, py) => {
    const step = nearest(steps.map(chart.x), px);
    const site = nearest(sites.map((_, k) => values(k)[step] === null ? Infinity : chart.y(values(k)[step])), py);
    return { site, step };
  };
  onPointer(chart, (px, py) => { const found = at(px, py); return valueText(found.site, found.step); }, (px, py) => choose(at(px, py)));
}

function drawRanking() {
  const { sites } = run();
  const known = sites.map((_, site) => ({ site, all: values(site).filter((value) => value !== null) })).filter((entry) => entry.all.length);
  known.forEach((entry) => { entry.first = entry.all[0]; entry.last = entry.all[entry.all.length - 1]; });
  known.sort((left, right) => right.last - left.last);
  const shown = known.length <= 40 ? known : [...known.slice(0, 20), ...known.slice(-20)];
  if (!shown.length) { by("ranking").replaceChildren(); return; }
  const chart = frame(by("ranking"), {
    label: `Sites by their last ${chosen.column}; the largest is ${run().sites[shown[0].site]}`,
    x: padded(extent(shown.flatMap((entry) => [entry.first, entry.last]))), y: [shown.length - 0.5, -0.5],
    left: 12 + 6.3 * Math.max(4, ...shown.map((entry) => shortName(entry.site).length)), height: 60 + 18 * shown.length,
    yTicks: shown.map((_, k) => k), yName: (k) => shortName(shown[k].site), xLabel: axisName(),
  });
  shown.forEach((entry, place) => {
    line(chart, [entry.first, entry.last], [place, place], "var(--soft)", 1.5);
    dot(chart, entry.first, place, "var(--ground)", 4.5, { stroke: "var(--first)", "stroke-width": 1.8 });
    dot(chart, entry.last, place, "var(--accent)", 4.5);
  });
  const at = (py) => shown[Math.min(shown.length - 1, Math.max(0, Math.floor((py - chart.top) / chart.span.y * shown.length)))];
  onPointer(chart, (_, py) => { const entry = at(py); return entry && `${run().sites[entry.site]}: ${number(entry.first)} → ${number(entry.last)}${unit(chosen.column)}`; },
    (_, py) => { const entry = at(py); if (entry) choose({ site: entry.site }); });
}

const CURVES = {
  function: { name: "functions f(z), the plain one dotted", of: "Function", axis: "f(z), units of z", x: (shot) => shot.z, y: (shot) => shot.function, plain: (shot) => shot.base },
  correction: { name: "corrections f(z) − base(z)", of: "Correction", axis: "f(z) − base(z), units of z", x: (shot) => shot.z, y: (shot) => shot.function.map((value, k) => value === null || shot.base[k] === null ? null : value - shot.base[k]) },
  density: { name: "pre-activations: samples (bars) and fitted density", of: "Density of the pre-activations", axis: "density, per unit of z", x: (shot) => fitted(shot) ? shot.u.map((u) => shot.mu + shot.sigma * u) : [], y: (shot) => fitted(shot) ? shot.pdf.map((p) => p / shot.sigma) : [], bars },
};

function fitted(shot) {
  return shot.u && shot.pdf && shot.sigma;
}

function bars(shot) {
  if (!shot.edges || !shot.counts || shot.edges.length !== shot.counts.length + 1) return [];
  const total = shot.counts.reduce((sum, count) => sum + count, 0) || 1;
  const found = shot.counts.map((count, k) => ({ from: shot.edges[k], to: shot.edges[k + 1], count, height: count / total / (shot.edges[k + 1] - shot.edges[k]) }));
  return found.every((bar) => bar.to > bar.from) ? found : [];
}

function film(site = chosen.site, place = chosen.run) {
  const there = data.runs[place].sites.indexOf(run().sites[site]);
  return data.runs[place].snapshots[there] || [];
}

// Films of one site in all runs, the chosen run's first.
function films(site) {
  const others = data.runs.map((_, place) => place).filter((place) => place !== chosen.run);
  return [chosen.run, ...others].map((place) => ({ place, shots: film(site, place) })).filter((entry) => entry.shots.length);
}

function placeAt(shots, step) {
  return Math.max(0, shots.filter((shot) => shot.step <= step).length - 1);
}

// One curve of a site at a step: of all runs that have the site, over the steps before and after if it is one run.
function drawCurve(box, kind, site, step, options) {
  const curve = CURVES[kind], all = films(site), shots = all.flatMap((entry) => entry.shots), name = run().sites[site];
  const histogram = (shot) => curve.bars ? curve.bars(shot) : [];
  const heights = shots.flatMap((shot) => [...curve.y(shot), ...(curve.plain ? curve.plain(shot) : []), ...histogram(shot).map((bar) => bar.height)]);
  box.closest("figure, .cell").hidden = !heights.length;
  if (!heights.length) return;
  const x = extent(shots.flatMap((shot) => [...curve.x(shot), ...histogram(shot).flatMap((bar) => [bar.from, bar.to])]));
  const chart = frame(box, { label: `${curve.of} of ${name} at step ${step}`, x, y: curve.bars ? [0, 1.05 * extent(heights)[1]] : padded(extent(heights)), yLabel: curve.axis, ...options });
  const own = all[0].shots, shot = own[placeAt(own, step)];
  histogram(shot).forEach((bar) => chart.plot.append(svg("rect", { x: chart.x(bar.from), y: chart.y(bar.height), width: Math.max(0, chart.x(bar.to) - chart.x(bar.from) - 0.5), height: chart.y(0) - chart.y(bar.height), fill: runColour(all[0].place), opacity: 0.35 })));
  if (all.length === 1 && !curve.bars) own.forEach((entry) => { if (entry !== shot) line(chart, curve.x(entry), curve.y(entry), "var(--soft)", 1, { opacity: 0.35 }); });
  [...all].reverse().forEach((entry) => { const now = entry.shots[placeAt(entry.shots, step)]; line(chart, curve.x(now), curve.y(now), runColour(entry.place), entry === all[0] ? 2.5 : 1.5); });
  if (curve.plain) line(chart, shot.z, shot.base, "var(--ink)", 1.2, { "stroke-dasharray": "2 3" });
  onPointer(chart, (px) => {
    const bar = histogram(shot).find((entry) => chart.x(entry.from) <= px && px < chart.x(entry.to));
    if (curve.bars) return bar && `${number(bar.from)} to ${number(bar.to)}: ${number(bar.count)} samples`;
    const k = nearest(shot.z.map(chart.x), px);
    return `z ${number(shot.z[k])}: f ${number(shot.function[k])}, base ${number(shot.base[k])}, f − base ${number(CURVES.correction.y(shot)[k])}`;
  });
}

// One button a site, made once for each run.
function makeCells() {
  frameSteps = [...new Set(run().sites.flatMap((_, site) => films(site).flatMap((entry) => entry.shots.map((shot) => shot.step))))].sort((left, right) => left - right);
  chosen.frame = Math.max(0, frameSteps.length - 1);
  by("all-films").hidden = !frameSteps.length; by("no-films").hidden = Boolean(frameSteps.length);
  by("frame").max = Math.max(0, frameSteps.length - 1); by("frame").disabled = frameSteps.length < 2;
  const cells = run().sites.map((name, site) => [name, site]).filter(([, site]) => films(site).length).map(([name, site]) => {
    const cell = document.createElement("button"), title = document.createElement("span"), box = document.createElement("span");
    cell.className = "cell"; cell.type = "button"; cell.title = name; cell.dataset.place = site;
    title.className = "name"; title.textContent = shortName(site, 21);
    box.className = "chart"; box.id = `cell-${site}`;
    cell.append(title, box);
    cell.setAttribute("aria-label", `Open ${name}`);
    cell.addEventListener("click", () => openSite(site));
    return cell;
  });
  by("multiples").replaceChildren(...cells);
  by("multiples-key").replaceChildren(...(data.runs.length > 1 ? [runKey()] : []));
  const left = run().sites.length - cells.length;
  by("multiples-hint").textContent = `Each site over its pre-activations z, on its own scale${data.runs.length > 1 ? "" : "; faint: at the other steps"}. A site opens below.${left ? ` ${left} more sites are not drawn, to keep this file small.` : ""}`;
}

function drawMultiples() {
  if (!frameSteps.length) return;
  const step = frameSteps[chosen.frame];
  by("frame").value = chosen.frame;
  by("frame").setAttribute("aria-valuetext", `step ${step}`);
  by("frame-step").textContent = `${step} (${chosen.frame + 1} of ${frameSteps.length})`;
  by("multiples").querySelectorAll(".cell").forEach((cell) => {
    const site = Number(cell.dataset.place);
    cell.classList.toggle("chosen", site === chosen.site);
    drawCurve(cell.lastElementChild, chosen.shown, site, step, { height: 150, left: 50, right: 14, ticks: 3, xLabel: "z" });
  });
}

function drawFilm() {
  const shots = film(), slider = by("snapshot");
  by("film").hidden = !shots.length; by("no-film").hidden = Boolean(shots.length);
  if (!shots.length) return;
  chosen.snapshot = Math.min(chosen.snapshot, shots.length - 1);
  const shot = shots[chosen.snapshot];
  slider.max = shots.length - 1; slider.value = chosen.snapshot; slider.disabled = shots.length < 2;
  slider.setAttribute("aria-valuetext", `step ${shot.step}`);
  by("snapshot-step").textContent = `${shot.step} (${chosen.snapshot + 1} of ${shots.length})`;
  by("snapshot-values").textContent = ["eps", "lift", "gain", "slope", "mu", "sigma"].filter((name) => shot[name] !== null).map((name) => `${name} ${number(shot[name])}`).join(", ");
  for (const kind of Object.keys(CURVES)) drawCurve(by(kind), kind, chosen.site, shot.step, { height: 240, xLabel: "pre-activation z" });
}

// Both sliders show the same step, as far as the chosen site has a snapshot there.
function showFrame(place) {
  chosen.frame = place;
  chosen.snapshot = placeAt(film(), frameSteps[place]);
  drawMultiples(); drawFilm();
}

function showSnapshot(place) {
  chosen.snapshot = place;
  if (film().length) chosen.frame = frameSteps.indexOf(film()[Math.min(place, film().length - 1)].step);
  drawMultiples(); drawFilm();
}

function drawPrediction() {
  const { count, correlation, points } = run().changes;
  by("prediction-text").textContent = count === 0 ? "No two updates of a site have entropy, eps and d_entropy_d_eps."
    : `${count} changes ${run().changes.which}${points.length < count ? `, ${points.length} of them drawn` : ""}${correlation === null ? "" : `; correlation of predicted and measured ${number(correlation)}`}. On the line the prediction is exact.`;
  if (!points.length) { by("prediction").replaceChildren(); return; }
  const x = padded(extent(points.map((point) => point[1]))), y = padded(extent(points.map((point) => point[2])));
  const chart = frame(by("prediction"), { label: `Measured against predicted changes of entropy, ${count} points`, x, y, height: 320, left: 62, xLabel: "predicted change, nats", yLabel: "measured change, nats" });
  const from = Math.max(x[0], y[0]), to = Math.min(x[1], y[1]);
  if (from < to) line(chart, [from, to], [from, to], "var(--ink)", 1, { "stroke-dasharray": "4 3" });
  points.forEach(([site, predicted, measured]) => dot(chart, predicted, measured, colour(site), 3, { opacity: 0.7 }));
  onPointer(chart, (px, py) => {
    const k = nearest(points.map((point) => Math.hypot(chart.x(point[1]) - px, chart.y(point[2]) - py)), 0), point = points[k];
    return Math.hypot(chart.x(point[1]) - px, chart.y(point[2]) - py) < 12 ? `${run().sites[point[0]]}: predicted ${number(point[1])}, measured ${number(point[2])}` : "";
  });
}

function runKey() {
  const key = document.createElement("p");
  key.className = "hint key";
  data.runs.forEach((entry, place) => {
    const name = document.createElement("span");
    name.append("● ", entry.label);
    name.style.color = runColour(place);
    key.append(name);
  });
  return key;
}

function meanOver(entry, column) {
  return entry.steps.map((_, step) => {
    const known = (entry.series[column] || []).map((site) => site[step]).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  });
}

// All runs in one chart each; the loss is the same for all sites of a run.
function drawMeans() {
  if (!by("means")) return;
  for (const [id, column, title] of [["means", "entropy", "mean entropy of the sites, nats"], ["losses", "loss", "training loss, mean since the last update"]]) {
    const lines = data.runs.map((entry) => meanOver(entry, column));
    by(id).hidden = !lines.flat().some((value) => value !== null);
    if (by(id).hidden) continue;
    const chart = frame(by(id), { label: `${title}, one line a run`, x: extent(data.runs.flatMap((entry) => entry.steps)), y: padded(extent(lines.flat())), height: 240, xLabel: "optimiser steps", yLabel: title });
    data.runs.forEach((entry, k) => line(chart, entry.steps, lines[k], runColour(k), 2, k >= 7 ? { "stroke-dasharray": "5 3" } : {}));
    by(id).append(runKey());
    onPointer(chart, (px, py) => {
      const found = lines.map((all, k) => { const step = nearest(data.runs[k].steps.map(chart.x), px); return { k, step, far: all[step] === null ? Infinity : Math.abs(chart.y(all[step]) - py) }; }).sort((left, right) => left.far - right.far)[0];
      return `${data.runs[found.k].label}, step ${data.runs[found.k].steps[found.step]}: ${number(lines[found.k][found.step])}`;
    });
  }
}

// The model's training loss over the mean entropy of its sites, at the same steps.
function drawLoss() {
  const { steps, series } = run(), losses = series.loss && series.loss[0];
  by("loss-pair").hidden = !losses || !series.entropy;
  if (by("loss-pair").hidden) return;
  const curves = [["loss", "training loss, mean since the last update", losses], ["mean-entropy", "mean entropy of the sites, nats", meanOver(run(), "entropy")]];
  for (const [id, title, curve] of curves) {
    const chart = frame(by(id), { label: `${title}, over steps`, x: extent(steps), y: padded(extent(curve)), height: 200, xLabel: "optimiser steps", yLabel: title });
    line(chart, steps, curve, "var(--accent)", 2);
    onPointer(chart, (px) => { const k = nearest(steps.map(chart.x), px); return `step ${steps[k]}: ${number(curve[k])}`; });
  }
}

function drawChosen() {
  drawHeatmap(); drawLines();
  by("readout").textContent = valueText(chosen.site, chosen.step);
  document.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
  const row = document.querySelector(`#layers ~ .of-run[data-run="${chosen.run}"] tr[data-place="${chosen.site}"]`);
  if (row) row.classList.add("chosen");
  by("site").value = chosen.site;
}

function drawAll() {
  drawMultiples(); drawLoss(); drawChosen(); drawRanking(); drawFilm(); drawPrediction(); drawMeans();
}

function choose(change) {
  const site = chosen.site;
  Object.assign(chosen, change);
  drawChosen();
  if (change.step !== undefined && film().length) showSnapshot(nearest(film().map((shot) => shot.step), run().steps[chosen.step]));
  else if (site !== chosen.site && frameSteps.length) showFrame(chosen.frame);
}

function openSite(site) {
  choose({ site });
  by("site-title").scrollIntoView({ block: "start" });
  by("site").focus({ preventScroll: true });
}

function showRun(place) {
  stop();
  Object.assign(chosen, { run: place, site: 0, step: data.runs[place].steps.length - 1, snapshot: Infinity });
  document.querySelectorAll(".of-run").forEach((part) => { part.hidden = Number(part.dataset.run) !== place; });
  const columns = Object.keys(run().series);
  if (!columns.includes(chosen.column)) chosen.column = columns.includes("entropy") ? "entropy" : columns[0];
  by("column").replaceChildren(...columns.map((name) => new Option(name, name, false, name === chosen.column)));
  by("site").replaceChildren(...run().sites.map((name, site) => new Option(name, site)));
  by("column-meaning").textContent = data.columns[chosen.column].meaning;
  makeCells();
  filterRows();
  drawAll();
}

function filterRows() {
  const wanted = by("filter").value.toLowerCase(), rows = [...document.querySelectorAll(`#layers ~ .of-run[data-run="${chosen.run}"] tbody tr`)];
  rows.forEach((row) => { row.hidden = !row.querySelector("th").dataset.value.toLowerCase().includes(wanted); });
  by("found").textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} sites` : "";
}

function sortBy(heading) {
  const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === (heading.classList.contains("number") ? "descending" : "ascending");
  const ascending = heading.classList.contains("number") ? down : !down;
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const key = (row) => { const cell = row.cells[column], value = cell.dataset.value; return heading.classList.contains("number") ? (value === undefined ? null : Number(value)) : cell.textContent || null; };
  const compare = (left, right) => {
    const [a, b] = [key(left), key(right)];
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return ascending ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
}

// Where the reader wants no motion, each press shows the next snapshot.
function namePlay() {
  const name = still.matches ? "Next" : timer ? "Pause" : "Play";
  document.querySelectorAll(".play").forEach((button) => { button.textContent = name; button.setAttribute("aria-pressed", String(Boolean(timer))); });
}

function stop() {
  clearInterval(timer); timer = null;
  namePlay();
}

function play() {
  if (timer) { stop(); return; }
  const last = frameSteps.length - 1;
  if (still.matches) { showFrame(chosen.frame >= last ? 0 : chosen.frame + 1); return; }
  if (chosen.frame >= last) showFrame(0);
  timer = setInterval(() => { showFrame(chosen.frame + 1); if (chosen.frame >= last) stop(); }, 500);
  namePlay();
}

function onKey(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
  choose({ site: clamp(chosen.site + moves[event.key][0], run().sites.length), step: clamp(chosen.step + moves[event.key][1], run().steps.length) });
}

function start() {
  document.body.classList.add("live");
  document.querySelectorAll("td.trend").forEach((cell) => {
    const place = Number(cell.closest(".of-run").dataset.run), site = Number(cell.parentElement.dataset.place);
    const series = data.runs[place].series[cell.dataset.column];
    if (series) cell.append(sparkline(series[site]));
  });
  document.querySelectorAll("thead th button").forEach((button) => button.addEventListener("click", () => sortBy(button.parentElement)));
  document.querySelectorAll("button.site").forEach((button) => button.addEventListener("click", () => openSite(run().sites.indexOf(button.closest("th").dataset.value))));
  if (by("run")) by("run").addEventListener("change", () => showRun(Number(by("run").value)));
  by("filter").addEventListener("input", filterRows);
  by("column").addEventListener("change", () => { chosen.column = by("column").value; by("column-meaning").textContent = data.columns[chosen.column].meaning; drawChosen(); drawRanking(); });
  by("site").addEventListener("change", () => choose({ site: Number(by("site").value) }));
  by("snapshot").addEventListener("input", () => { stop(); showSnapshot(Number(by("snapshot").value)); });
  by("frame").addEventListener("input", () => { stop(); showFrame(Number(by("frame").value)); });
  by("shown").append(...Object.entries(CURVES).map(([kind, curve]) => new Option(curve.name, kind)));
  by("shown").addEventListener("change", () => { chosen.shown = by("shown").value; drawMultiples(); });
  document.querySelectorAll(".play").forEach((button) => button.addEventListener("click", play));
  still.addEventListener("change", stop);
  for (const id of ["heatmap", "lines"]) by(id).addEventListener("keydown", onKey);
  showRun(0);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

start();
