// Show a completion while it is generated. Without this file the page still works as a plain form.
"use strict";

const form = document.getElementById("form");
const go = document.getElementById("go");
const stop = document.getElementById("stop");
const status = document.getElementById("status");
const error = document.getElementById("error");
const samples = document.getElementById("samples");
const OPTIONS = ["max_tokens", "n", "temperature", "top_k", "top_p", "repetition_penalty", "random_seed"];
const API_NAME = { random_seed: "seed" };
const STORE = `gpt2cli ${form.dataset.model}`; // each model has settings of its own
let running = null;

// A browser may forbid storage; then the page remembers nothing.
function remember() {
  const kept = Object.fromEntries(OPTIONS.map((name) => [name, form.elements[name].value]));
  try {
    localStorage.setItem(STORE, JSON.stringify(kept));
    sessionStorage.setItem(STORE, form.elements.seed.value);
  } catch {}
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) || "{}");
    for (const name of OPTIONS) {
      if (typeof kept[name] === "string") form.elements[name].value = kept[name];
    }
    if (!form.elements.seed.value) form.elements.seed.value = sessionStorage.getItem(STORE) || "";
  } catch {}
}

function requestBody() {
  const body = { model: form.dataset.model, prompt: form.elements.seed.value, stream: true };
  for (const name of OPTIONS) {
    const text = form.elements[name].value;
    if (text !== "") body[API_NAME[name] || name] = Number(text);
  }
  body.seed ??= Math.floor(Math.random() * 2 ** 31); // shown below, so that the user can repeat it
  return body;
}

function frames(count, prompt) {
  samples.replaceChildren();
  return Array.from({ length: count }, () => {
    const article = document.createElement("article");
    const [old, added] = [document.createElement("span"), document.createElement("span")];
    [article.dir, old.className, added.className] = ["auto", "prompt", "new"];
    old.textContent = prompt;
    article.append(old, added);
    samples.append(article);
    return added;
  });
}

// Yield the objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection to the server was lost");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function generate(body) {
  const places = frames(body.n, body.prompt);
  let cut = 0; // tokens of the prompt that the model did not see
  const headers = { "Content-Type": "application/json" };
  if (form.elements.key) headers.Authorization = `Bearer ${form.elements.key.value}`;
  const asked = { method: "POST", headers, body: JSON.stringify(body), signal: running.signal };
  const response = await fetch("v1/completions", asked);
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message || `the server returned status ${response.status}`);
  }
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      places[choice.index].append(choice.text);
      cut = choice.prompt_cut || cut;
    }
  }
  return cut;
}

async function start() {
  if (running || !form.reportValidity()) return;
  remember();
  running = new AbortController();
  error.textContent = "";
  status.textContent = "generating …";
  go.disabled = true;
  stop.hidden = false;
  const body = requestBody();
  let outcome = `done, seed ${body.seed}`;
  try {
    const cut = await generate(body);
    if (cut) outcome += `; the model did not see the first ${cut} tokens of the text`;
  } catch (problem) {
    outcome = running.signal.aborted ? "stopped" : "";
    if (!outcome) error.textContent = problem.message;
    // remove samples without any text
    for (const place of samples.querySelectorAll(".new:empty")) place.parentElement.remove();
  }
  running = null;
  status.textContent = outcome;
  go.disabled = false;
  stop.hidden = true;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
form.addEventListener("change", remember);
stop.addEventListener("click", () => {
  running?.abort();
  go.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  if (event.key === "Escape") running?.abort();
});
document.getElementById("keys").hidden = false;
recall();
