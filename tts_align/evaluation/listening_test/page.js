"use strict";
(() => {
const test = JSON.parse(document.getElementById("test").textContent);
const texts = JSON.parse(document.getElementById("texts").textContent);
const page = document.getElementById("page");
const SAVED = `tts-align-listen:${test.id}`;
const PAIRED = ["cmos", "ab", "abx"];
let language = test.language || (navigator.language || "en").slice(0, 2);
if (!texts[language]) language = "en";
let session = null;
let keepsProgress = true;
let show = start;

// --- words ---

const say = (name, values = {}) =>
  Object.entries(values).reduce((text, [key, value]) => text.replace(`{${key}}`, value), texts[language][name]);

function note(text) { document.getElementById("said").textContent = text; }

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function fill(...children) {
  stop();
  note("");
  page.replaceChildren(...children);
  page.focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function headline() {
  document.documentElement.lang = language;
  document.title = test.title || say("title");
  document.getElementById("title").textContent = document.title;
  document.getElementById("languages").replaceChildren(...Object.keys(texts).map((code) => element("button", {
    type: "button", lang: code, "aria-pressed": String(code === language), "data-language": code,
    onclick: () => { language = code; if (session) { session.language = code; save(); } headline(); show(); },
  }, texts[code].name)));
}

// --- who hears what in which order ---

function hash(text) {  // FNV-1a, 32 bits
  let value = 2166136261;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 16777619) >>> 0;
  return value;
}

// A listener's row: a number is taken as it is, so that numbered listeners are balanced exactly.
const rowOf = (listener) => (/^\d{1,9}$/.test(listener) ? Number(listener) : hash(listener));

// Row of a Latin square in which every question also follows every other equally often (Williams).
function orderOf(count, row) {
  const order = [];
  for (let place = 0; place < count; place++) {
    const step = place % 2 ? (place + 1) / 2 : count - place / 2;
    order.push((step + row) % count);
  }
  return count % 2 && Math.floor(row / count) % 2 ? order.reverse() : order;
}

function asked(trial, number, row, extra = {}) {
  const turn = number + row;
  const found = { trial: trial.id, kind: trial.kind, clips: [...trial.clips], ...extra };
  const swap = PAIRED.includes(trial.kind) && turn % 2 === 1;
  if (swap !== Boolean(extra.repeat)) found.clips.reverse();
  if (trial.kind === "abx") found.x = trial.clips[(turn >> 1) % 2];
  if (trial.choices) found.turn = turn % trial.choices.length;
  return found;
}

function planFor(listener) {
  const row = rowOf(listener);
  const plan = [];
  for (const section of test.sections) {
    section.training.forEach((trial, number) => plan.push(asked(trial, number, row, { training: true })));
    let trials = section.trials.map((trial, number) => ({ trial, number }));
    if (test.design === "latin") {  // one question of each sentence, another one than the listener before
      const groups = new Map();
      for (const one of trials) groups.set(one.trial.group, [...(groups.get(one.trial.group) || []), one]);
      trials = [...groups.entries()].sort((a, b) => a[0] - b[0])
        .map(([group, members]) => members[(group + row) % members.length]);
    }
    const order = orderOf(trials.length, row).map((place) => trials[place]);
    const questions = order.map(({ trial, number }) => asked(trial, number, row));
    const again = order.slice(0, Math.min(test.repeats, Math.floor(order.length / 2)))
      .map(({ trial, number }) => asked(trial, number, row, { repeat: true }));
    const first = Math.ceil((2 * questions.length) / 3);
    again.forEach((one, number) => questions.splice(Math.min(first + 2 * number, questions.length), 0, one));
    plan.push(...questions);
  }
  return plan;
}

// --- progress ---

function stored(name) { try { return localStorage.getItem(name); } catch { keepsProgress = false; return null; } }

function save() {
  try {
    localStorage.setItem(`${SAVED}:${session.listener}`, JSON.stringify(session));
    localStorage.setItem(SAVED, session.listener);
  } catch { keepsProgress = false; }
}

function sessionOf(listener) {
  const kept = stored(`${SAVED}:${listener}`);
  if (kept) { try { return JSON.parse(kept); } catch { /* damaged: begin again */ } }
  return { format: test.answers_format, version: 1, test: test.id, listener, language, about: {},
    started: new Date().toISOString(), finished: null, step: "volume", heard: {}, milliseconds: 0, answers: [] };
}

// --- pages before and after the questions ---

function start() {
  show = start;
  const last = stored(SAVED);
  const kept = last ? sessionOf(last) : null;
  const listener = element("input", { id: "listener", autocomplete: "off", required: true, maxlength: "80",
    value: new URLSearchParams(location.search).get("listener") || "" });
  const choose = (name) => element("label", { class: "field" }, say(name), element("select", { id: name },
    element("option", { value: "" }, "–"),
    ...["yes", "no"].map((value) => element("option", { value }, say(`${name}_${value}`)))));
  const about = [choose("headphones"), choose("native")];
  const begin = () => {
    const name = listener.value.trim();
    if (!name) { note(say("need_listener")); listener.focus(); return; }
    session = sessionOf(name);
    for (const field of ["headphones", "native"]) {
      const value = document.getElementById(field).value;
      if (value) session.about[field] = value;
    }
    enter();
  };
  const form = element("form", { onsubmit: (event) => { event.preventDefault(); begin(); } },
    element("label", { class: "field" }, say("listener"), listener), ...about,
    element("div", { class: "row" }, element("button", { id: "begin", class: kept ? "" : "first" },
      say(kept ? "restart" : "begin"))));
  const count = planFor("0").filter((one) => !one.training).length;
  fill(element("p", {}, say("welcome")), element("p", {}, say("time", { count })),
    ...(keepsProgress ? [] : [element("p", { class: "note" }, say("no_storage"))]),
    ...(kept && !kept.finished ? [element("div", { class: "row" }, element("button", { id: "resume", class: "first",
      onclick: () => { session = kept; enter(); } }, say("resume", { listener: kept.listener })))] : []),
    form);
}

function enter() {
  session.plan = planFor(session.listener);
  if (texts[session.language]) language = session.language;
  save();
  headline();
  ({ volume, ready, question, done })[session.step]();
}

function to(step) { session.step = step.name; save(); step(); }

function volume() {
  show = volume;
  fill(element("h2", {}, say("volume_title")), element("p", {}, say("volume")), players([test.volume], [""]),
    element("div", { class: "row" }, element("button", { id: "next", class: "first", disabled: true,
      onclick: () => to(question) }, say("volume_done"))));
  heardAll = () => { document.getElementById("next").disabled = false; };
}

function ready() {
  show = ready;
  fill(element("h2", {}, say("start_title")), element("p", {}, say("start")), element("p", { class: "note" }, say("keys")),
    element("div", { class: "row" }, element("button", { id: "next", class: "first", onclick: () => {
      session.begun = [...(session.begun || []), session.plan[session.answers.length].kind]; to(question);
    } }, say("start_button"))));
}

function answersFile() {
  const { format, version, test: id, listener, language: used, about, started, finished, answers } = session;
  return JSON.stringify({ format, version, test: id, listener, language: used, about, started, finished,
    complete: answers.length === session.plan.length, answers }, null, 1);
}

function download() {
  const name = `${test.id}-${session.listener.replace(/[^\p{L}\p{N}_-]/gu, "_")}.json`;
  const address = URL.createObjectURL(new Blob([answersFile()], { type: "application/json" }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function done() {
  show = done;
  if (!session.finished) { session.finished = new Date().toISOString(); save(); }
  fill(element("h2", {}, say("done_title")), element("p", {}, say("done")),
    element("div", { class: "row" }, element("button", { id: "save", class: "first", onclick: download }, say("save"))),
    element("label", { class: "field" }, say("copy"),
      element("textarea", { id: "answers", readonly: true, onclick: (event) => event.target.select() }, answersFile())));
}

// --- sound ---

const audio = new Audio();
let playing = null;
let heardAll = () => {};
let buttons = [];

function stop() { audio.pause(); playing = null; }

function play(index) {
  const button = buttons[index];
  if (!button) return;
  stop();
  buttons.forEach((one) => one.classList.toggle("playing", one === button));
  playing = button;
  audio.src = test.clips[button.dataset.clip];
  audio.play().catch((error) => { if (error.name !== "AbortError") note(say("cannot_play")); });
}

audio.addEventListener("error", () => { if (playing) note(say("cannot_play")); });
audio.addEventListener("ended", () => {
  if (!playing) return;
  const button = playing;
  playing = null;
  button.classList.remove("playing");
  button.classList.add("heard");
  button.dataset.heard = "yes";
  button.dispatchEvent(new CustomEvent("heard"));
  if (buttons.every((one) => one.dataset.heard)) heardAll();
});

// Space: what has not been heard yet, then everything again in turn.
let turn = 0;
function playNext() {
  const unheard = buttons.findIndex((one) => !one.dataset.heard);
  if (playing) { note(""); return; }
  if (unheard >= 0) play(unheard);
  else if (buttons.length) play(turn++ % buttons.length);
}

function players(clips, names) {
  turn = 0;
  buttons = clips.map((clip, index) => element("button", { type: "button", class: "play", "data-clip": clip,
    onclick: () => play(index) }, `▶ ${names[index] ? say("play_one", { name: names[index] }) : say("play")}`));
  return element("div", { class: "players" }, ...buttons);
}

// --- questions ---

const trials = Object.fromEntries(test.sections.flatMap((one) => [...one.training, ...one.trials])
  .map((trial) => [trial.id, trial]));

function optionsOf(one, trial) {
  const scale = (name, from) => texts[language][name].map((text, place) => [String(from + place), text, String(place + 1)]);
  if (one.kind === "nmos") return scale("nmos_scale", 1);
  if (one.kind === "cmos") return scale("cmos_scale", -3);
  if (one.kind === "ab") return [[one.clips[0], "A", "1"], ["same", say("ab_same"), "2"], [one.clips[1], "B", "3"]];
  if (one.kind === "abx") return [[one.clips[0], "A", "1"], [one.clips[1], "B", "2"]];
  const numbered = trial.choices.map((text, place) => [String(place), text]);
  const turned = trial.tones ? numbered : [...numbered.slice(one.turn), ...numbered.slice(0, one.turn)];
  const rest = trial.tones ? [] : [["other", say("other")], ["unclear", say("unclear")]];
  return [...turned, ...rest].map(([value, text], place) => [value, text, String(place + 1)]);
}

function textOf(trial) {
  if (!trial.text) return [];
  const letters = [...trial.text];  // places count characters, not the browser's halves of them
  const [from, end] = trial.mark || [0, 0];
  const part = (start, stop_) => letters.slice(start, stop_).join("");
  const inside = trial.mark ? [part(0, from), element("mark", {}, part(from, end)), part(end)] : [trial.text];
  return [element("p", { class: "text", lang: trial.language || null }, ...inside)];
}

function question() {
  const number = session.answers.length;
  if (number >= session.plan.length) { to(done); return; }
  const one = session.plan[number];
  if (!one.training && !(session.begun || []).includes(one.kind)) { to(ready); return; }
  show = question;
  const trial = trials[one.trial];
  const heard = session.heard;
  const names = { nmos: [""], reading: [""], abx: ["A", "B", "X"] }[one.kind] || ["A", "B"];
  const before = session.milliseconds || 0;
  const shown = performance.now();
  const spent = () => Math.round(before + performance.now() - shown);
  let chosen = session.chosen ?? null;
  const keep = () => { session.milliseconds = spent(); session.chosen = chosen; save(); };

  const options = optionsOf(one, trial);
  const box = element("div", { class: "choices", role: "radiogroup", "aria-labelledby": "asked" },
    ...options.map(([value, text, key]) => element("label", { class: "choice" },
      element("input", { type: "radio", name: "answer", value, "data-key": key, disabled: true, checked: chosen === value,
        onchange: () => { chosen = value; note(""); keep(); refresh(); } }),
      element("span", {}, text), element("kbd", { "aria-hidden": "true" }, key))));
  const place = session.plan.slice(0, number + 1).filter((other) => !other.training).length;
  const count = session.plan.filter((other) => !other.training).length;
  const last = number + 1 === session.plan.length;
  const isReady = () => buttons.every((button) => button.dataset.heard);
  const next = element("button", { id: "next", class: "first", type: "button", onclick: () => {
    if (!isReady()) { note(say("listen_first")); return; }
    if (chosen === null) { note(say("answer_first")); return; }
    const value = ["nmos", "cmos"].includes(one.kind) ? Number(chosen) : chosen;
    session.answers.push({ ...one, position: number, answer: value, plays: { ...heard }, milliseconds: spent() });
    Object.assign(session, { heard: {}, milliseconds: 0, chosen: null });
    save();
    question();
  } }, say(last ? "finish" : "next"));
  function refresh() {
    const open = isReady();
    box.querySelectorAll("input").forEach((input) => { input.disabled = !open; });
    next.setAttribute("aria-disabled", String(!open || chosen === null));
  }
  fill(...[
    one.training ? element("h2", {}, say("training_title")) : element("h2", {}, say("question", { number: place, count })),
    one.training ? element("p", { class: "note" }, say("training_note"))
      : element("progress", { max: count, value: place - 1, "aria-label": say("question", { number: place, count }) }),
    ...textOf(trial),
    players(one.kind === "abx" ? [...one.clips, one.x] : one.clips, names),
    element("fieldset", {}, element("legend", { id: "asked" }, say(trial.tones ? "tones" : one.kind)), box),
    element("div", { class: "row" }, next, ...(one.training || number === 0 ? [] : [element("button", { id: "early",
      type: "button", onclick: download }, say("save_early"))])),
    element("p", { class: "note" }, say("keys")),
  ]);
  buttons.forEach((button, index) => {
    const name = names[index] || "play";
    if (heard[name]) { button.dataset.heard = "yes"; button.classList.add("heard"); }
    button.addEventListener("heard", () => { heard[name] = (heard[name] || 0) + 1; keep(); refresh(); });
  });
  heardAll = refresh;
  refresh();
}

// --- keys ---

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=radio]), select, textarea");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const radios = [...page.querySelectorAll("input[type=radio]")];
  const onButton = event.target.matches("button");
  const pick = (radio) => {
    if (!radio) return;
    if (radio.disabled) { note(say("listen_first")); return; }
    radio.focus();
    if (!radio.checked) radio.click();
  };
  const arrow = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === " " && !onButton) { event.preventDefault(); playNext(); }
  else if (/^[1-9]$/.test(event.key) && radios.length) pick(radios.find((one) => one.dataset.key === event.key));
  else if (arrow && radios.length) {
    event.preventDefault();
    const at = radios.findIndex((one) => one.checked);
    pick(radios[at < 0 ? (arrow > 0 ? 0 : radios.length - 1) : Math.min(radios.length - 1, Math.max(0, at + arrow))]);
  } else if (event.key === "Enter" && !onButton) {
    const button = document.getElementById("next");
    if (button && show !== start) { event.preventDefault(); button.click(); }
  }
});

window.listeningTest = { planFor, orderOf };
headline();
start();
})();
