// Keeps a page of the board fresh: asks for the parts that have changed, and replaces those.

const parts = document.getElementById("parts");
const fresh = document.getElementById("fresh");
const chosen = new Set(JSON.parse(sessionStorage.getItem("chosen") ?? "[]"));
let held = false; // a slider is being moved
let timer = 0;
let at = Date.now();
let failures = 0;

async function refresh() {
  clearTimeout(timer);
  let wait = 15000;
  if (!document.hidden && !held) {
    try {
      wait = await ask();
      failures = 0;
      at = Date.now();
    } catch (error) {
      failures += 1;
      wait = Math.min(30000, 1000 * 2 ** failures);
      if (failures === 1) console.warn(error);
    }
  } else {
    wait = 500;
  }
  tell();
  timer = setTimeout(refresh, wait);
}

async function ask() {
  const url = new URL(location.href);
  url.hash = "";
  url.pathname = "/live" + url.pathname;
  const have = [...parts.children].map((part) => part.dataset.mark).join(",");
  url.searchParams.set("have", have);
  const reply = await fetch(url, { headers: { Accept: "application/json" } });
  if (reply.status === 404) {
    gone();
    return 15000;
  }
  if (!reply.ok) throw new Error(`the board answered ${reply.status}`);
  const news = await reply.json();
  document.title = news.title;
  if (!held) take(news.parts);
  return news.every_ms;
}

function take(named) {
  const known = new Map([...parts.children].map((part) => [part.dataset.part, part]));
  let place = parts.firstElementChild;
  for (const { name, mark, html } of named) {
    let part = known.get(name);
    known.delete(name);
    if (!part) {
      part = document.createElement("div");
      part.dataset.part = name;
    }
    if (html !== undefined) replace(part, html);
    part.dataset.mark = mark;
    if (part === place) place = place.nextElementSibling;
    else parts.insertBefore(part, place); // moved only where it has to, so that sounds play on
  }
  for (const part of known.values()) part.remove();
  settle();
}

// What a reader has opened, scrolled or moved stays so.
function replace(part, html) {
  const open = new Set([...part.querySelectorAll("details[open] > summary")].map((one) => one.textContent));
  const scrolled = [...part.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  const range = part.querySelector(".over-time input");
  const step = range && range.value !== range.max ? shownStep(range) : null;
  part.innerHTML = html;
  for (const summary of part.querySelectorAll("details > summary")) summary.parentElement.open = open.has(summary.textContent);
  part.querySelectorAll(".scroll").forEach((one, i) => (one.scrollLeft = scrolled[i] ?? 0));
  const slider = part.querySelector(".over-time input");
  if (slider) {
    const steps = stepsOf(slider);
    const index = steps.findIndex((one) => one.dataset.step === step);
    if (index >= 0) slider.value = index;
    show(slider);
  }
}

function gone() {
  fresh.textContent = "This run is no longer here.";
  fresh.className = "lost";
}

function tell() {
  for (const one of document.querySelectorAll("time[data-at]")) one.textContent = ago(Date.now() / 1000 - Number(one.dataset.at));
  if (failures) {
    fresh.textContent = `The board does not answer; last seen ${ago((Date.now() - at) / 1000)}`;
    fresh.className = "lost";
  } else if (fresh.className !== "lost") {
    fresh.textContent = "";
  }
  if (!failures && fresh.textContent.startsWith("The board")) {
    fresh.textContent = "";
    fresh.className = "";
  }
}

function ago(seconds) {
  const sizes = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [size, letter] of sizes) if (seconds >= size) return `${Math.floor(seconds / size)} ${letter} ago`;
  return seconds < 45 ? "now" : "1 min ago";
}

// ---------------------------------------------------------------------------------------- samples over time

const stepsOf = (slider) => [...slider.closest(".over-time").querySelectorAll("ol > li")];
const shownStep = (slider) => stepsOf(slider)[Number(slider.value)]?.dataset.step;

function show(slider) {
  const box = slider.closest(".over-time");
  const steps = stepsOf(slider);
  const one = steps[Number(slider.value)];
  if (!one) return;
  box.querySelector("output").textContent = `step ${one.dataset.step}`;
  slider.setAttribute("aria-valuetext", `step ${one.dataset.step}`);
  const shown = box.querySelector(".shown");
  let image = shown.querySelector("img");
  if (one.dataset.picture) {
    if (!image) {
      image = document.createElement("img");
      shown.prepend(image);
    }
    if (image.getAttribute("src") !== one.dataset.picture) image.src = one.dataset.picture;
    image.alt = one.dataset.alt;
  } else image?.remove();
  shown.querySelector(".sounds").replaceChildren(...[...one.querySelectorAll("[data-sound]")].map(sound));
  for (const near of [steps[Number(slider.value) - 1], steps[Number(slider.value) + 1]])
    if (near?.dataset.picture) new Image().src = near.dataset.picture;
}

function sound(one) {
  const item = document.createElement("li");
  const player = document.createElement("audio");
  player.controls = true;
  player.preload = "none";
  player.src = one.dataset.sound;
  const words = document.createElement("p");
  words.textContent = one.textContent;
  item.append(player, words);
  return item;
}

parts.addEventListener("input", (event) => {
  if (event.target.matches(".over-time input")) show(event.target);
});
parts.addEventListener("pointerdown", (event) => (held = event.target.matches("input[type=range]")));
addEventListener("pointerup", () => (held = false));
addEventListener("pointercancel", () => (held = false));

// ---------------------------------------------------------------------------------------- runs to compare

parts.addEventListener("change", (event) => {
  if (event.target.name !== "run") return;
  chosen[event.target.checked ? "add" : "delete"](event.target.value);
  settle();
});

function settle() {
  const boxes = [...parts.querySelectorAll("input[name=run]")];
  for (const one of boxes) one.checked = chosen.has(one.value);
  if (boxes.length) for (const name of chosen) if (!boxes.some((one) => one.value === name)) chosen.delete(name);
  sessionStorage.setItem("chosen", JSON.stringify([...chosen]));
  const bar = document.getElementById("chosen");
  const count = boxes.filter((one) => one.checked).length;
  bar.className = count >= 2 ? "" : "none";
  bar.firstElementChild.textContent = `Compare ${count} runs`;
}

// ---------------------------------------------------------------------------------------- what a curve says where the pointer is

parts.addEventListener("pointermove", (event) => {
  const plot = event.target.closest(".plot");
  for (const one of document.querySelectorAll(".hair, .told")) if (one.parentElement !== plot) one.remove();
  if (plot) point(plot, event.clientX);
});
parts.addEventListener("pointerleave", () => document.querySelectorAll(".hair, .told").forEach((one) => one.remove()));

function point(plot, clientX) {
  const svg = plot.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const [left, right] = svg.dataset.x.split(" ").map(Number);
  const [bottom, top] = svg.dataset.y.split(" ").map(Number);
  const wanted = Math.min(1000, Math.max(0, (1000 * (clientX - box.left)) / box.width));
  const names = [...(plot.parentElement.querySelectorAll(".key li") ?? [])].map((one) => one.textContent);
  let x = wanted;
  const lines = [...svg.querySelectorAll("path.line")].map((path, i) => {
    const near = nearest(path.getAttribute("d"), wanted);
    x = near[0];
    const name = names[i] ? `${names[i]} ` : "";
    return [path.getAttribute("stroke"), `${name}${short(bottom + ((1000 - near[1]) / 1000) * (top - bottom))}`];
  });
  const hair = plot.querySelector(".hair") ?? plot.appendChild(Object.assign(document.createElement("i"), { className: "hair" }));
  const told = plot.querySelector(".told") ?? plot.appendChild(Object.assign(document.createElement("div"), { className: "told" }));
  hair.style.left = `${x / 10}%`;
  told.replaceChildren(row(null, short(left + (x / 1000) * (right - left))), ...lines.map(([colour, words]) => row(colour, words)));
  told.style.left = x < 500 ? `calc(${x / 10}% + 10px)` : "auto";
  told.style.right = x < 500 ? "auto" : `calc(${100 - x / 10}% + 10px)`;
}

function nearest(path, wanted) {
  let best = [0, 0];
  let least = Infinity;
  for (const found of path.matchAll(/([\d.]+) ([\d.]+)/g)) {
    const distance = Math.abs(Number(found[1]) - wanted);
    if (distance < least) [least, best] = [distance, [Number(found[1]), Number(found[2])]];
  }
  return best;
}

function row(colour, words) {
  const line = document.createElement("div");
  if (colour) {
    const dot = document.createElement("i");
    dot.style.background = colour;
    line.append(dot);
  }
  line.append(words);
  return line;
}

const short = (value) => (Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(4)).toString());

document.querySelectorAll(".over-time input").forEach(show);
settle();
tell();
setInterval(tell, 5000);
addEventListener("visibilitychange", () => document.hidden || refresh());
timer = setTimeout(refresh, 1500);
