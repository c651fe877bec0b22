"use strict";
// Draws the charts of the page from the data in it, and keeps them in step with the controls. Nothing is fetched.
(async function () {
  const root = document.documentElement;
  const state = { hidden: new Set(), phases: null, drawn: [], linking: false };
  window.gapt = { ready: false, errors: [], state };

  async function unpacked(id) {
    const text = document.getElementById(id).textContent.trim();
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function color(name) {
    return getComputedStyle(root).getPropertyValue(name).trim();
  }

  function setTheme(theme) {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to " + (theme === "dark" ? "light" : "dark") + " colours");
    state.drawn.forEach(recolor);
  }

  function themed(chart) {
    const layout = JSON.parse(JSON.stringify(chart.layout));
    const ink = color("--ink"), faint = color("--faint"), grid = color("--grid"), line = color("--line");
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = Object.assign({ family: "inherit", size: 12 }, layout.font, { color: faint });
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: color("--accent") };
    layout.hoverlabel = { bgcolor: color("--panel"), bordercolor: line, font: { color: ink, size: 12 }, align: "left" };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        Object.assign(layout[key], { gridcolor: grid, linecolor: line, zerolinecolor: line, tickcolor: line });
      }
    }
    return layout;
  }

  function themedTraces(chart) {
    return chart.data.map((trace) => {
      const copy = Object.assign({}, trace);
      if (trace.meta && trace.meta.role === "shade") copy.fillcolor = color("--shade");
      if (trace.meta && trace.meta.role === "strip") copy.fillcolor = color("--compress");
      if (trace.meta && trace.meta.role === "ground") copy.fillcolor = color("--strip");
      if (trace.meta && trace.meta.role === "switch") {
        copy.marker = Object.assign({}, trace.marker, { color: color("--ink") });
      }
      if (trace.type === "heatmap") copy.colorbar = Object.assign({}, trace.colorbar, { outlinewidth: 0 });
      copy.visible = shown(chart, trace);
      return copy;
    });
  }

  function shown(chart, trace) {
    const meta = trace.meta || {};
    if (meta.run !== undefined && state.hidden.has(meta.run)) return false;
    if (meta.view !== undefined && meta.view !== chart.view) return false;
    if (meta.phases !== undefined && meta.phases !== state.phases) return false;
    return true;
  }

  function redraw(chart) {
    const box = document.getElementById(chart.id);
    const layout = themed(chart);
    const range = box.layout && box.layout.xaxis && !box.layout.xaxis.autorange && box.layout.xaxis.range;
    if (range && chart.zoomed) layout.xaxis.range = range.slice();
    return Plotly.react(box, themedTraces(chart), layout);
  }

  function recolor(chart) {
    return redraw(chart);
  }

  async function draw(chart) {
    const box = document.getElementById(chart.id);
    chart.view = chart.views ? chart.views[0].key : undefined;
    const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["resetScale2d"]] };
    await Plotly.newPlot(box, themedTraces(chart), themed(chart), config);
    box.on("plotly_relayout", (change) => follow(chart, change));
    box.addEventListener("keydown", (event) => byKeyboard(chart, box, event));
    const chooser = document.querySelector('select[data-chart="' + chart.id + '"]');
    if (chooser) chooser.addEventListener("change", () => { chart.view = chooser.value; redraw(chart); });
    state.drawn.push(chart);
  }

  // Charts over steps show the same stretch.
  function follow(chart, change) {
    if (state.linking || !chart.group) return;
    const reset = change["xaxis.autorange"];
    const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"];
    if (!reset && from === undefined) return;
    show(chart.group, reset ? null : [from, to]);
  }

  async function show(group, range) {
    if (state.linking) return;
    state.linking = true;
    try {
      for (const chart of state.drawn) {
        if (chart.group !== group) continue;
        chart.zoomed = Boolean(range);
        await Plotly.relayout(chart.id, { "xaxis.range": (range || chart.layout.xaxis.range).slice() });
      }
    } finally { state.linking = false; }
  }

  function byKeyboard(chart, box, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = box.layout.xaxis.range, width = high - low;
    const moves = {
      ArrowLeft: [low - width / 4, high - width / 4], ArrowRight: [low + width / 4, high + width / 4],
      "+": [low + width / 4, high - width / 4], "=": [low + width / 4, high - width / 4],
      "-": [low - width / 2, high + width / 2], 0: null, Home: null,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const home = chart.layout.xaxis.range;
    let range = moves[event.key];
    if (range && home) range = [Math.max(range[0], home[0]), Math.min(range[1], home[1])];
    if (chart.group) show(chart.group, range);
    else { chart.zoomed = Boolean(range); Plotly.relayout(box, { "xaxis.range": range || home }); }
  }

  function connect() {
    document.getElementById("theme").addEventListener("click", () => {
      setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    });
    document.querySelectorAll("input[data-run]").forEach((box) => {
      box.addEventListener("change", () => {
        const run = Number(box.dataset.run);
        if (box.checked) state.hidden.delete(run); else state.hidden.add(run);
        document.querySelectorAll('figure[data-run="' + run + '"]').forEach((figure) => { figure.hidden = !box.checked; });
        state.drawn.forEach(redraw);
      });
    });
    const phases = document.getElementById("phases");
    if (phases) {
      state.phases = Number(phases.value);
      phases.addEventListener("change", () => { state.phases = Number(phases.value); state.drawn.forEach(redraw); });
    }
    const zoom = document.getElementById("zoom");
    if (zoom) {
      zoom.addEventListener("click", async () => {
        for (const group of new Set(state.drawn.map((chart) => chart.group))) if (group) await show(group, null);
      });
    }
    const all = document.getElementById("all-settings");
    if (all) {
      all.addEventListener("change", () => document.querySelector("table.settings").classList.toggle("all", all.checked));
    }
  }

  // A printer has no window to fit: two charts beside each other on a sheet of A4 or letter, in light colours.
  let before = null;
  function toPaper() {
    if (before !== null) return;
    before = root.dataset.theme;
    setTheme("light");
    for (const chart of state.drawn) {
      const box = document.getElementById(chart.id), wide = box.closest("figure").classList.contains("wide");
      Plotly.relayout(box, { autosize: false, width: wide ? 680 : 330, height: box.classList.contains("tall") ? 300 : 220 });
    }
  }
  function fromPaper() {
    if (before === null) return;
    for (const chart of state.drawn) Plotly.relayout(chart.id, { autosize: true, width: null, height: null });
    setTheme(before);
    before = null;
  }

  try {
    setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    connect();
    const script = document.createElement("script");
    script.textContent = await unpacked("plotly");
    document.head.appendChild(script);
    const charts = JSON.parse(await unpacked("charts"));
    window.addEventListener("beforeprint", toPaper);
    window.addEventListener("afterprint", fromPaper);
    for (const chart of charts) {
      await draw(chart);
      if (state.drawn.length === 1) performance.mark("gapt-first-chart");
      await new Promise((resolve) => setTimeout(resolve, 0));
    }
    window.gapt.charts = charts;
  } catch (error) {
    window.gapt.errors.push(String(error));
    const note = document.getElementById("failed");
    note.hidden = false;
    throw error;
  } finally {
    window.gapt.ready = true;
  }
})();
