// One problem at a time; all that comes from the server is put in as text.
const at = (id) => document.getElementById(id);
const model = document.documentElement.dataset.model;
let running = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function request() {
  const own = { stream_steps: true };
  const body = {
    model, stream: true, specguard: own,
    messages: [{ role: "user", content: at("problem").value }],
  };
  if (at("method").value) own.method = at("method").value;
  if (at("k").value) own.k = Number(at("k").value);
  if (at("threshold").value) own.threshold = Number(at("threshold").value);
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  if (at("max_tokens").value) body.max_tokens = Number(at("max_tokens").value);
  if (at("force") && at("force").checked) own.force = true;
  return body;
}

function bars(step) {
  const table = make("table", "bars");
  for (const [name, score] of Object.entries(step.scores)) {
    if (score === null) continue;
    const row = make("tr");
    const bar = make("div", "bar"), fill = make("div", "fill"), wide = make("td", "wide");
    fill.style.width = `${Math.min(1, Math.max(0, score)) * 100}%`;
    bar.append(fill);
    if (name === "ensemble" && step.threshold !== null) {
      const mark = make("div", "mark");
      mark.style.left = `${step.threshold * 100}%`;
      mark.title = `threshold ${step.threshold}`;
      bar.append(mark);
    }
    wide.append(bar);
    row.append(make("td", "", name.replaceAll("_", "-")), make("td", "", score.toFixed(2)), wide);
    table.append(row);
  }
  return table;
}

// The step in hand: what the target writes is there before the step is decided.
class Steps {
  constructor() { this.open = null; this.count = 0; }

  add(text) {
    if (!this.open) {
      this.open = make("li", "step");
      this.open.append(make("span", "quiet", "the target writes"), make("span", "text", ""));
      at("steps").append(this.open);
    }
    this.open.lastChild.textContent += text;
  }

  decide(step) {
    this.count += 1;
    const item = make("li", `step ${step.decision}`);
    const details = make("details"), summary = make("summary");
    summary.append(
      make("span", "number", `${step.index + 1} `), make("span", "badge", step.label), " ",
      make("span", "score", step.verdict), make("span", "text", step.text.trim()),
    );
    details.append(summary);
    if (step.draft_text && step.draft_text.trim() !== step.text.trim()) {
      details.append(make("h3", "", "The draft's step"), make("div", "text struck", step.draft_text.trim() + (step.is_given_up ? " …" : "")));
    }
    const scores = bars(step);
    if (scores.children.length) details.append(make("h3", "", "Scores"), scores);
    item.append(details);
    if (this.open) this.open.replaceWith(item); else at("steps").append(item);
    this.open = null;
    item.scrollIntoView({ block: "nearest" });
  }

  drop() { if (this.open) this.open.remove(); this.open = null; }
}

function finish(record) {
  const stats = record.stats;
  const answer = record.answer === null ? "No answer" : `Answer: ${record.answer}`;
  at("answer").textContent = `${answer} (finished by ${record.finish_reason})`;
  const rate = stats.step_acceptance_rate;
  at("facts").textContent = [
    `${stats.num_steps} steps, ${stats.num_tokens} tokens in ${stats.seconds.toFixed(2)} s`,
    `the target wrote ${stats.num_target_tokens}`,
    rate === null ? "nothing was judged" : `${Math.round(rate * 100)}% of the drafted steps accepted`,
    record.is_calibrated ? "calibrated" : "uncalibrated",
  ].join(" | ");
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function say(text, isFailure) {
  at("status").textContent = text;
  at("status").className = isFailure ? "failed" : "quiet";
}

async function solve() {
  const steps = new Steps();
  for (const id of ["steps", "answer", "facts"]) at(id).replaceChildren();
  running = new AbortController();
  at("solve").disabled = true;
  at("stop").disabled = false;
  say("Working");
  try {
    const headers = { "Content-Type": "application/json" };
    if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const { delta, specguard: own } = chunk.choices[0];
      if (own && own.step) steps.decide(own.step);
      else if (delta.content) steps.add(delta.content);
      if (own && own.stats) finish(own);
      say(`Working: step ${steps.count + 1}`);
    }
    say("");
  } catch (error) {
    const isStopped = error.name === "AbortError";
    steps.drop();
    say(isStopped ? "Stopped" : error.message, !isStopped);
  } finally {
    running = null;
    at("solve").disabled = false;
    at("stop").disabled = true;
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) solve();
});
at("stop").addEventListener("click", () => running && running.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  if (event.key === "Escape" && running) running.abort();
});
