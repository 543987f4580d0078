/* Charts of the pages, drawn by ECharts: zoom by dragging, hover in all charts of one axis, smoothing, axes, downloads. */
window.tracemlCharts = (() => {
  const given = new Map(); // element id -> the option as the server sent it
  const waiting = new Map();
  const touch = window.matchMedia("(pointer: coarse)");
  let kept = null;

  /* Read when they are needed: the first access to storage takes long, and would delay the first paint. */
  function settings() {
    if (kept) return kept;
    kept = { axis: "step", smooth: 0, log: false };
    try { Object.assign(kept, JSON.parse(localStorage.getItem("traceml-charts") ?? "{}")); } catch { /* private window */ }
    return kept;
  }

  const chartOf = (id) => window.getElement?.(Number(id))?.chart;
  const idOf = (card) => card.querySelector(".canvas")?.id.slice(1);
  const isMetric = (id) => document.getElementById(`c${id}`)?.closest("#metrics") != null;
  const isLines = (option) => option.series.length > 0 && option.series.every((each) => each.type === "line");
  const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(5))) : "-");

  function draw(charts) {
    for (const [id, option] of Object.entries(charts)) {
      given.set(id, option);
      waiting.set(id, option);
      drawOne(id, option);
    }
  }

  /* Draws a chart when NiceGUI has made it, however long a busy machine takes for that. */
  function drawOne(id, option) {
    const chart = chartOf(id);
    if (!chart) {
      if (document.getElementById(`c${id}`)) setTimeout(() => waiting.get(id) === option && drawOne(id, option), 25);
      return;
    }
    waiting.delete(id);
    const before = chart.getOption();
    const drawn = dressed(option, isMetric(id));
    const shape = (series, axis) => JSON.stringify([(series ?? []).map((each) => [each.name, each.type]), axis]);
    const same = shape(before?.series, before?.yAxis?.[0]?.type) === shape(drawn.series, [drawn.yAxis].flat()[0].type);
    chart.setOption(drawn, { notMerge: !same, lazyUpdate: same });
    prepare(chart, drawn, same);
  }

  /* Returns the option with units, a description for screen readers, and the settings of the reader. */
  function dressed(option, metric) {
    const { traceml, ...rest } = option;
    const units = [rest.yAxis].flat().map((axis) => axis.name ?? "");
    const unit = units[0] || (rest.xAxis.name === "ms" ? "ms" : "");
    let result = { ...rest, aria: { enabled: true } };
    result.tooltip = { ...rest.tooltip, valueFormatter: (value) => (unit && units.length < 2 ? `${number(value)} ${unit}` : number(value)) };
    if (!isLines(rest)) return result;
    if (metric && rest.xAxis.type === "value") result = chosen(result, traceml);
    const wheel = { zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: false };
    result.dataZoom = [{ type: "inside", ...wheel }];
    result.toolbox = { show: true, itemSize: 0, showTitle: false, feature: { dataZoom: { yAxisIndex: "none" } } };
    return result;
  }

  function chosen(option, axes) {
    const xs = axes?.[settings().axis];
    let series = option.series.map((each, at) => (xs ? { ...each, data: each.data.map((pair, n) => [xs[at][n], pair[1]]) } : each));
    let { xAxis, yAxis } = option;
    if (xs) {
      const all = xs.flat();
      const ends = { min: Math.min(...all), max: Math.max(...all) };
      xAxis = { ...xAxis, ...ends, name: settings().axis === "seconds" ? "s" : "epoch" };
    }
    if (settings().smooth > 0) series = series.flatMap(smoothed);
    if (settings().log && !Array.isArray(yAxis)) {
      yAxis = { ...yAxis, type: "log", min: undefined, max: undefined };
      series = series.map((each) => ({ ...each, data: each.data.map(([x, y]) => [x, y > 0 ? y : null]) }));
    }
    return { ...option, xAxis, yAxis, series };
  }

  /* Returns the exponential moving mean of a line, above the line itself. */
  function smoothed(line) {
    let mean = null, weight = 0;
    const data = line.data.map(([x, y]) => {
      if (y === null) return [x, null];
      mean = settings().smooth * (mean ?? 0) + (1 - settings().smooth) * y;
      weight = settings().smooth * weight + (1 - settings().smooth);
      return [x, mean / weight];
    });
    const faint = { ...line, lineStyle: { ...line.lineStyle, opacity: 0.25 }, tooltip: { show: false }, silent: true };
    return [{ ...line, data }, faint];
  }

  function prepare(chart, option, known) {
    if (!isLines(option)) return;
    const axis = [option.xAxis].flat()[0];
    chart.group = `${axis.type}-${axis.name}`;
    import("nicegui-echart").then(({ echarts }) => echarts.connect(chart.group));
    if (!known && !touch.matches) {
      chart.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
      chart.getZr().off("dblclick");
      chart.getZr().on("dblclick", () => unzoom(chart));
    }
  }

  const unzoom = (chart) => chart.dispatchAction({ type: "dataZoom", start: 0, end: 100 });

  /* Returns the values of a chart as rows, the first one the headings. */
  function rows(option) {
    const x = option.xAxis.name || "value", categories = option.xAxis.data ?? option.yAxis.data;
    if (option.series[0]?.type === "heatmap") {
      const cells = option.series[0].data.map(([step, row, value]) => [option.xAxis.data[step], option.yAxis.data[row], value]);
      return [[x, "rank", option.series[0].name], ...cells];
    }
    const heads = [option.xAxis.data ? x : categories ? "" : x, ...option.series.map((each) => each.name)];
    if (categories) return [heads, ...categories.map((label, at) => [label, ...option.series.map((each) => each.data[at])])];
    const lines = new Map();
    option.series.forEach((each, at) => {
      for (const [place, value] of each.data) {
        if (!lines.has(place)) lines.set(place, [place, ...option.series.map(() => null)]);
        lines.get(place)[at + 1] = value;
      }
    });
    return [heads, ...[...lines.values()].sort((a, b) => a[0] - b[0])];
  }

  function csv(option) {
    const cell = (value) => {
      // A spreadsheet would run a text that begins like a formula.
      const text = typeof value === "string" && /^[=+\-@]/.test(value) ? `'${value}` : String(value ?? "");
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return rows(option).map((row) => row.map(cell).join(",")).join("\n");
  }

  function save(address, name) {
    const link = document.createElement("a");
    link.href = address;
    link.download = name.replace(/[^\w.-]+/g, "_");
    link.click();
  }

  function fillTable(place, option) {
    const table = document.createElement("table");
    const [heads, ...lines] = rows(option);
    const add = (parent, texts, tag) => {
      const row = parent.appendChild(document.createElement("tr"));
      for (const text of texts) {
        const cell = row.appendChild(document.createElement(tag));
        cell.textContent = typeof text === "number" ? number(text) : String(text ?? "-");
        if (tag === "th") cell.scope = "col";
      }
    };
    add(table.createTHead(), heads, "th");
    lines.slice(0, 500).forEach((line) => add(table.tBodies[0] ?? table.createTBody(), line, "td"));
    place.replaceChildren(table);
    if (lines.length > 500) place.append(`The first 500 of ${lines.length} rows; the CSV file has all.`);
  }

  const actions = {
    full: (card) => (document.fullscreenElement ? document.exitFullscreen() : card.requestFullscreen()),
    unzoom: (card, chart) => unzoom(chart),
    png: (card, chart, name) => {
      const backgroundColor = getComputedStyle(card).backgroundColor;
      save(chart.getDataURL({ type: "png", pixelRatio: 2, backgroundColor, excludeComponents: ["toolbox"] }), `${name}.png`);
    },
    csv: (card, chart, name, option) => save(URL.createObjectURL(new Blob([csv(option)], { type: "text/csv" })), `${name}.csv`),
    table: (card, chart, name, option) => {
      const place = card.querySelector(".datatable");
      place.hidden = !place.hidden;
      if (!place.hidden) { fillTable(place, option); place.focus(); }
    },
  };

  function act(button) {
    const card = button.closest(".chart"), id = idOf(card);
    const chart = chartOf(id), option = given.get(id);
    traceml.closeMenu(button.closest("details"));
    if (chart && option) actions[button.dataset.chart]?.(card, chart, card.getAttribute("aria-label"), option);
  }

  function set(control) {
    settings()[control.dataset.setting] = control.type === "checkbox" ? control.checked : control.type === "range" ? Number(control.value) : control.value;
    try { localStorage.setItem("traceml-charts", JSON.stringify(settings())); } catch { /* private window */ }
    for (const [id, option] of given) if (isMetric(id)) drawOne(id, option);
  }

  function showSettings() {
    for (const control of document.querySelectorAll("[data-setting]")) {
      const value = settings()[control.dataset.setting];
      if (control.type === "checkbox") control.checked = value;
      else control.value = value;
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-chart]");
    if (button) act(button);
    for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
  });
  document.addEventListener("input", (event) => event.target.dataset?.setting && set(event.target));
  document.addEventListener("DOMContentLoaded", () => traceml.whenBuilt(showSettings));
  return { draw, rows, csv, settings };
})();
