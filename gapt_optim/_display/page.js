"use strict";
// Keeps the charts of the page in step with its controls. Plotly has drawn them already; nothing is fetched.
(function () {
  const root = document.documentElement, charts = [...document.querySelectorAll(".js-plotly-plot")];
  const hidden = new Set(), phases = document.getElementById("phases");
  let linking = false;

  function setTheme(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  }

  function refresh(chart) {
    const view = document.getElementById(chart.id + "-view");
    const visible = chart.data.map(({ meta = {} }) =>
      !hidden.has(meta.run) && (!phases || meta.phases === undefined || String(meta.phases) === phases.value)
      && (!view || meta.view === undefined || meta.view === view.value));
    if (view) chart.closest("figure").querySelector(".view").textContent = view.selectedOptions[0].textContent;
    return Plotly.restyle(chart, { visible });
  }

  // Charts over steps show the same stretch. A double click shows everything again.
  async function follow(zoomed, change) {
    const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"], all = change["xaxis.autorange"];
    if (linking || (from === undefined && !change["xaxis.range"] && !all)) return;
    linking = true;
    for (const chart of charts) {
      if (chart === zoomed || !chart.closest(".over-steps")) continue;
      await Plotly.relayout(chart, { "xaxis.range": zoomed.layout.xaxis.range.slice() });
    }
    linking = false;
  }

  // A printer has no window to fit: two charts beside each other on a sheet of A4 or letter, in light colours.
  let before = null;
  function toPaper() {
    before = root.dataset.theme;
    setTheme("light");
    for (const chart of charts) {
      Plotly.relayout(chart, { autosize: false, width: 335, height: chart.closest(".tall") ? 250 : 180 });
    }
  }
  function fromPaper() {
    for (const chart of charts) Plotly.relayout(chart, { autosize: true, width: null, height: null });
    setTheme(before);
  }

  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  window.addEventListener("beforeprint", toPaper);
  window.addEventListener("afterprint", fromPaper);
  if (phases) phases.addEventListener("change", () => charts.forEach(refresh));
  for (const box of document.querySelectorAll("input[data-run]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.run);
      if (box.checked) hidden.delete(run); else hidden.add(run);
      document.querySelectorAll(`figure[data-run="${run}"]`).forEach((figure) => { figure.hidden = !box.checked; });
      charts.forEach(refresh);
    });
  }
  for (const chart of charts) {
    const view = document.getElementById(chart.id + "-view");
    if (view) view.addEventListener("change", () => refresh(chart));
    if (chart.closest(".over-steps")) chart.on("plotly_relayout", (change) => follow(chart, change));
  }
  document.body.dataset.ready = "yes";
})();
