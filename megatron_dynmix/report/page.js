"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const charts = [...document.querySelectorAll("[data-chart]")];
  const config = { responsive: true, displayModeBar: false };
  const darkSystem = matchMedia("(prefers-color-scheme: dark)");
  const PRINTED_WIDTH = 680; // CSS pixels that fit on A4 and on Letter

  // Plotly takes colours as values: those of the page's theme, so that they are written once
  function themed(layout) {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--grid"), zerolinecolor: colour("--grid") };
    const template = {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: [colour("--ink")],
        font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
        hoverlabel: { bgcolor: colour("--box"), font: { color: colour("--ink") } },
        xaxis: axis, yaxis: axis,
      },
    };
    return { ...layout, template };
  }

  function draw(div) {
    const chart = data.charts[div.dataset.chart];
    // a curve names its axis in meta: the page holds each axis once
    for (const trace of chart.data) if (trace.meta in data.axes) trace.x = data.axes[trace.meta];
    if (chart.frames) chart.data[0].z = frame(chart);
    div.dataset.drawn = "";
    return Plotly.react(div, chart.data, themed(chart.layout), config);
  }

  function frame(chart) {
    const { shape: [, rows, columns], most } = chart.frames;
    chart.bytes ??= Uint8Array.from(atob(chart.frames.bytes), (letter) => letter.charCodeAt(0));
    chart.place ??= chart.frames.iterations.length - 1;
    const start = chart.place * rows * columns;
    return Array.from({ length: rows }, (_, row) =>
      Array.from(chart.bytes.subarray(start + row * columns, start + (row + 1) * columns), (byte) => (byte / 255) * most));
  }

  function draw_missing() {
    const next = charts.find((div) => !("drawn" in div.dataset));
    if (!next) return root.setAttribute("data-ready", "");
    draw(next);
    setTimeout(draw_missing); // one at a time, so that the page can be scrolled meanwhile
  }

  function theme() {
    const chosen = document.querySelector("[name=theme]:checked").value;
    root.dataset.theme = chosen === "auto" ? (darkSystem.matches ? "dark" : "light") : chosen;
  }

  function redraw() {
    for (const div of charts) if ("drawn" in div.dataset) draw(div);
  }

  // the sliders of all heat maps move together, to the update that is nearest
  const sliders = [...document.querySelectorAll(".slider input")];
  const chart_of = (slider) => data.charts[slider.id.replace(/-slider$/, "")];
  function move(slider, place) {
    const chart = chart_of(slider);
    const iteration = chart.frames.iterations[place];
    slider.value = place;
    slider.setAttribute("aria-valuetext", `iteration ${iteration}`);
    slider.nextElementSibling.textContent = `iteration ${iteration}`;
    if (chart.place === place) return;
    chart.place = place;
    const div = document.querySelector(`[data-chart="${slider.id.replace(/-slider$/, "")}"]`);
    if ("drawn" in div.dataset) Plotly.restyle(div, { z: [frame(chart)] });
  }
  for (const slider of sliders) {
    move(slider, Number(slider.value));
    slider.addEventListener("input", () => {
      const wanted = chart_of(slider).frames.iterations[slider.value];
      for (const other of sliders) {
        const distances = chart_of(other).frames.iterations.map((iteration) => Math.abs(iteration - wanted));
        move(other, distances.indexOf(Math.min(...distances)));
      }
    });
  }

  for (const box of document.querySelectorAll("[data-traces]"))
    box.addEventListener("change", () => {
      const chart = data.charts[box.dataset.of];
      const traces = box.dataset.traces.split(" ").map(Number);
      for (const trace of traces) chart.data[trace].visible = box.checked;
      const div = document.querySelector(`[data-chart="${box.dataset.of}"]`);
      if ("drawn" in div.dataset) Plotly.restyle(div, { visible: box.checked }, traces);
    });

  for (const radio of document.querySelectorAll("[name=theme]"))
    radio.addEventListener("change", () => { theme(); redraw(); });
  darkSystem.addEventListener("change", () => { theme(); redraw(); });

  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    for (const div of charts) { draw(div); Plotly.relayout(div, { autosize: false, width: PRINTED_WIDTH }); }
  });
  addEventListener("afterprint", () => {
    theme();
    for (const div of charts) { draw(div); Plotly.relayout(div, { autosize: true, width: null }); }
  });

  theme();
  draw_missing();
})();
