// Where scripts run, each picture gives way to a chart to point at, once it is about to be seen.
(async () => {
  "use strict";
  const figures = [...document.querySelectorAll("figure")];
  for (const figure of figures) {
    const link = figure.querySelector(".save");
    link.href = figure.querySelector("img").src;
    link.hidden = false;
  }
  if (!("DecompressionStream" in window)) return; // a browser of before 2023 keeps the pictures

  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(stream).text();
  document.head.append(library);

  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const touches = matchMedia("(pointer: coarse)").matches; // there, to drag is to scroll

  function themed(layout) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const axis = (own) => ({
      ...own, gridcolor: colour("--grid"), linecolor: colour("--soft"), zeroline: false, automargin: true,
      exponentformat: "power", hoverformat: ".4~g",
    });
    return {
      ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--shade"), bordercolor: colour("--grid"), font: { color: colour("--ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      margin: { l: 52, r: 12, t: 12, b: 44 }, dragmode: touches ? false : "zoom",
    };
  }

  async function draw(figure) {
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    const plot = figure.querySelector(".plot");
    figure.classList.add("drawn"); // before: the chart is as large as its place
    const names = data.filter((trace) => trace.showlegend !== false && trace.name).map((trace) => trace.name);
    const widest = 6.3 * Math.max(0, ...names.map((name) => name.length)) + 50; // plotly.js makes columns of it
    const rows = Math.ceil(names.length / Math.max(1, Math.floor((plot.clientWidth - 64) / widest)));
    plot.style.height = `${plot.clientHeight + 19 * Math.max(0, rows - 1)}px`; // room for the legend
    try {
      await Plotly.newPlot(plot, data, themed(layout), { responsive: true, displayModeBar: false, displaylogo: false });
      isDark.addEventListener("change", () => Plotly.react(plot, plot.data, themed(layout)));
    } catch (error) {
      figure.classList.remove("drawn");
      console.error(error);
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        seen.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "600px" });
  figures.forEach((figure) => seen.observe(figure));
})();
