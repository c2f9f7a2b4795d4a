"use strict";
// The page of a run: draws its figures, and makes its tables sortable and filterable. Without it all numbers are there.

// Figures: Vega, with its interpreter of expressions, since the page forbids code that is made from texts.

const drawings = JSON.parse(document.getElementById("drawings").textContent);
const charts = [...document.querySelectorAll("[data-figure]")];
const dark = matchMedia("(prefers-color-scheme: dark)");

/** Return a specification that fits into so many pixels: fewer panels in a row, and narrower ones on a telephone. */
function fitting(drawing, space) {
  const spec = structuredClone(drawing.spec);
  const most = spec.columns ?? 1;
  const fit = Math.max(1, Math.min(most, Math.floor(space / drawing.cell)));
  spec.columns = most % 2 === 0 && fit > 1 ? fit - (fit % 2) : fit; // pairs stay in a row
  for (const panel of spec.concat) panel.width = Math.max(120, panel.width - Math.max(0, drawing.cell - space));
  return spec;
}

async function draw(chart) {
  const space = chart.parentElement.clientWidth;
  if (chart.dataset.space === String(space)) return;
  chart.dataset.space = String(space);
  const options = {
    mode: "vega-lite", ast: true, actions: false, renderer: "svg", config: drawings.look,
    tooltip: { theme: dark.matches ? "dark" : "light" },
  };
  const place = document.createElement("div"); // Vega takes the attributes of its place
  chart.replaceChildren(place);
  const { view } = await vegaEmbed(place, fitting(drawings.figures[chart.dataset.figure], space), options);
  view.addEventListener("click", (event, item) => item?.datum?.name && pick(item.datum.name));
}

async function drawAll() {
  for (const chart of charts) await draw(chart);
  document.documentElement.dataset.drawn = String(charts.length);
}

let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 200);
});

// Tables

/** The rows of a table with what they mean alone: the name that stands before the first of several rows. */
function rowsOf(table) {
  let carried = "";
  return [...table.tBodies].flatMap((body) => [...body.rows].map((row) => {
    const cells = [...row.cells];
    const own = cells[0].textContent.trim();
    const heading = own !== "" && cells.length > 1 && cells.slice(1).every((cell) => cell.textContent.trim() === "");
    if (own !== "") carried = own;
    return { row, body, heading, carried: own === "" && !heading ? carried : "" };
  }));
}

function keyOf(cell) {
  const number = Number(cell.dataset.value ?? cell.textContent.trim().replace(/^([+-]?)\./, "$10.").split(/\s/)[0]);
  return cell.textContent.trim() === "" ? null : Number.isNaN(number) ? cell.textContent.trim() : number;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
}

function enliven(box) {
  const table = box.querySelector("table");
  const rows = rowsOf(table);
  const state = { column: -1, order: 0, words: "" };
  const heads = [...table.tHead.rows[0].cells];

  const show = () => {
    const sorted = state.order !== 0;
    const shown = sorted
      ? rows.filter((one) => !one.heading).map((one) => ({ one, key: keyOf(one.row.cells[state.column]) }))
        .sort((a, b) => (a.key === null || b.key === null ? 1 : state.order) * compare(a.key, b.key)).map(({ one }) => one)
      : rows;
    for (const { row, body, heading, carried } of rows) {
      const text = `${carried} ${row.textContent}`.toLowerCase();
      row.hidden = heading ? sorted || state.words !== "" : !text.includes(state.words) || (state.neuron && row.dataset.neuron !== state.neuron);
      if (carried !== "") {
        row.cells[0].textContent = sorted || state.words !== "" ? carried : "";
        row.cells[0].className = "carried";
      }
      if (!sorted) body.append(row);
    }
    if (sorted) table.tBodies[0].append(...shown.map((one) => one.row));
    heads.forEach((head, i) => {
      if (i === state.column && sorted) head.setAttribute("aria-sort", state.order > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.title = "sort";
    head.append(button);
    button.addEventListener("click", () => {
      state.order = state.column === i ? [1, -1, 0][[0, 1, -1].indexOf(state.order)] : 1;
      state.column = i;
      show();
    });
  });
  if (rows.length > 4) {
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "filter";
    field.setAttribute("aria-label", "filter rows");
    field.addEventListener("input", () => {
      state.words = field.value.trim().toLowerCase();
      show();
    });
    const controls = document.createElement("p");
    controls.className = "controls";
    controls.append(field);
    box.before(controls);
  }
  return (neuron) => {
    state.neuron = neuron;
    show();
  };
}

const tables = new Map([...document.querySelectorAll(".table")].map((box) => [box, enliven(box)]));

// One neuron

const choice = document.getElementById("pick");

function pick(neuron) {
  if (!choice || ![...choice.options].some((option) => option.value === neuron)) return;
  choice.value = neuron;
  choice.dispatchEvent(new Event("change"));
  document.getElementById("neurons").scrollIntoView({ block: "nearest" });
}

if (choice) {
  const box = document.getElementById("neurons");
  const names = new Set([...box.querySelectorAll("tr[data-neuron]")].map((row) => row.dataset.neuron));
  const parts = (name) => name.split(".").map(Number);
  const ordered = [...names].sort((a, b) => parts(a)[0] - parts(b)[0] || parts(a)[1] - parts(b)[1]);
  for (const name of ordered) choice.append(new Option(name, name));
  choice.addEventListener("change", () => {
    const folded = box.closest("details");
    if (folded) folded.open = true;
    tables.get(box)(choice.value);
  });
  box.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-neuron]");
    if (row) pick(choice.value === row.dataset.neuron ? "" : row.dataset.neuron);
  });
}

// Commands

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling;
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = "selected";
    }
  });
}

addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});

drawAll();
