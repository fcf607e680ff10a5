// The token canvas: a grid of tokens that can be played, drawn on and painted.
// The traits of its model are described in canvas.py. One file, no imports.

const FADE = 160; // milliseconds in which a token appears while playing
const SIDE = 448; // largest side of the grid in CSS pixels
const BARS = 56; // height of the bars
const WATCHED = ["turns", "steps", "step", "mask", "drawn", "mode", "brush", "erase", "message", "label"];

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// drawn here, since not every font has them
const ICONS = {
  first: "M3 3h2v10H3zM13 3v10L6 8z",
  back: "M12 3v10L4 8z",
  play: "M4 3l9 5-9 5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  next: "M3 3l7 5-7 5zM11 3h2v10h-2z",
};

function paint(button, label, icon) {
  button.setAttribute("aria-label", label);
  button.title = label;
  button.innerHTML = `<svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">` +
    `<path fill="currentColor" d="${ICONS[icon]}"/></svg>`;
}

function toPicture(message, buffer) {
  // RGB bytes of a picture, as a canvas that can be drawn in parts
  const rgb = new Uint8Array(buffer.buffer ?? buffer, buffer.byteOffset ?? 0, buffer.byteLength);
  const picture = element("canvas", { width: message.width, height: message.height });
  const context = picture.getContext("2d");
  const pixels = context.createImageData(message.width, message.height);
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    pixels.data.set([rgb[i], rgb[i + 1], rgb[i + 2], 255], j);
  }
  context.putImageData(pixels, 0, 0);
  return picture;
}

// the cells that a straight line between two cells goes through
function cellsBetween([x0, y0], [x1, y1]) {
  const n = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1);
  const at = (i) => [Math.round(x0 + ((x1 - x0) * i) / n), Math.round(y0 + ((y1 - y0) * i) / n)];
  return Array.from({ length: n + 1 }, (_, i) => at(i));
}

function render({ model, el }) {
  const pictures = new Map(); // step -> picture after that step; -1: one for all steps
  const get = (name) => model.get(name);
  const set = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };

  // ------------------------------------------------------------------ what is on the page
  const canvas = element("canvas", { class: "mar-grid", tabindex: "0" });
  const bars = element("canvas", { class: "mar-bars" });
  const button = (label, icon) => {
    const made = element("button", { type: "button" });
    paint(made, label, icon);
    return made;
  };
  const first = button("To the beginning", "first");
  const back = button("One step back", "back");
  const play = button("Play", "play");
  const next = button("One step on", "next");
  const range = element("input", { type: "range", min: "0", "aria-label": "Step" });
  const transport = element("div", { class: "mar-transport" }, first, back, play, next, range);
  const status = element("p", { class: "mar-status", "aria-live": "polite" });
  const message = element("p", { class: "mar-message", role: "alert" });
  const root = element("div", { class: "mar-canvas" }, canvas, bars, transport, status, message);
  el.append(root);

  let playing = false;
  let shownAt = -Infinity; // when the current step appeared, for the fade
  let cursor = null; // [x, y] of the keyboard's brush
  let stroke = null; // the last cell of the stroke under way
  let pending = 0; // the animation frame asked for
  let local = null; // what a stroke has changed and Python does not know yet

  const columns = () => get("columns");
  const rows = () => get("rows");
  const place = ([x, y]) => y * columns() + x;
  const inside = ([x, y]) => x >= 0 && y >= 0 && x < columns() && y < rows();
  const mask = () => local ?? get("mask");
  const drawn = () => local ?? get("drawn");
  const step = () => Math.min(get("step"), get("steps"));

  // 0 masked, 1 predicted in this step, 2 known
  function stateOf(p, s) {
    if (get("mode") === "draw" && s === 0) {
      const list = drawn();
      return list[list.length - 1] === p ? 1 : list.includes(p) ? 2 : 0;
    }
    if (get("mode") === "paint" && s === 0) return mask()[p] ? 0 : 2;
    const turn = get("turns")[p];
    return turn >= s ? 0 : turn === s - 1 && turn >= 0 ? 1 : 2;
  }

  function pictureAt(s) {
    for (let k = s; k >= 0; k--) if (pictures.has(k)) return pictures.get(k);
    return pictures.get(-1);
  }

  // ------------------------------------------------------------------ drawing
  function resize() {
    const ratio = window.devicePixelRatio || 1;
    const cell = Math.max(8, Math.floor(Math.min(SIDE, el.clientWidth || SIDE) / Math.max(columns(), rows())));
    const sizes = [[canvas, cell * columns(), cell * rows()], [bars, cell * columns(), BARS]];
    for (const [target, width, height] of sizes) {
      target.style.width = `${width}px`;
      target.style.height = `${height}px`;
      target.width = Math.round(width * ratio);
      target.height = Math.round(height * ratio);
    }
  }

  function drawGrid(now) {
    const context = canvas.getContext("2d");
    const [masked, predicted, known] = get("colours");
    const width = canvas.width / columns();
    const height = canvas.height / rows();
    const gap = Math.max(1, Math.round(Math.min(width, height) / 24));
    const s = step();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const fade = playing && !still ? Math.min(1, (now - shownAt) / FADE) : 1;
    const picture = pictureAt(s);
    const numbers = get("mode") === "draw" && s === 0 && Math.min(width, height) >= 18;
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let p = 0; p < rows() * columns(); p++) {
      const x = (p % columns()) * width;
      const y = Math.floor(p / columns()) * height;
      const state = stateOf(p, s);
      const fill = (colour) => {
        context.fillStyle = colour;
        context.fillRect(x + gap / 2, y + gap / 2, width - gap, height - gap);
      };
      fill(masked);
      context.globalAlpha = state === 1 ? fade : 1;
      if (state > 0 && picture) {
        const w = picture.width / columns();
        const h = picture.height / rows();
        context.imageSmoothingEnabled = false;
        context.drawImage(picture, (x / width) * w, (y / height) * h, w, h, x, y, width, height);
        if (state === 1) {
          const line = Math.max(3, width / 16);
          context.lineWidth = line;
          context.strokeStyle = predicted;
          context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
        }
      } else if (state > 0) {
        fill(state === 1 ? predicted : known);
      }
      context.globalAlpha = 1;
      if (numbers && state > 0) {
        context.fillStyle = state === 1 ? "black" : "white";
        context.font = `${Math.round(Math.min(width, height) * 0.42)}px sans-serif`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(String(drawn().indexOf(p) + 1), x + width / 2, y + height / 2);
      }
    }
    if (cursor && document.activeElement === canvas) {
      context.lineWidth = Math.max(3, width / 8);
      context.strokeStyle = get("target");
      for (const [x, y] of brushed(cursor)) context.strokeRect(x * width, y * height, width, height);
    }
    canvas.dataset.drawn = String(Number(canvas.dataset.drawn || 0) + 1);
  }

  function drawBars() {
    const context = bars.getContext("2d");
    const counts = new Array(get("steps")).fill(0);
    for (const turn of get("turns")) if (turn >= 0 && turn < counts.length) counts[turn]++;
    const [, predicted, known] = get("colours");
    const most = Math.max(1, ...counts);
    const width = bars.width / Math.max(1, counts.length);
    context.clearRect(0, 0, bars.width, bars.height);
    counts.forEach((count, i) => {
      const height = Math.max(count ? 2 : 0, (count / most) * bars.height);
      context.fillStyle = i === step() - 1 ? predicted : known;
      context.globalAlpha = i < step() ? 1 : 0.35;
      context.fillRect(i * width, bars.height - height, Math.max(1, width - 1), height);
    });
    context.globalAlpha = 1;
    bars.setAttribute("role", "img");
    bars.setAttribute("aria-label", `Tokens per step: ${counts.join(", ")}`);
  }

  function describe() {
    const s = step();
    const counts = [0, 0, 0];
    for (let p = 0; p < rows() * columns(); p++) counts[stateOf(p, s)]++;
    const tokens = `${counts[2]} known, ${counts[1]} predicted now, ${counts[0]} masked`;
    if (get("mode") === "draw" && s === 0) return `${drawn().length} of ${rows() * columns()} tokens drawn`;
    if (get("mode") === "paint" && s === 0) return `${counts[0]} tokens painted`;
    return `step ${s} of ${get("steps")}: ${tokens}`;
  }

  function update() {
    const text = describe();
    const hasSteps = get("steps") > 0;
    transport.hidden = bars.hidden = !hasSteps;
    range.max = String(get("steps"));
    range.value = String(step());
    range.setAttribute("aria-valuetext", text);
    if (play.title !== (playing ? "Pause" : "Play")) {
      paint(play, playing ? "Pause" : "Play", playing ? "pause" : "play");
    }
    if (status.textContent !== text) status.textContent = text;
    message.textContent = get("message");
    message.hidden = !get("message");
    canvas.setAttribute("role", get("mode") === "watch" ? "img" : "application");
    canvas.setAttribute("aria-label", `${get("label")}, ${rows()} by ${columns()} tokens: ${text}`);
    canvas.dataset.mode = get("mode");
    canvas.dataset.step = String(step());
    draw();
  }

  function draw() {
    pending ||= requestAnimationFrame((now) => {
      pending = 0;
      advance(now);
      drawGrid(now);
      drawBars();
      if (playing) draw();
    });
  }

  // ------------------------------------------------------------------ time
  function goTo(s) {
    const wanted = Math.max(0, Math.min(get("steps"), s));
    shownAt = performance.now();
    if (wanted !== get("step")) set({ step: wanted });
    else update();
  }

  function advance(now) {
    if (!playing || now - shownAt < 1000 / get("speed")) return;
    if (step() >= get("steps")) {
      playing = false;
      update();
    } else {
      goTo(step() + 1);
    }
  }

  function toggle() {
    playing = !playing;
    if (playing && step() >= get("steps")) goTo(0);
    shownAt = performance.now();
    update();
  }

  // ------------------------------------------------------------------ pointer and keys
  function brushed([x, y]) {
    if (get("mode") !== "paint") return [[x, y]];
    const size = get("brush");
    const from = -Math.floor((size - 1) / 2);
    const cells = [];
    for (let j = 0; j < size; j++) for (let i = 0; i < size; i++) cells.push([x + from + i, y + from + j]);
    return cells.filter(inside);
  }

  function touch(cell, erase) {
    if (get("mode") === "draw") {
      if (inside(cell) && !local.includes(place(cell))) local.push(place(cell));
    } else {
      for (const other of brushed(cell)) local[place(other)] = !erase;
    }
  }

  function begin() {
    playing = false;
    if (get("step") !== 0) set({ step: 0 });
    local = [...(get("mode") === "draw" ? get("drawn") : get("mask"))];
  }

  function finish() {
    if (!local) return;
    const changed = get("mode") === "draw" ? { drawn: local } : { mask: local };
    stroke = local = null;
    set(changed);
    update();
  }

  function cellOf(event) {
    const box = canvas.getBoundingClientRect();
    return [
      Math.floor(((event.clientX - box.left) / box.width) * columns()),
      Math.floor(((event.clientY - box.top) / box.height) * rows()),
    ];
  }

  const listeners = [
    [canvas, "pointerdown", (event) => {
      if (get("mode") === "watch" || event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      cursor = null;
      begin();
      stroke = cellOf(event);
      touch(stroke, get("erase"));
      update();
    }],
    [canvas, "pointermove", (event) => {
      if (!stroke) return;
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) {
        const cell = cellOf(move);
        for (const between of cellsBetween(stroke, cell)) if (inside(between)) touch(between, get("erase"));
        stroke = cell;
      }
      update();
    }],
    [canvas, "pointerup", finish],
    [canvas, "pointercancel", finish],
    [canvas, "keydown", (event) => {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const editing = get("mode") !== "watch";
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (editing && moves[event.key]) {
        const [dx, dy] = moves[event.key];
        const to = cursor ? [cursor[0] + dx, cursor[1] + dy] : [0, 0];
        if (inside(to)) cursor = to;
        update();
      } else if (editing && cursor && (event.key === " " || event.key === "Enter")) {
        begin();
        touch(cursor, get("mode") === "paint" && local[place(cursor)]);
        finish();
      } else if (get("mode") === "draw" && event.key === "Backspace") {
        begin();
        local.pop();
        finish();
      } else if (!editing && moves[event.key]) {
        const [dx, dy] = moves[event.key];
        goTo(step() + dx + dy);
      } else if (!editing && event.key === " ") {
        toggle();
      } else if (event.key === "Home") {
        goTo(0);
      } else if (event.key === "End") {
        goTo(get("steps"));
      } else {
        return; // not ours
      }
      event.preventDefault();
      event.stopPropagation();
    }],
    [canvas, "focus", draw],
    [canvas, "blur", draw],
    [bars, "pointerdown", (event) => {
      const box = bars.getBoundingClientRect();
      goTo(1 + Math.floor(((event.clientX - box.left) / box.width) * get("steps")));
    }],
    [first, "click", () => goTo(0)],
    [back, "click", () => { playing = false; goTo(step() - 1); }],
    [play, "click", toggle],
    [next, "click", () => { playing = false; goTo(step() + 1); }],
    [range, "input", () => { playing = false; goTo(Number(range.value)); }],
  ];
  for (const [target, name, listener] of listeners) target.addEventListener(name, listener);

  // ------------------------------------------------------------------ news from Python
  const onChange = () => update();
  const onSize = () => { cursor = local = stroke = null; resize(); update(); };
  const onMessage = (content, buffers) => {
    if (content.kind === "clear") pictures.clear();
    if (content.kind === "play") { playing = true; shownAt = performance.now(); }
    if (content.kind === "picture") pictures.set(content.step, toPicture(content, buffers[0]));
    update();
  };
  const news = [["msg:custom", onMessage], ["change:rows", onSize], ["change:columns", onSize]];
  for (const name of WATCHED) news.push([`change:${name}`, onChange]);
  for (const [name, callback] of news) model.on(name, callback);
  const observer = new ResizeObserver(() => { resize(); draw(); });
  observer.observe(el);
  resize();
  update();
  model.send({ kind: "hello" }); // a page that comes later has missed the pictures

  return () => {
    cancelAnimationFrame(pending);
    observer.disconnect();
    for (const [name, callback] of news) model.off(name, callback);
    for (const [target, name, listener] of listeners) target.removeEventListener(name, listener);
  };
}

export default { render };
