// The page of a study. It knows a pair by a random id and its sides by their place, and nothing else of what it shows.

const at = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const NAMES = { left: "First", right: "Second" };
const STILL = matchMedia("(prefers-reduced-motion: reduce)");

let about = null; // kind, questions, ties, of /state
let pair = null; // what is shown
let players = {}; // left, right
let asked = 0; // which question
let choices = {};
let shownAt = 0;
let pointed = null;
let busy = true;

// ------------------------------------------------------------------------------------------------- the server

async function get(path) {
  return read(await fetch(path));
}

async function post(path, body) {
  return read(await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }));
}

async function read(answer) {
  if (answer.ok) return answer.json();
  const error = new Error((await answer.text()).trim() || `the server answers ${answer.status}`);
  error.final = answer.status < 500; // what the server refuses it will refuse again
  throw error;
}

// Until it is done: a server that is away comes back, and the same answer sent twice is one.
async function insist(call) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10000)) {
    try {
      const value = await call();
      at("trouble").hidden = true;
      return value;
    } catch (error) {
      trouble(error.final ? error.message : "Not saved yet: the server cannot be reached. Trying again.");
      if (error.final) throw error;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function trouble(words) {
  at("trouble").textContent = words;
  at("trouble").hidden = false;
}

// ------------------------------------------------------------------------------------------------- samples

// Each player: element, ready (a promise), duration in seconds, show(seconds), play(), pause(), heard.

class Picture {
  constructor(sample, side) {
    this.element = new Image();
    this.element.alt = `${NAMES[side]} sample`;
    this.element.className = Math.max(...sample.size) <= 128 ? "small" : "";
    this.element.src = sample.parts[0];
    this.ready = this.element.decode();
    this.duration = 0;
    this.heard = true;
  }
  show() {}
  play() {}
  pause() {}
}

// Frames lie in sheets, so that both clips are drawn by one clock and stand at the same moment, whatever their format was.
class Clip {
  constructor(sample, side) {
    this.sample = sample;
    this.element = document.createElement("canvas");
    [this.element.width, this.element.height] = sample.size;
    this.element.className = Math.max(...sample.size) <= 128 ? "small" : "";
    this.element.setAttribute("role", "img");
    this.element.setAttribute("aria-label", `${NAMES[side]} sample`);
    this.context = this.element.getContext("2d");
    this.sheets = sample.parts.map((part) => Object.assign(new Image(), { src: part }));
    this.ready = Promise.all(this.sheets.map((sheet) => sheet.decode()));
    this.duration = sample.frames / sample.rate_hz;
    this.heard = true;
  }
  show(seconds) {
    const { frames, columns, rows, rate_hz, size: [width, height] } = this.sample;
    const frame = Math.min(Math.floor(seconds * rate_hz + 1e-6), frames - 1);
    const place = frame % (columns * rows);
    this.element.dataset.frame = frame;
    const [x, y] = [(place % columns) * width, Math.floor(place / columns) * height];
    this.context.drawImage(this.sheets[Math.floor(frame / (columns * rows))], x, y, width, height, 0, 0, width, height);
  }
  play() {}
  pause() {}
}

class Sound {
  constructor(sample, side) {
    this.audio = new Audio(sample.parts[0]);
    this.audio.preload = "auto";
    this.heard = false;
    this.ready = new Promise((done, failed) => {
      this.audio.addEventListener("canplay", done, { once: true });
      this.audio.addEventListener("error", () => failed(new Error("a sound cannot be played")), { once: true });
    });
    this.audio.addEventListener("playing", () => { this.heard = true; allowAnswers(); });
    this.audio.addEventListener("ended", () => transport.stopped());
    this.audio.load();
    this.element = document.createElement("button");
    this.element.type = "button";
    this.element.className = "sound";
    this.element.textContent = `Play ${NAMES[side].toLowerCase()}`;
    this.element.addEventListener("click", () => { point(side); transport.playing ? null : transport.toggle(); });
  }
  get duration() { return this.audio.duration || 0; }
  get seconds() { return this.audio.currentTime; }
  show(seconds) { this.audio.currentTime = Math.min(seconds, Math.max(0, this.duration - 0.01)); }
  play() { return this.audio.play(); }
  pause() { this.audio.pause(); }
}

const KINDS = { image: Picture, clip: Clip, sound: Sound };

// One clock for both sides. Of sounds one side is heard at a time, and the other goes on from where it is.
const transport = {
  playing: false,
  seconds: 0,
  last: 0,
  get duration() { return Math.max(0, ...SIDES.map((side) => players[side]?.duration ?? 0)); },
  toggle() {
    if (about.kind === "image" || !pair) return;
    this.playing ? this.pause() : this.play();
  },
  async play() {
    const ending = this.seconds >= this.duration - 0.02;
    if (ending) this.seconds = 0;
    this.playing = true;
    this.last = performance.now();
    this.label();
    if (about.kind === "sound") {
      const side = pointed ?? "left";
      if (!pointed) point(side, false);
      players[side].show(this.seconds);
      try {
        await players[side].play();
      } catch (error) {
        if (error.name !== "AbortError") { this.pause(); trouble("This browser does not play the sound."); }
      }
    }
    requestAnimationFrame((now) => this.tick(now));
  },
  pause() {
    this.playing = false;
    for (const side of SIDES) players[side]?.pause();
    this.label();
  },
  stopped() { this.seconds = this.duration; this.pause(); this.draw(); },
  hear(side) {
    if (about.kind !== "sound" || !this.playing) return;
    for (const other of SIDES) players[other].pause();
    players[side].show(this.seconds);
    players[side].play().catch((error) => { if (error.name !== "AbortError") trouble("This browser does not play the sound."); });
  },
  tick(now) {
    if (!this.playing) return;
    if (about.kind === "sound") this.seconds = players[pointed]?.seconds ?? this.seconds;
    else this.seconds = (this.seconds + Math.max(0, now - this.last) / 1000) % (this.duration || 1);
    this.last = Math.max(now, this.last); // a frame's time may lie before the moment that asked for it
    this.draw();
    requestAnimationFrame((next) => this.tick(next));
  },
  draw() {
    if (about.kind === "clip") for (const side of SIDES) players[side].show(this.seconds);
    at("seek").value = this.duration ? Math.round((1000 * this.seconds) / this.duration) : 0;
  },
  seek(part) {
    this.seconds = part * this.duration;
    if (about.kind === "sound" && pointed) players[pointed].show(this.seconds);
    this.draw();
  },
  label() { at("play").textContent = this.playing ? "Pause" : "Play"; },
  reset() { this.playing = false; this.seconds = 0; this.label(); },
};

// ------------------------------------------------------------------------------------------------- a pair

async function showNext(next) {
  transport.pause();
  pair = next.pair;
  if (!pair) return finish(next);
  [asked, choices, busy, players] = [0, {}, true, {}];
  at("intro").hidden = true;
  at("task").hidden = false;
  at("progress").textContent = `${next.done + 1} of about ${next.total}`;
  at("bar").max = next.total;
  at("bar").value = next.done;
  at("prompt").textContent = pair.prompt;
  at("prompt-line").hidden = !pair.prompt;
  transport.reset();
  point(null);
  for (const side of SIDES) {
    players[side] = new KINDS[about.kind](pair[side], side);
    at(side).querySelector(".stage").replaceChildren(players[side].element);
  }
  ask();
  try {
    await Promise.all(SIDES.map((side) => players[side].ready));
  } catch {
    trouble("A sample could not be loaded. Load the page again to go on.");
    return;
  }
  transport.draw();
  shownAt = performance.now();
  busy = false;
  allowAnswers();
  if (about.kind === "clip" && !STILL.matches) transport.play();
}

function ask() {
  const { questions } = about;
  const number = questions.length > 1 ? ` (${asked + 1} of ${questions.length})` : "";
  at("question").textContent = questions[asked].text + number;
  point(null);
  allowAnswers();
  at("question").focus({ preventScroll: true });
}

function allowAnswers() {
  const may = !busy && pair && SIDES.every((side) => players[side]?.heard);
  for (const choice of ["left", "tie", "right"]) at(`choose-${choice}`).disabled = !may;
}

function point(side, hear = true) {
  pointed = side;
  for (const one of SIDES) at(one).classList.toggle("pointed", one === side);
  if (side && hear) transport.hear(side);
}

async function choose(choice) {
  if (at(`choose-${choice}`).disabled || at(`choose-${choice}`).hidden) return;
  choices[about.questions[asked].name] = choice;
  asked += 1;
  if (asked < about.questions.length) return ask();
  busy = true;
  allowAnswers();
  const answer = { pair: pair.id, choices, seconds: (performance.now() - shownAt) / 1000 };
  await showNext(await insist(() => post("/answer", answer)));
}

function finish(next) {
  at("intro").hidden = at("task").hidden = true;
  at("end").hidden = false;
  at("count").textContent = next.done === 1 ? "1 pair" : `${next.done} pairs`;
  at("end").querySelector("h1").focus();
}

// ------------------------------------------------------------------------------------------------- people

const KEYS = {
  1: () => choose("left"),
  2: () => choose("right"),
  0: () => choose("tie"),
  ArrowLeft: () => point("left"),
  ArrowRight: () => point("right"),
  ArrowDown: () => point(null),
  Enter: () => pointed && choose(pointed),
  " ": () => transport.toggle(),
};

document.addEventListener("keydown", (event) => {
  if (at("task").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const inControl = event.target.closest("button, input");
  if (inControl && (event.key === "Enter" || event.key === " ")) return; // the control's own
  if (event.target.closest("input") && event.key.startsWith("Arrow")) return;
  const action = Object.hasOwn(KEYS, event.key) && KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

for (const choice of ["left", "tie", "right"]) at(`choose-${choice}`).addEventListener("click", () => choose(choice));
at("play").addEventListener("click", () => transport.toggle());
at("seek").addEventListener("input", (event) => transport.seek(event.target.value / 1000));
at("begin").addEventListener("click", async () => {
  at("begin").disabled = true;
  await showNext(await insist(() => post("/join", {})));
});

about = await insist(() => get("/state"));
at("with-prompts").hidden = !about.prompts;
at("with-sound").hidden = about.kind !== "sound";
at("transport").hidden = about.kind === "image";
at("choose-tie").hidden = !about.ties;
for (const one of document.querySelectorAll(".ties")) one.hidden = !about.ties;
for (const one of document.querySelectorAll(".played")) one.hidden = about.kind === "image";
at("begin").disabled = false;
if (about.joined) await showNext(await insist(() => post("/join", {})));
