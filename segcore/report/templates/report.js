
"use strict";
(() => {
  const PAGE = 100, PRINTED = 1000;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const pictures = JSON.parse(byId("pictures").textContent);
  const NAMES = ["scene", "uri", "state", "time", "seconds", "pixels", "legend", "fractions", "amounts", "manifest",
    "quicklook", "error", "reason", "attempts", "group", "picture", "warnings"];
  const rows = data.rows.map((values) => {
    const row = {};
    NAMES.forEach((name, i) => { row[name] = values[i]; });
    row.speed = row.seconds && row.pixels ? row.pixels / row.seconds / 1e6 : null;
    row.legend = row.legend === null ? null : data.legends[row.legend];
    row.text = [row.scene, row.uri, row.error, row.reason, ...row.warnings].join("\n").toLowerCase();
    return row;
  });
  const collator = new Intl.Collator("en", { numeric: true });
  const byName = rows.map((_, i) => i).sort((a, b) => collator.compare(rows[a].scene, rows[b].scene));
  byName.forEach((row, place) => { rows[row].place = place; });

  // What is shown: kept in the address, so that a view can be sent to somebody and survives a reload.
  const DEFAULTS = { text: "", state: "", class: "", group: "", sort: "state", order: "ascending", page: "0" };
  const view = { ...DEFAULTS };
  const readAddress = () => {
    Object.assign(view, DEFAULTS);
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in view) view[key] = value;
  };
  const writeAddress = () => {
    const changed = new URLSearchParams(Object.entries(view).filter(([key, value]) => value !== DEFAULTS[key]));
    try { history.replaceState(null, "", "#" + changed); } catch { /* some browsers refuse this for files */ }
  };

  let found = [];
  const table = byId("table"), body = table.tBodies[0];

  const make = (name, className, ...children) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  const thousands = (value) => Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
  const digits = (value) => value >= 100 ? thousands(value) : String(Number(value.toPrecision(3)));
  const percent = (value) => (100 * value).toFixed(1) + "\u202f%";
  const took = (seconds) => {
    const minutes = Math.round(seconds / 60);
    if (seconds < 90) return (seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)) + "\u202fs";
    if (minutes < 60) return minutes + "\u202fmin";
    return Math.floor(minutes / 60) + "\u202fh " + String(minutes % 60).padStart(2, "0") + "\u202fmin";
  };
  const amount = (value, unit) => {
    if (unit === "ml") return value >= 1000 ? digits(value / 1000) + "\u202fl" : digits(value) + "\u202fml";
    if (value >= 1e6) return digits(value / 1e6) + "\u202fkm²";
    return value >= 1e4 ? digits(value / 1e4) + "\u202fha" : digits(value) + "\u202fm²";
  };
  const clock = (time) => new Date(time * 1000).toISOString().slice(0, 16).replace("T", " ");
  const link = (path) => "./" + path.split("/").map(encodeURIComponent).join("/");
  const placeOf = (row) => row.legend && view.class ? row.legend.names.indexOf(view.class) : -1;
  const stateClass = (row) => "state-" + data.states[row.state].replaceAll(" ", "-");

  // null sorts last whatever the order
  const keys = {
    scene: (row) => row.place,
    state: (row) => row.state,
    time: (row) => row.time,
    seconds: (row) => row.seconds,
    speed: (row) => row.speed,
    share: (row) => {
      if (view.class) return placeOf(row) < 0 ? null : row.amounts[placeOf(row)] ?? row.fractions[placeOf(row)];
      return row.fractions.length ? Math.max(...row.fractions) : null;
    },
  };

  const choose = () => {
    const words = view.text.toLowerCase().split(/\s+/).filter(Boolean);
    const state = view.state ? data.states.indexOf(view.state) : -1;
    const group = view.group === "" ? null : Number(view.group);
    const key = keys[view.sort] || keys.state, sign = view.order === "descending" ? -1 : 1;
    found = rows.filter((row) => (state < 0 || row.state === state) && (group === null || row.group === group)
      && (!view.class || placeOf(row) >= 0) && words.every((word) => row.text.includes(word)));
    const sorted = found.map((row) => [key(row), row]);
    sorted.sort(([a, left], [b, right]) => {
      if (a === b) return (right.time ?? 0) - (left.time ?? 0) || left.place - right.place;
      return a === null ? 1 : b === null ? -1 : sign * (a - b);
    });
    found = sorted.map(([, row]) => row);
  };

  const paint = (element, color) => { element.style.background = color || "var(--quiet)"; };
  const mixture = (row) => {
    const cell = make("td", "share-of");
    if (!row.fractions.length) return cell;
    const bar = make("span", "mix");
    row.fractions.forEach((fraction, i) => {
      const part = make("span");
      part.style.width = 100 * fraction + "%";
      paint(part, row.legend.colors[i]);
      bar.append(part);
    });
    bar.setAttribute("aria-hidden", "true");
    const place = placeOf(row);
    let shown = row.fractions.map((_, i) => i);
    if (place >= 0) shown = [place];
    else shown = shown.filter((i) => row.fractions[i] >= .0005).sort((a, b) => row.fractions[b] - row.fractions[a]).slice(0, 3);
    const words = shown.map((i) => {
      const share = percent(row.fractions[i]);
      return place < 0 ? row.legend.names[i] + " " + share
        : share + (row.amounts.length ? " · " + amount(row.amounts[i], row.legend.unit) : "");
    });
    cell.append(bar, make("span", "small", words.join(", ")));
    return cell;
  };

  const source = (row) => typeof row.picture === "number"
    ? "data:image/webp;base64," + pictures[row.picture] : link(row.picture);

  const draw = (row, at) => {
    const line = make("tr"), picture = make("td", "picture"), name = make("th", "name", row.scene);
    name.scope = "row";
    name.title = row.uri;
    const why = row.reason || row.warnings.join("; ");
    if (why) {
      const more = make("div", "why", why + (row.attempts > 1 ? ` (${row.attempts} attempts)` : ""));
      more.title = why;
      name.append(more);
    }
    if (row.picture !== null) {
      const open = make("button"), image = make("img");
      open.type = "button";
      open.dataset.at = at;
      open.setAttribute("aria-label", "Show " + row.scene + " large");
      image.alt = "";
      image.loading = "lazy";
      image.src = source(row);
      open.append(image);
      picture.append(open);
    }
    line.append(picture, name, make("td", "state " + stateClass(row), data.states[row.state]),
      make("td", "time", row.time === null ? "" : clock(row.time)),
      make("td", "n", row.seconds === null ? "" : took(row.seconds)),
      make("td", "n", row.speed === null ? "" : row.speed >= 100 ? thousands(row.speed) : row.speed.toPrecision(2)),
      mixture(row));
    return line;
  };

  const show = (length = PAGE) => {
    const began = performance.now();
    choose();
    const pages = Math.max(1, Math.ceil(found.length / length));
    const page = Math.min(Math.max(0, Number(view.page) || 0), pages - 1), first = page * length;
    view.page = String(page);
    body.replaceChildren(...found.slice(first, first + length).map((row, i) => draw(row, first + i)));
    if (!found.length) {
      const cell = make("td", "empty", "No scene is like that.");
      cell.colSpan = 7;
      body.append(make("tr", "", cell));
    }
    for (const head of table.querySelectorAll("th[data-key]")) {
      if (head.dataset.key === view.sort) head.setAttribute("aria-sort", view.order);
      else head.removeAttribute("aria-sort");
    }
    table.querySelector("th[data-key=share] button").textContent = view.class || "classes";
    table.setAttribute("aria-rowcount", String(found.length + 1));
    byId("text").value = view.text;
    byId("state").value = view.state;
    byId("class").value = view.class;
    byId("reset").hidden = !(view.text || view.state || view.class || view.group !== "");
    byId("found").textContent = found.length === rows.length ? thousands(rows.length) + (rows.length === 1 ? " scene" : " scenes")
      : thousands(found.length) + " of " + thousands(rows.length) + " scenes";
    byId("pages").hidden = pages === 1;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
    byId("page").textContent = thousands(first + 1) + " to " + thousands(Math.min(first + length, found.length))
      + " of " + thousands(found.length);
    table.dataset.milliseconds = (performance.now() - began).toFixed(1);
  };
  const change = (changes) => {
    Object.assign(view, { page: "0" }, changes);
    show();
    writeAddress();
  };

  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("text").addEventListener("input", (event) => change({ text: event.target.value }));
  byId("state").addEventListener("change", (event) => change({ state: event.target.value, group: "" }));
  byId("class").addEventListener("change", (event) => change({ class: event.target.value }));
  byId("reset").addEventListener("click", () => {
    change({ text: "", state: "", class: "", group: "" });
    byId("text").focus();
  });
  for (const head of table.querySelectorAll("th[data-key]")) {
    head.firstElementChild.addEventListener("click", () => {
      const sort = head.dataset.key, falling = ["time", "seconds", "speed", "share"].includes(sort);
      const order = view.sort === sort ? (view.order === "ascending" ? "descending" : "ascending")
        : falling ? "descending" : "ascending";
      change({ sort, order });
    });
  }
  const turn = (by) => {
    change({ page: String(Number(view.page) + by) });
    byId("scenes").scrollIntoView();
  };
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  for (const button of document.querySelectorAll("button[data-group]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      change({ group: button.dataset.group, text: "", state: "", class: "" });
      byId("scenes").scrollIntoView();
    });
  }

  const large = byId("large");
  let open = 0;
  const enlarge = (at) => {
    const row = found[at];
    open = at;
    byId("large-name").textContent = row.scene;
    byId("large-picture").alt = "Quicklook of " + row.scene + ": the image, and its mask";
    byId("large-picture").src = link(row.quicklook);
    byId("large-facts").replaceChildren(...row.fractions.map((fraction, i) => {
      const swatch = make("span", "swatch");
      paint(swatch, row.legend.colors[i]);
      const measure = row.amounts.length ? " · " + amount(row.amounts[i], row.legend.unit) : "";
      return make("span", "", swatch, row.legend.names[i] + " " + percent(fraction) + measure);
    }));
    const manifest = make("a", "", "Manifest");
    manifest.href = link(row.manifest);
    byId("large-links").replaceChildren(manifest, " · " + row.uri);
  };
  const step = (by) => {
    for (let at = open + by; at >= 0 && at < found.length; at += by) {
      if (found[at].picture !== null) { enlarge(at); return; }
    }
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-at]");
    if (button) { enlarge(Number(button.dataset.at)); large.showModal(); }
  });
  byId("close").addEventListener("click", () => large.close());
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  large.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });

  addEventListener("hashchange", () => { readAddress(); show(); });
  addEventListener("beforeprint", () => show(PRINTED));
  addEventListener("afterprint", () => show());
  byId("controls").hidden = false;
  table.hidden = false;
  readAddress();
  show();
})();
