"use strict";
// The review page: shows the images of a set by class, records what a person decides, saves it as CSV.
//
// Names of classes and files are text of strangers: they reach the page through textContent only, never as HTML.
// Images come as sprite sheets, text in the page; a sheet is decoded when one of its images comes into view.

const FIRST = 24; // images of a class that are shown at first, and with each click on "Show more"
const data = JSON.parse(document.getElementById("data").textContent);
const sheets = document.querySelectorAll("script.sheet");
const box = document.getElementById("images");
const panel = document.getElementById("panel");
const live = document.getElementById("live");

// One object per image. `other` is what "relabel" means: the suggested class, or null where that is the label itself.
const items = data.names.map((name, index) => ({
  index, name, file: data.files[index], label: data.labels[index], suggested: data.suggested[index], wrong: data.wrong[index],
  other: data.suggested[index] === data.labels[index] ? null : data.suggested[index],
  probability: data.probability && data.probability[index], twin: data.twin[index], group: data.group[index],
  suspicious: data.suspicious[index] === 1, foreign: data.foreign[index] === 1, duplicate: data.group[index] >= 0,
}));
const groups = new Map([...new Set(data.group)].filter((g) => g >= 0).map((g, i) => [g, i + 1])); // of duplicates
const percent = (p) => (p > 0.995 ? "over 99%" : p < 0.005 ? "under 1%" : `${Math.round(100 * p)}%`);
const number = (n) => n.toLocaleString("en-US");

// Return a new element. Attributes whose value is a function listen to events; children are elements or texts.
function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") e.addEventListener(name, value);
    else if (value !== null) e.setAttribute(name, value);
  }
  e.append(...children.filter((child) => child !== null));
  return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// Decisions: {kind: "keep" | "relabel" | "drop", to: class or null, label: class} by file name. The browser keeps them.

const decisions = new Map();
const history = []; // for undo: lists of [file name, what was decided before]
let stored = true;

function load() {
  try {
    const valid = (c) => Number.isInteger(c) && c >= 0 && c < data.classes.length;
    for (const [name, d] of JSON.parse(localStorage.getItem(data.key) || "[]")) {
      const fine = ["keep", "relabel", "drop"].includes(d.kind) && valid(d.label) && (d.to === null || valid(d.to));
      if (fine && typeof name === "string") decisions.set(name, { kind: d.kind, to: d.to, label: d.label });
    }
  } catch (error) {
    console.warn("no decisions were restored:", error);
  }
}

function save() {
  try {
    localStorage.setItem(data.key, JSON.stringify([...decisions]));
    stored = true;
  } catch (error) {
    stored = false; // the panel says so
  }
}

// Record the same decision about several images. A second time takes it back.
function decide(chosen, kind, to = null) {
  const before = chosen.map((item) => [item.name, decisions.get(item.name)]);
  const label = (item) => (kind === "relabel" ? (to === null ? item.other : to) : null);
  const decided = (item) => (label(item) === item.label ? { kind: "keep", to: null } : { kind, to: label(item) });
  const again = before.every(([, d], i) => {
    const wanted = decided(chosen[i]);
    return d && d.kind === wanted.kind && d.to === wanted.to;
  });
  for (const item of chosen) {
    if (again) decisions.delete(item.name);
    else decisions.set(item.name, { ...decided(item), label: item.label });
  }
  history.push(before);
  save();
  refresh(chosen);
  live.textContent = chosen.length === 1 ? `${describe(chosen[0])} ${counter()}` : counter();
}

function undo() {
  const before = history.pop();
  if (!before) return;
  for (const [name, decision] of before) {
    if (decision) decisions.set(name, decision);
    else decisions.delete(name);
  }
  save();
  const names = new Set(before.map(([name]) => name));
  const changed = items.filter((item) => names.has(item.name));
  refresh(changed);
  if (changed.length === 1 && cards.has(changed[0].index)) choose(changed[0], true);
  live.textContent = `Taken back. ${counter()}`;
}

function counter() {
  const count = { keep: 0, relabel: 0, drop: 0 };
  for (const d of decisions.values()) count[d.kind]++;
  return `${number(decisions.size)} decided: ${number(count.keep)} keep, ${number(count.relabel)} relabel, ${number(count.drop)} drop.`;
}

function outcome(item) {
  const d = decisions.get(item.name);
  if (!d) return "";
  return d.kind === "relabel" ? `Relabel: ${data.classes[d.to]}` : d.kind === "keep" ? "Keep" : "Drop";
}

// ---------------------------------------------------------------------------------------------------------------------
// The CSV.

// Quote a cell. Spreadsheets take a text that begins with one of these characters for a formula, so ' guards it.
function cell(text) {
  const guarded = /^[=+\-@\t\r']/.test(text) ? `'${text}` : text;
  return `"${guarded.replaceAll('"', '""')}"`;
}

function csv() {
  const lines = [...decisions].map(([name, d]) =>
    [name, data.keys[d.label], d.kind, d.kind === "relabel" ? data.keys[d.to] : ""].map(cell).join(","),
  );
  return ["file,label,decision,new_label", ...lines, ""].join("\r\n");
}

function download() {
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  const link = element("a", { href: url, download: "decisions.csv" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ---------------------------------------------------------------------------------------------------------------------
// Thumbnails.

// A rule of CSS per sheet holds its picture once, however many images show a part of it.
const rules = element("style");
document.head.append(rules);
const inserted = new Set();
const watcher = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => paint(entry.target)),
  { rootMargin: "300px" },
);

function paint(thumb) {
  watcher.unobserve(thumb);
  const sheet = Number(thumb.dataset.sheet);
  if (!inserted.has(sheet)) {
    inserted.add(sheet);
    rules.sheet.insertRule(`.sheet-${sheet}{background-image:url("${sheets[sheet].textContent}")}`);
  }
  thumb.classList.add(`sheet-${sheet}`);
}

// Return a thumbnail whose longer side has `side` pixels of the page.
function thumbnail(item, side) {
  const { width, height, sheet, exact } = data.tile;
  const scale = side / Math.max(width, height);
  const thumb = element("div", { class: exact ? "thumb exact" : "thumb", "data-sheet": Math.floor(item.index / sheet) });
  thumb.style.width = `${width * scale}px`;
  thumb.style.height = `${height * scale}px`;
  thumb.style.backgroundSize = `${width * scale}px auto`;
  thumb.style.backgroundPosition = `0 ${-(item.index % sheet) * height * scale}px`;
  return thumb;
}

// ---------------------------------------------------------------------------------------------------------------------
// Cards, by class.

const cards = new Map(); // by index of the image; those that exist now
let current = null; // the chosen image

function describe(item) {
  const parts = [`Labeled ${data.classes[item.label]}, wrong with ${percent(item.wrong)}.`];
  if (item.other !== null) parts.push(`Suggested: ${data.classes[item.other]}.`);
  if (item.foreign) parts.push("Foreign.");
  if (item.duplicate) parts.push("Has a duplicate.");
  parts.push(outcome(item) ? `Decision: ${outcome(item)}.` : "Not decided.");
  return parts.join(" ");
}

function card(item) {
  const act = (kind) => (event) => {
    event.stopPropagation();
    choose(item);
    if (kind === "relabel" && item.other === null) panel.querySelector("select").focus();
    else decide([item], kind);
  };
  const button = (kind, text, title) => element("button", { type: "button", tabindex: -1, class: kind, title, click: act(kind) }, text);
  const to = item.other === null ? "Relabel: choose a class below" : `Relabel to ${data.classes[item.other]}`;
  const thumb = thumbnail(item, 112);
  watcher.observe(thumb);
  const node = element(
    "div",
    { class: "card", role: "group", tabindex: -1, click: () => choose(item, true), focus: () => choose(item) },
    thumb,
    element("div", { class: "classes" },
      element("span", {}, data.classes[item.label]),
      item.other === null ? null : element("span", { class: "other" }, `\u2192 ${data.classes[item.other]}`)),
    element("div", { class: "facts" }, `wrong: ${percent(item.wrong)}`,
      item.foreign ? element("span", { class: "badge foreign" }, "foreign") : null,
      item.duplicate ? element("span", { class: "badge duplicate", title: `same as ${item.twin}` }, `duplicate #${groups.get(item.group)}`) : null),
    element("div", { class: "mark" }),
    element("div", { class: "buttons" }, button("keep", "Keep", "Keep the label (k)"), button("relabel", "Relabel", `${to} (r)`),
      button("drop", "Drop", "Drop the image (d)")),
  );
  cards.set(item.index, node);
  mark(item);
  return node;
}

function mark(item) {
  const node = cards.get(item.index);
  if (!node) return;
  const d = decisions.get(item.name);
  node.dataset.decision = d ? d.kind : "";
  node.querySelector(".mark").textContent = outcome(item);
  node.setAttribute("aria-label", describe(item));
}

function refresh(changed) {
  changed.forEach(mark);
  drawPanel();
}

function choose(item, focus = false) {
  const node = cards.get(item.index);
  if (current !== item) {
    const old = current && cards.get(current.index);
    if (old) old.classList.remove("current");
    node.classList.add("current");
    for (const other of box.querySelectorAll('[tabindex="0"].card')) other.setAttribute("tabindex", -1);
    node.setAttribute("tabindex", 0); // the Tab key comes back to this image
    current = item;
    drawPanel();
  }
  if (focus) {
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }
}

// One section of the page: the images `members`, of which FIRST are shown at first.
function section(title, note, members) {
  const grid = element("div", { class: "grid" });
  const more = element("button", { type: "button", class: "more" });
  const shown = () => members.filter((item) => cards.has(item.index));
  const undecided = () => shown().filter((item) => !decisions.has(item.name));
  const grow = () => {
    const start = grid.children.length;
    grid.append(...members.slice(start, start + FIRST).map(card));
    const left = members.length - grid.children.length;
    more.hidden = left === 0;
    more.textContent = `Show ${Math.min(FIRST, left)} more of ${left}`;
  };
  more.addEventListener("click", grow);
  const all = element("select", {
    "aria-label": `Decide all shown images: ${title}`, title: "Those that are not decided yet. Undo takes it back.",
    change: () => {
      const chosen = undecided().filter((item) => all.value !== "relabel" || item.other !== null);
      if (chosen.length) decide(chosen, all.value);
      all.value = "";
      all.blur(); // else the next key would decide about all once more
    },
  }, element("option", { value: "" }, "Decide all shown here ..."), element("option", { value: "keep" }, "Keep"),
  element("option", { value: "relabel" }, "Relabel as suggested"), element("option", { value: "drop" }, "Drop"));
  grow();
  return element("section", { class: "group" },
    element("div", { class: "head" }, element("h3", {}, title, element("small", {}, note)), all), grid, more);
}

function draw() {
  const wanted = readFilters();
  const visible = items.filter(wanted.accepts);
  watcher.disconnect();
  cards.clear();
  const parts = [];
  if (wanted.kind === "duplicate") {
    visible.sort((a, b) => a.group - b.group || a.index - b.index);
    if (visible.length) parts.push(section("Duplicates", `${number(visible.length)} images, group by group`, visible));
  } else {
    const classes = new Map();
    for (const item of visible) {
      if (!classes.has(item.label)) classes.set(item.label, []);
      classes.get(item.label).push(item);
    }
    for (const [label, members] of classes) {
      const of = wanted.kind === "suspicious" ? `of ${number(data.flagged[label])} suspicious labels` : "images";
      parts.push(section(`Labeled ${data.classes[label]}`, `${number(members.length)} ${of}, most suspicious first`, members));
    }
  }
  if (!parts.length) parts.push(element("p", { class: "empty" }, "No image passes these filters."));
  box.replaceChildren(...parts);
  const first = box.querySelector(".card");
  if (first) first.setAttribute("tabindex", 0);
  if (current && !cards.has(current.index)) current = null;
  if (current) cards.get(current.index).classList.add("current");
  document.getElementById("found").textContent = `${number(visible.length)} of ${number(items.length)} images`;
  drawPanel();
}

// ---------------------------------------------------------------------------------------------------------------------
// Filters.

const ANY = ["", "any"];
const classOptions = (used) => data.classes.map((name, c) => [c, name]).filter(([c]) => used.has(c));
const FILTERS = {
  kind: ["Show", [["suspicious", "suspicious labels"], ["foreign", "foreign images"], ["duplicate", "duplicates"], ["all", "all on this page"]]],
  label: ["Label", [ANY, ...classOptions(new Set(data.labels))]],
  suggested: ["Suggested", [ANY, ...classOptions(new Set(data.suggested))]],
  decision: ["Decision", [ANY, ["none", "not decided"], ["keep", "keep"], ["relabel", "relabel"], ["drop", "drop"]]],
};

function buildFilters() {
  const form = document.getElementById("filters");
  for (const [name, [title, choices]] of Object.entries(FILTERS)) {
    const options = choices.map(([value, text]) => element("option", { value }, text));
    form.append(element("label", {}, title, element("select", { id: `filter-${name}`, change: draw }, ...options)));
  }
  const output = element("output", {}, "0%");
  const slider = element("input", { id: "filter-wrong", type: "range", min: 0, max: 100, value: 0, step: 5, "aria-label": "Wrong with at least",
    input: () => { output.textContent = `${slider.value}%`; }, change: draw });
  form.append(element("label", {}, "Wrong, at least ", output, slider), element("span", { id: "found", role: "status" }));
  form.addEventListener("submit", (event) => event.preventDefault());
  const start = ["suspicious", "foreign", "duplicate"].find((kind) => items.some((item) => item[kind]));
  document.getElementById("filter-kind").value = start || "all";
}

function readFilters() {
  const [kind, label, suggested, decision] = Object.keys(FILTERS).map((name) => document.getElementById(`filter-${name}`).value);
  const wrong = Number(document.getElementById("filter-wrong").value) / 100;
  const accepts = (item) =>
    (kind === "all" || item[kind]) &&
    (label === "" || item.label === Number(label)) &&
    (suggested === "" || item.suggested === Number(suggested)) &&
    (decision === "" || (decisions.get(item.name) || { kind: "none" }).kind === decision) &&
    item.wrong >= wrong;
  return { kind, accepts };
}

// ---------------------------------------------------------------------------------------------------------------------
// The panel at the bottom: the chosen image, what can be decided, the counter, the CSV.

const controls = {};

function buildPanel() {
  const act = (kind) => () => current && decideCurrent(kind);
  controls.picture = element("div", { class: "picture" });
  controls.text = element("div", { class: "text" });
  let byKeys = false;
  const backToCard = () => current && cards.get(current.index).focus({ preventScroll: true });
  controls.select = element("select", {
    id: "new-label", "aria-label": "Relabel to",
    // In the list, the next key would choose another class. Whoever moves through it by keys leaves it by Esc.
    pointerdown: () => { byKeys = false; },
    keydown: () => { byKeys = true; },
    keyup: (event) => { if (event.key === "Escape") backToCard(); },
    change: () => {
      if (!current || controls.select.value === "") return;
      decide([current], "relabel", Number(controls.select.value));
      if (!byKeys) backToCard();
    },
  }, element("option", { value: "" }, "another class ..."), ...data.classes.map((name, c) => element("option", { value: c }, name)));
  controls.buttons = [
    element("button", { type: "button", class: "keep", click: act("keep") }, "Keep ", element("kbd", {}, "k")),
    element("button", { type: "button", class: "relabel", click: act("relabel") }),
    element("button", { type: "button", class: "drop", click: act("drop") }, "Drop ", element("kbd", {}, "d")),
  ];
  controls.undo = element("button", { type: "button", id: "undo", click: undo }, "Undo ", element("kbd", {}, "u"));
  controls.counter = element("span", { id: "counter" });
  controls.download = element("button", { type: "button", id: "download", click: download }, "Download CSV");
  controls.clear = element("button", { type: "button", id: "clear", click: () => {
    if (confirm(`Forget all ${decisions.size} decisions?`)) {
      history.length = 0;
      decisions.clear();
      save();
      refresh(items);
    }
  } }, "Forget all");
  panel.append(controls.picture,
    element("div", { class: "middle" }, controls.text, element("div", { class: "buttons" }, ...controls.buttons, controls.select, controls.undo)),
    element("div", { class: "end" }, controls.counter, element("div", { class: "buttons" }, controls.download, controls.clear)));
}

function drawPanel() {
  const item = current;
  controls.picture.replaceChildren();
  if (item) {
    const large = thumbnail(item, 128);
    paint(large);
    controls.picture.append(large);
  }
  controls.text.replaceChildren(...(item ? panelText(item) : ["Choose an image, by click or with the Tab and arrow keys."]));
  const suggestion = item && item.other !== null ? `Relabel: ${data.classes[item.other]} ` : "Relabel ";
  controls.buttons[1].replaceChildren(suggestion, element("kbd", {}, "r"));
  controls.buttons[1].disabled = !item || item.other === null;
  controls.buttons[0].disabled = controls.buttons[2].disabled = controls.select.disabled = !item;
  const d = item && decisions.get(item.name);
  for (const button of controls.buttons) button.setAttribute("aria-pressed", Boolean(d && button.classList.contains(d.kind)));
  controls.select.value = d && d.to !== null ? d.to : "";
  controls.undo.disabled = !history.length;
  controls.download.disabled = controls.clear.disabled = !decisions.size;
  controls.counter.textContent = counter() + (stored ? "" : " This browser cannot keep them: download before you close the page.");
}

function panelText(item) {
  const strong = (text) => element("b", {}, text);
  const line = ["Labeled ", strong(data.classes[item.label]), `, wrong with a probability of ${percent(item.wrong)}`];
  if (item.other !== null) {
    line.push("; suggested: ", strong(data.classes[item.other]), item.probability === null ? "" : ` (${percent(item.probability)})`);
  }
  const lines = [element("div", {}, ...line), element("div", { class: "file", title: item.name }, item.file)];
  if (item.duplicate) lines.push(element("div", { class: "file" }, `same as ${item.twin}`));
  return lines;
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys: k, r, d decide and go on to the next image, u takes back, arrows move.

function decideCurrent(kind, move = 0) {
  if (kind === "relabel" && current.other === null) {
    controls.select.focus();
    return;
  }
  decide([current], kind);
  if (move) step(move);
}

function order() {
  return [...box.querySelectorAll(".card")];
}

function itemOf(node) {
  for (const [index, other] of cards) if (other === node) return items[index];
}

function step(offset) {
  const nodes = order();
  const next = nodes[nodes.indexOf(cards.get(current.index)) + offset];
  if (next) choose(itemOf(next), true);
}

// Move to the nearest card in the row above (-1) or below (1).
function stepRow(direction) {
  const from = cards.get(current.index).getBoundingClientRect();
  let best = null;
  let distance = Infinity;
  for (const node of order()) {
    const to = node.getBoundingClientRect();
    const rows = direction * (to.top - from.top);
    const far = rows * 1000 + Math.abs(to.left - from.left);
    if (rows > from.height / 2 && far < distance) [best, distance] = [node, far];
  }
  if (best) choose(itemOf(best), true);
}

const KEYS = {
  k: () => decideCurrent("keep", 1), r: () => decideCurrent("relabel", 1), d: () => decideCurrent("drop", 1), u: undo,
  ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => stepRow(1), ArrowUp: () => stepRow(-1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, input")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const arrow = key.startsWith("Arrow"); // outside the images arrows scroll the page
  if (!Object.hasOwn(KEYS, key) || (arrow && !event.target.closest(".card"))) return;
  if (key !== "u" && !current) return;
  event.preventDefault();
  KEYS[key]();
});

document.getElementById("intro").textContent =
  `${number(items.length)} images: the most suspicious labels, foreign images and duplicates, a share of each class. ` +
  "Keep a label that is right, relabel one that is wrong, drop an image that does not belong here. " +
  "Keys: k, r, d decide, u takes back, arrows move. This browser keeps your decisions. At the end download them: " +
  "dataset_tool.py --labels=decisions.csv applies them to this archive.";
// Another tab with this page has decided something, or it has forgotten all.
window.addEventListener("storage", (event) => {
  if (event.key !== data.key) return;
  decisions.clear();
  load();
  refresh(items);
});
load();
buildFilters();
buildPanel();
draw();
