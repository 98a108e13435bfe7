(() => {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = (layout) => ({
    ...layout,
    font: { family: "system-ui, sans-serif", size: 13, color: css("--ink") },
    xaxis: { ...layout.xaxis, gridcolor: css("--line"), linecolor: css("--line") },
    yaxis: { ...layout.yaxis, gridcolor: css("--line"), linecolor: css("--line") },
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") }, align: "left" },
  });
  const inked = (trace) =>
    trace.meta === "ink"
      ? {
          ...trace,
          line: { ...trace.line, color: css("--ink") },
          marker: { ...trace.marker, color: css("--ink") },
          textfont: { color: css("--ink") },
        }
      : trace;

  // Where the library cannot draw, the static picture stays.
  const draw = (figure) => {
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    const target = figure.querySelector(".plot");
    figure.classList.add("live");
    Plotly.react(target, data.map(inked), themed(layout), {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
    }).catch(() => figure.classList.remove("live"));
  };
  const drawAll = () => document.querySelectorAll("figure[data-plot]").forEach(draw);
  if (window.Plotly) {
    drawAll();
    dark.addEventListener("change", drawAll);
  }

  const sortBy = (header) => {
    const table = header.closest("table");
    const column = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    const value = (row) => row.cells[column]?.dataset.value ?? "";
    const compare = (a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === "" || right === "") return (left === "") - (right === "");
      const order = isNaN(left) || isNaN(right) ? left.localeCompare(right) : left - right;
      return down ? -order : order;
    };
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  };
  document.querySelectorAll("thead button").forEach((button) => {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  });
})();
