"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, properties = {}, children = []) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const sections = JSON.parse(byId("data").textContent).sections;
  byId("title").textContent = document.title;

  // ---- colours ---------------------------------------------------------------------------------

  // Eleven stops of Matplotlib's RdBu_r and magma.
  const STOPS = {
    signed: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
    positive: "000004 140e36 3b0f70 641a80 8c2981 b73779 de4968 f7705c fe9f6d fecf92 fcfdbf",
  };
  const UNDEFINED = [153, 153, 153];
  const rgb = (hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  // [r, g, b] of each of 256 codes; code 0 is no number.
  const ramp = (name, low, high) => {
    const stops = STOPS[name].split(" ").map(rgb);
    const table = [UNDEFINED];
    for (let code = 1; code < 256; code++) {
      const share = high > low ? Math.min(1, Math.max(0, (code - low) / (high - low))) : 0;
      const at = share * (stops.length - 1);
      const i = Math.min(stops.length - 2, Math.floor(at));
      table.push(stops[i].map((v, k) => Math.round(v + (stops[i + 1][k] - v) * (at - i))));
    }
    return table;
  };
  const extremes = (codes) => {
    let low = 255, high = 0;
    for (const code of codes) if (code) { if (code < low) low = code; if (code > high) high = code; }
    return high ? [low, high] : [1, 1];
  };

  // ---- panels ----------------------------------------------------------------------------------

  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value);
  const places = (from, block, size) => {
    const last = Math.min(size, (from + 1) * block) - 1;
    return last > from * block ? `${from * block}–${last}` : String(from * block);
  };

  // A map is unpacked and drawn when it comes near to what is seen.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) entry.target.panel.show();
  }, { rootMargin: "400px" });

  class Panel {
    constructor(written, section) {
      Object.assign(this, written);
      this.section = section;
      [this.count, this.high, this.wide] = this.shape;
      this.order = this.labels.map((_, i) => i);
      this.at = 0; // where in the order the keyboard is
      this.canvas = make("canvas", { tabIndex: 0 });
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", `${section.name}, ${this.heading}: ${this.note}`);
      this.scale = make("span", { className: "scale" });
      const title = make("h3", {}, [this.heading, make("span", { className: "note", textContent: this.note }), this.scale]);
      this.box = make("div", { className: "scroll" }, [this.canvas]);
      this.node = make("div", {}, [title, this.box]);
      this.canvas.panel = this;
      watch.observe(this.canvas);
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", hideTip);
      this.canvas.addEventListener("click", (event) => {
        const hit = this.hit(event.offsetX, event.offsetY);
        if (hit) { this.at = hit.place; enlarge(this); }
      });
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      this.canvas.addEventListener("focus", () => this.draw());
      this.canvas.addEventListener("blur", () => { hideTip(); this.draw(); });
    }

    async load() {
      if (!this.loading) {
        this.loading = (async () => {
          this.codes = await inflate(this.data);
          this.data = "";
          if (this.words.length) {
            this.table = this.words.map(([, colour]) => rgb(colour.slice(1)));
            for (const [word, colour] of this.words) {
              const swatch = make("i");
              swatch.style.background = colour;
              this.scale.append(swatch, word);
            }
          } else {
            // Of signed values the scale is symmetric; its ends are codes 1 and 255.
            const [low, high] = this.colours === "signed" ? [1, 255] : extremes(this.codes);
            this.ends = [Math.min(low, this.zero), Math.max(high, this.zero)];
            this.table = ramp(this.colours, ...this.ends);
            this.drawScale();
          }
        })();
      }
      return this.loading;
    }

    drawScale() {
      const bar = make("canvas", { width: 120, height: 1 });
      const context = bar.getContext("2d");
      const [low, high] = this.ends;
      for (let x = 0; x < 120; x++) {
        context.fillStyle = `rgb(${this.table[Math.round(low + ((high - low) * x) / 119)]})`;
        context.fillRect(x, 0, 1, 1);
      }
      this.scale.append(number(this.value(low)), bar, number(this.value(high)));
    }

    value(code) {
      if (this.words.length) return this.words[code][0];
      return code ? (code - this.zero) * this.step : "NaN or infinite";
    }

    // Sizes in CSS pixels: of a tile, and how many stand side by side.
    lay() {
      const room = Math.max(120, this.box.clientWidth - 14);
      if (this.form === "cell") { this.tile = [14, 14]; this.gap = 2; }
      else if (this.form === "row") {
        this.tile = [Math.min(room, Math.max(this.wide, Math.min(4 * this.wide, 420))), 7];
        this.gap = 2;
      } else {
        const ratio = Math.min(2, Math.max(0.25, this.high / this.wide));
        const width = Math.max(36, Math.min(64, this.wide));
        this.tile = [width, Math.max(4, Math.round(width * ratio))];
        this.gap = 4;
      }
      this.columns = Math.max(1, Math.floor((room + this.gap) / (this.tile[0] + this.gap)));
      this.rows = Math.ceil(this.count / this.columns);
    }

    corner(place) {
      const column = place % this.columns, row = Math.floor(place / this.columns);
      return [column * (this.tile[0] + this.gap), row * (this.tile[1] + this.gap)];
    }

    pixels(index) {
      const size = this.high * this.wide;
      const image = new ImageData(this.wide, this.high);
      for (let i = 0; i < size; i++) {
        const [r, g, b] = this.table[this.codes[index * size + i]];
        image.data.set([r, g, b, 255], 4 * i);
      }
      const canvas = make("canvas", { width: this.wide, height: this.high });
      canvas.getContext("2d").putImageData(image, 0, 0);
      return canvas;
    }

    async show() {
      await this.load();
      this.draw();
    }

    draw() {
      if (!this.codes || !this.count || !this.high || !this.wide) return;
      this.lay();
      const width = Math.min(this.count, this.columns) * (this.tile[0] + this.gap) - this.gap;
      const height = this.rows * (this.tile[1] + this.gap) - this.gap;
      // Browsers refuse canvases that are too large; fewer device pixels fit.
      const dense = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(width, height), 2);
      this.canvas.width = Math.max(1, Math.round(width * dense));
      this.canvas.height = Math.max(1, Math.round(height * dense));
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
      const context = this.canvas.getContext("2d");
      context.scale(dense, dense);
      context.imageSmoothingEnabled = false;
      this.order.forEach((index, place) => {
        context.drawImage(this.pixels(index), ...this.corner(place), ...this.tile);
      });
      if (document.activeElement === this.canvas) {
        const [x, y] = this.corner(this.at);
        context.lineWidth = 2;
        context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
        context.strokeRect(x - 1, y - 1, this.tile[0] + 2, this.tile[1] + 2);
      }
      this.canvas.dataset.drawn = "yes";
      this.canvas.dataset.first = this.labels[this.order[0]];
    }

    hit(x, y) {
      if (!this.codes) return null;
      const [w, h] = this.tile;
      const column = Math.floor(x / (w + this.gap)), row = Math.floor(y / (h + this.gap));
      const place = row * this.columns + column;
      const dx = x - column * (w + this.gap), dy = y - row * (h + this.gap);
      if (column < 0 || column >= this.columns || row < 0 || place >= this.count || dx > w || dy > h) return null;
      const i = Math.min(this.wide - 1, Math.floor((dx / w) * this.wide));
      const j = Math.min(this.high - 1, Math.floor((dy / h) * this.high));
      return { place, index: this.order[place], i, j };
    }

    // What there is to say of a place of a tile.
    said(index, i, j) {
      const value = this.value(this.codes[(index * this.high + j) * this.wide + i]);
      const averaged = this.block[0] * this.block[1] > 1 ? "mean " : "";
      let where = "";
      if (this.form === "image") {
        where = ` at row ${places(j, this.block[0], this.size[0])}, column ${places(i, this.block[1], this.size[1])}`;
      } else if (this.form === "row") {
        const name = this.places.length ? this.places[i] : places(i, this.block[1], this.size[1]);
        where = ` at ${this.axis || "place"} ${name}`;
      }
      const exact = this.form === "cell" ? this.single(index, value) : number(value);
      return `filter ${this.labels[index]}${where}: ${averaged}${exact}`;
    }

    // Of a filter that is a single value, that value as the facts have it, to six digits.
    single(index, value) {
      const fact = this.facts.find(([name]) => name === this.heading) || this.facts.find(([name]) => name === "max");
      return fact ? number(fact[1][index]) : number(value);
    }

    about(index) {
      return this.facts.map(([name, values]) => `${name} ${number(values[index])}`).join("   ");
    }

    point(event) {
      const hit = this.hit(event.offsetX, event.offsetY);
      if (!hit) return hideTip();
      showTip(`${this.said(hit.index, hit.i, hit.j)}\n${this.about(hit.index)}`, event.clientX, event.clientY);
    }

    key(event) {
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -this.at, End: this.count - 1 - this.at };
      if (event.key in steps) {
        event.preventDefault();
        this.go(this.at + steps[event.key]);
        const [x, y] = this.corner(this.at);
        const box = this.canvas.getBoundingClientRect();
        const top = y - this.box.clientHeight / 2;
        this.box.scrollTop = Math.max(0, top);
        const index = this.order[this.at];
        const shown = this.canvas.getBoundingClientRect();
        showTip(`filter ${this.labels[index]}\n${this.about(index)}`, box.left + x, shown.top + y + this.tile[1]);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        enlarge(this);
      }
    }

    go(place) {
      this.at = Math.min(this.count - 1, Math.max(0, place));
      this.draw();
    }

    sort(byStrength) {
      const strength = this.facts.length ? this.facts[0][1] : [];
      const key = (i) => (typeof strength[i] === "number" ? Math.abs(strength[i]) : Infinity);
      this.order = this.labels.map((_, i) => i);
      if (byStrength && strength.length) this.order.sort((a, b) => key(b) - key(a) || a - b);
      this.at = 0;
      if (this.codes) this.draw();
    }
  }

  // ---- what is under the pointer ---------------------------------------------------------------

  const tip = byId("tip");
  const hideTip = () => { tip.hidden = true; };
  const showTip = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 8) : y + 18}px`;
  };

  // ---- one filter, large -----------------------------------------------------------------------

  const dialog = document.querySelector("dialog");
  let open = null; // the panel whose filter is enlarged
  const enlarge = async (panel) => {
    open = panel;
    hideTip();
    const label = panel.labels[panel.order[panel.at]];
    byId("large-name").textContent = `${panel.section.name} · filter ${label}`;
    byId("large-at").textContent = " ";
    const figures = [];
    // The same filter of each of the layer's maps: z beside a.
    for (const other of panel.section.panels) {
      const index = other.labels.indexOf(label);
      if (index < 0) continue;
      await other.load();
      figures.push(large(other, index));
    }
    byId("large").replaceChildren(...figures);
    if (!dialog.open) dialog.showModal();
  };
  const large = (panel, index) => {
    const widest = Math.min(420, innerWidth - 80);
    const ratio = panel.form === "image" ? panel.high / panel.wide : 48 / widest;
    const width = panel.form === "cell" ? 48 : Math.min(widest, 420 / Math.max(ratio, 0.1));
    const height = Math.max(8, panel.form === "cell" ? 48 : width * ratio);
    const canvas = make("canvas", { width: panel.wide, height: panel.high });
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    if (panel.wide && panel.high) canvas.getContext("2d").drawImage(panel.pixels(index), 0, 0);
    canvas.addEventListener("pointermove", (event) => {
      const i = Math.min(panel.wide - 1, Math.max(0, Math.floor((event.offsetX / width) * panel.wide)));
      const j = Math.min(panel.high - 1, Math.max(0, Math.floor((event.offsetY / height) * panel.high)));
      byId("large-at").textContent = `${panel.heading}: ${panel.said(index, i, j)}`;
    });
    const rows = panel.facts.map(([name, values]) => make("tr", {}, [
      make("th", { textContent: name, style: "text-align:left" }),
      make("td", { textContent: String(values[index]), style: "text-align:right" }),
    ]));
    return make("figure", {}, [make("h3", { textContent: panel.heading }), canvas, make("table", {}, [make("tbody", {}, rows)])]);
  };
  const turn = (step) => { open.go(open.at + step); enlarge(open); };
  byId("before").addEventListener("click", () => turn(-1));
  byId("after").addEventListener("click", () => turn(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { if (open) open.canvas.focus(); });

  // ---- the page --------------------------------------------------------------------------------

  const main = document.querySelector("main");
  for (const section of sections) {
    section.panels = section.panels.map((written) => new Panel(written, section));
    const head = make("h2", {}, [section.name, make("small", { textContent: section.tags })]);
    section.node = make("section", {}, [head]);
    section.node.dataset.name = section.name;
    if (section.note) section.node.append(make("p", { className: "note", textContent: section.note }));
    if (section.html) {
      const box = make("div", { className: "scroll told", tabIndex: 0 });
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", section.name);
      box.innerHTML = section.html;
      section.node.append(box);
    }
    section.node.append(...section.panels.map((panel) => panel.node));
    main.append(section.node);
  }

  const find = byId("find"), order = byId("order"), theme = byId("theme");
  const pattern = (text) => {
    const escaped = text.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
    return new RegExp(/[*?]/.test(text) ? `^${escaped}$` : escaped, "i");
  };
  const filter = () => {
    const wanted = pattern(find.value.trim());
    let shown = 0;
    for (const section of sections) {
      section.node.hidden = !wanted.test(section.name);
      if (!section.node.hidden && section.panels.length) shown += 1;
    }
    const all = sections.filter((section) => section.panels.length).length;
    byId("count").textContent = `${shown} of ${all} shown`;
  };
  find.addEventListener("input", filter);
  order.addEventListener("change", () => {
    for (const section of sections) for (const panel of section.panels) panel.sort(order.value === "strength");
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null; // the user's own choice, where there is one
  const paint = () => {
    const name = chosen || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = name;
    theme.textContent = name === "dark" ? "Light page" : "Dark page";
  };
  theme.addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    paint();
  });
  dark.addEventListener("change", paint);

  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => sections.forEach((s) => s.panels.forEach((panel) => panel.draw())), 150);
  });
  document.addEventListener("keydown", (event) => {
    if (dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
    if (["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
      if (event.key === "Escape") document.activeElement.blur();
      return;
    }
    if (event.key === "/") { event.preventDefault(); find.focus(); }
    if (event.key === "s") {
      order.value = order.value === "number" ? "strength" : "number";
      order.dispatchEvent(new Event("change"));
    }
    if (event.key === "t") theme.click();
  });
  paint();
  filter();
})();
