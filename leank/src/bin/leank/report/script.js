"use strict";
document.documentElement.classList.add("scripted");

// Light or dark: from what the system says, to the other one.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const bit = (bits, at) => (bits[at >> 3] >> (at & 7)) & 1;

// Heat maps: the cell under the pointer, or the one that arrow keys lead to, in words.
for (const box of document.querySelectorAll("[data-cells]")) {
  const svg = box.querySelector("svg");
  const out = box.parentElement.querySelector("output");
  const grid = JSON.parse(box.querySelector("script").textContent);
  const kept = bytes(grid.kept);
  const other = grid.other && bytes(grid.other);
  const scores = grid.scores && new DataView(bytes(grid.scores).buffer);
  const half = grid.head_dim >> 1;
  const layerPitch = grid.kv_heads * grid.pitch + grid.layer_gap;
  const cursor = document.createElementNS(svg.namespaceURI, "rect");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("visibility", "hidden");
  svg.append(cursor);
  let place = { row: 0, column: 0 };

  const show = (row, column) => {
    const rows = grid.layers * grid.kv_heads;
    row = Math.min(Math.max(row, 0), rows - 1);
    column = Math.min(Math.max(column, 0), grid.head_dim - 1);
    place = { row, column };
    const layer = Math.floor(row / grid.kv_heads);
    const head = row % grid.kv_heads;
    const pair = grid.paired ? column >> 1 : column;
    const channel = grid.paired ? pair + (column & 1) * half : column;
    const at = row * grid.head_dim + channel;
    const words = [`layer ${layer}`, `KV head ${head}`, `channel ${channel}`];
    if (grid.wavelengths.length) {
      words.push(`${grid.wavelengths[pair].toLocaleString("en")} tokens per turn`);
    }
    if (other) {
      words.push(["kept by neither", "kept by this mask alone", "kept by the other alone",
        "kept by both"][bit(kept, at) + 2 * bit(other, at)]);
    } else {
      if (scores) words.push(`score ${scores.getFloat32(4 * at, true).toPrecision(3)}`);
      words.push(bit(kept, at) ? "kept" : "pruned");
    }
    out.textContent = words.join(" · ");
    cursor.setAttribute("x", grid.left + column * grid.cell_width - 0.5);
    cursor.setAttribute("y", grid.top + layer * layerPitch + head * grid.pitch - 0.5);
    cursor.setAttribute("width", grid.cell_width + 1);
    cursor.setAttribute("height", grid.row_height + 1);
    cursor.setAttribute("visibility", "visible");
  };

  const point = (event) => {
    const area = svg.getBoundingClientRect();
    const zoom = svg.viewBox.baseVal.width / area.width;
    const x = (event.clientX - area.left) * zoom - grid.left;
    const y = (event.clientY - area.top) * zoom - grid.top;
    const column = Math.floor(x / grid.cell_width);
    const layer = Math.floor(y / layerPitch);
    const head = Math.floor((y - layer * layerPitch) / grid.pitch);
    const inside = column >= 0 && column < grid.head_dim && layer >= 0 && layer < grid.layers;
    if (inside && head < grid.kv_heads) show(layer * grid.kv_heads + head, column);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    show(place.row + step[0], place.column + step[1]);
  });
}
