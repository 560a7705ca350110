// The page of `raypipe view`. Texts of the run are only ever set as text, never as markup.
"use strict";

const $ = id => document.getElementById(id);
const PAGE = 60;      // samples of a page
const BATCH = 12;     // images of a request
const state = { offset: 0, total: 0, run: null, shown: [], chosen: new Set(), all: false, search: 0, detail: 0 };

// The token comes after # in the address, and leaves the address at once.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) sessionStorage.setItem("token", given);
history.replaceState(null, "", location.pathname);
const token = given || sessionStorage.getItem("token") || "";

async function ask(path, fields = {}, body = null) {
  const query = new URLSearchParams(fields).toString();
  const answer = await fetch(`api/${path}${query ? "?" + query : ""}`, {
    headers: { "X-Raypipe-Token": token },
    ...(body ? { method: "POST", body: JSON.stringify(body) } : {}),
  }).catch(() => { throw new Error("raypipe view has ended; start it again"); });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const count = n => n.toLocaleString("en-US");
const number = n => n === null ? "?" : String(Number(n.toPrecision(3)));
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

function failed(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// -- search --------------------------------------------------------------------------------

function filters() {
  const fields = Object.fromEntries(new FormData($("form")));
  if (!fields.keep) delete fields.kept;
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== ""));
}

async function search(offset = 0) {
  const mine = ++state.search;
  $("form").elements.kept.disabled = !$("form").elements.keep.value;
  try {
    const found = await ask("samples", { ...filters(), offset, limit: PAGE });
    if (mine !== state.search) return;  // a later search has been made
    if (offset && offset >= found.total) {  // marks can leave the last page empty
      await search(PAGE * Math.max(0, Math.ceil(found.total / PAGE) - 1));
      return;
    }
    failed(null);
    Object.assign(state, { offset, total: found.total, shown: found.samples });
    $("status").textContent = `${plural(found.total, "sample")} of ${count(state.run.samples)}`;
    $("list").textContent = found.list && `${found.list}. Faded: pruned.`;
    const last = Math.min(offset + found.samples.length, found.total);
    $("page").textContent = found.total ? `${count(offset + 1)}–${count(last)}` : "";
    $("previous").disabled = offset === 0;
    $("next").disabled = last >= found.total;
    $("choose-page").disabled = $("choose-all").disabled = !found.total;
    $("choose-all").textContent = `Choose all ${count(found.total)}`;
    $("grid").replaceChildren(...found.samples.map(sample => tile(sample, true)));
    chosen();
    await images($("grid"), "tile", () => mine === state.search);
  } catch (error) {
    if (mine === state.search) failed(error);
  }
}

async function images(grid, size, current) {
  const rows = [...grid.querySelectorAll("[data-row]")].map(each => each.dataset.row);
  for (let start = 0; start < rows.length; start += BATCH) {
    const some = rows.slice(start, start + BATCH);
    const found = await ask("images", { rows: some.join(","), size });
    if (!current()) return;
    for (const row of some) {
      for (const each of grid.querySelectorAll(`[data-row="${row}"] .none`)) show(each, found[row]);
    }
  }
}

function show(place, image) {
  if (!image.uri) { place.textContent = image.reason || "no image"; return; }
  place.replaceWith(element("img", { src: image.uri, alt: "", className: image.pixelated ? "pixelated" : "" }));
}

function tile(sample, choosable, line = "") {
  const open = element("button", { type: "button", className: "open", title: sample.id },
    element("div", { className: "none" }));
  open.setAttribute("aria-label", `${sample.id}, ${sample.name}, score ${number(sample.score)}`);
  open.addEventListener("click", () => detail(sample.row));
  const made = element("figure", { className: "tile" }, open);
  made.dataset.row = sample.row;
  made.classList.toggle("pruned", sample.in_list === false);
  if (choosable) {
    const box = element("input", { type: "checkbox", className: "choose", tabIndex: -1 });
    box.setAttribute("aria-label", `Choose ${sample.id}`);
    box.addEventListener("change", () => choose(sample.row, box.checked));
    made.append(box);
  }
  if (sample.mark) {
    made.append(element("span", { className: `flag ${sample.mark}`, textContent: sample.mark }));
  }
  made.append(element("figcaption", {},
    element("span", { className: "line" }, element("b", { textContent: number(sample.score) }), line),
    element("span", { className: "line", textContent: sample.name, title: sample.name }),
    element("span", { className: "line id" }, element("bdi", { textContent: sample.id }))));
  return made;
}

// -- lists ---------------------------------------------------------------------------------

function choose(row, on) {
  if (state.all) { state.all = false; state.chosen.clear(); }
  if (on) state.chosen.add(row); else state.chosen.delete(row);
  chosen();
}

function chosen() {
  for (const each of $("grid").children) {
    const on = state.all || state.chosen.has(Number(each.dataset.row));
    each.classList.toggle("chosen", on);
    each.querySelector(".choose").checked = on;
  }
  const samples = state.all ? state.total : state.chosen.size;
  const lists = state.run.lists;
  $("bar").hidden = !samples && !state.run.command;
  $("chosen").textContent = samples ? `${count(samples)} chosen` : "";
  for (const id of ["always", "never", "unmark", "drop"]) {
    $(id).hidden = !samples || (id in { always: 1, never: 1 } && !(id in lists)) ||
      (id === "unmark" && !Object.keys(lists).length);
  }
  $("bar-text").replaceChildren();
  if (!Object.keys(lists).length) {
    $("bar-text").textContent = "To write a list, start raypipe view with --always-keep FILE or --never-keep FILE.";
    return;
  }
  const parts = Object.entries(lists).map(([name, list]) => `${name} keep: ${plural(list.ids, "id")} in ${list.file}`);
  $("bar-text").append(parts.join(" · "));
  if (state.run.command) {
    $("bar-text").append(" · cut lists with ", element("code", { textContent: state.run.command }));
  }
}

async function mark(word) {
  const focused = document.activeElement?.closest("#grid [data-row]")?.dataset.row;
  const rows = state.chosen.size ? [...state.chosen] : focused ? [Number(focused)] : [];
  if (!state.all && !rows.length) return;
  try {
    const body = state.all ? { query: filters(), mark: word } : { rows, mark: word };
    Object.assign(state.run, await ask("mark", {}, body));
    drop();
    await search(state.offset);
    if (focused) $("grid").querySelector(`[data-row="${focused}"] .open`)?.focus();
  } catch (error) { failed(error); }
}

function drop() {
  state.all = false;
  state.chosen.clear();
  chosen();
}

// -- one sample ----------------------------------------------------------------------------

async function detail(row) {
  const mine = ++state.detail;
  const current = () => mine === state.detail;
  // the first answer copies embeddings, which can take seconds
  $("detail-id").textContent = "Loading …";
  for (const id of ["facts", "why", "detail-image", "similar"]) $(id).replaceChildren();
  if (!$("detail").open) $("detail").showModal();
  try {
    const sample = await ask("sample", { row });
    if (!current()) return;  // another sample has been opened
    $("detail-id").textContent = sample.id;
    const facts = [["score", number(sample.score)]];
    if (sample.lower !== sample.upper) facts.push(["interval", `${number(sample.lower)} to ${number(sample.upper)}`]);
    facts.push([state.run.clusters ? "cluster" : "label", sample.name]);
    if (sample.proxy) facts.push(["proxy predicts", `${sample.proxy.name}, ${sample.proxy.confidence === null ? "?" : Math.round(100 * sample.proxy.confidence)} % sure`]);
    if (sample.rank) facts.push([state.run.clusters ? "between clusters" : "label to check", `${count(sample.rank)} of ${count(state.run.doubtful)}`]);
    if (state.run.embedded) facts.push(["drawn for", sample.set ? `${sample.set} set` : "neither set"]);
    if (sample.kept.length) facts.push(["keep-lists", sample.kept.map(list => `${list.fraction}: ${list.kept ? "kept" : "pruned"}`).join(", ")]);
    if (sample.mark) facts.push(["your lists", `${sample.mark} keep`]);
    $("facts").replaceChildren(...facts.flatMap(([name, value]) =>
      [element("dt", { textContent: name }), element("dd", { textContent: value })]));
    $("why").textContent = sample.why;
    const place = element("div", { className: "none" });
    const image = element("div", {}, place);
    image.dataset.row = row;
    $("detail-image").replaceChildren(image);
    const searched = sample.searched < state.run.samples ? ` (searched: ${count(sample.searched)} of ${count(state.run.samples)})` : "";
    $("similar").replaceChildren();
    for (const [title, tiles] of [["Nearest measured samples", sample.measured_nearest], ["Most similar samples", sample.nearest]]) {
      if (!tiles.length) continue;
      $("similar").append(element("h3", { textContent: title + searched }),
        element("div", { className: "grid" }, ...tiles.map(each => tile(each, false, ` · ${each.similarity.toFixed(2)}`))));
    }
    if (tilesOf(sample)) $("similar").append(element("p", { className: "small muted", textContent: "Below each image: score and cosine similarity of the embeddings." }));
    $("detail").scrollTop = 0;
    await images($("detail-image"), "detail", current);
    await images($("similar"), "tile", current);
  } catch (error) {
    if (!current()) return;
    $("detail").close();
    failed(error);
  }
}

const tilesOf = sample => sample.nearest.length + sample.measured_nearest.length;

// -- keys ----------------------------------------------------------------------------------

function move(key) {
  const tiles = [...$("grid").querySelectorAll(".open")];
  const here = tiles.indexOf(document.activeElement);
  const top = tiles[0]?.getBoundingClientRect().top;
  const columns = Math.max(1, tiles.findIndex(each => each.getBoundingClientRect().top !== top));
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
  tiles[here < 0 ? 0 : Math.min(Math.max(here + step, 0), tiles.length - 1)]?.focus();
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("detail").open) return;
  if (event.target.matches("input:not(.choose), select")) return;
  const key = event.key;
  if (key === "/") { $("filters").open = true; $("form").elements.text.focus(); }
  else if (key.startsWith("Arrow") && event.target.matches(".open, body")) move(key);
  else if (key === "x") {
    const row = event.target.closest("#grid [data-row]")?.dataset.row;
    if (row === undefined) return;
    choose(Number(row), !state.chosen.has(Number(row)));
  }
  else if (key === "a" && "always" in state.run.lists) mark("always");
  else if (key === "n" && "never" in state.run.lists) mark("never");
  else if (key === "u" && Object.keys(state.run.lists).length) mark("none");
  else if (key === "[" && !$("previous").disabled) search(state.offset - PAGE);
  else if (key === "]" && !$("next").disabled) search(state.offset + PAGE);
  else if (key === "Escape") drop();
  else return;
  event.preventDefault();
});

// -- start ---------------------------------------------------------------------------------

// One timer for both: of a reset and an input that follows at once, the first would search for the second's filters,
// and the second would then take a reader who has turned the page back to its start.
let waiting = 0;
function searchIn(milliseconds) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { drop(); search(); }, milliseconds);
}
$("form").addEventListener("input", () => searchIn(150));
$("form").addEventListener("reset", () => searchIn(0));  // the fields are empty only after the event
$("form").addEventListener("submit", event => event.preventDefault());
$("previous").addEventListener("click", () => search(state.offset - PAGE));
$("next").addEventListener("click", () => search(state.offset + PAGE));
$("choose-page").addEventListener("click", () => {
  state.all = false;
  state.shown.forEach(sample => state.chosen.add(sample.row));
  chosen();
});
$("choose-all").addEventListener("click", () => { drop(); state.all = true; chosen(); });
$("always").addEventListener("click", () => mark("always"));
$("never").addEventListener("click", () => mark("never"));
$("unmark").addEventListener("click", () => mark("none"));
$("drop").addEventListener("click", drop);
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => { state.detail++; });  // what is on its way comes too late

async function start() {
  if (matchMedia("(max-width: 899px)").matches) $("filters").open = false;
  try {
    const run = state.run = await ask("run");
    document.title = `raypipe view: ${run.name}`;
    $("name").textContent = run.name;
    $("about").textContent = `${plural(run.samples, "sample")}, scores from ${number(run.low)} to ${number(run.high)} (${run.score}). Run ${run.uri}`;
    $("note").textContent = run.note;
    $("note").hidden = !run.note;
    $("form").elements.label.append(...run.classes.map(each =>
      element("option", { value: each.label, textContent: `${each.name} (${count(each.samples)})` })));
    $("fractions").append(...run.fractions.map(value => element("option", { value })));
    $("form").elements.doubtful.max = run.doubtful;
    if (run.clusters) {
      $("class-word").textContent = "Cluster";
      $("doubt-word").textContent = "Between clusters: first";
    }
    for (const each of document.querySelectorAll(".embedded")) each.hidden = !run.embedded;
    $("mark-filter").hidden = !Object.keys(run.lists).length;
  } catch (error) {
    $("status").textContent = "";
    failed(error);
    return;
  }
  await search();
}
start();
