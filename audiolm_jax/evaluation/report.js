"use strict";
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const STEP_SECONDS = 0.5;
  const BEFORE_BOUNDARY_SECONDS = 1;
  let playing = null;  // Of all audio of the page, what was started last.
  let current = null;  // The player that was heard last.

  // A browser may refuse to play, and a pause may overtake a play: neither is an error of the page.
  function play(audio) {
    if (playing !== audio) playing?.pause();
    playing = audio;
    audio.play().catch(() => {});
  }

  // Calls draw whenever the audio was moved and while it plays, at every frame or four times a second.
  function follow(audio, draw, everyFrame) {
    let waiting = false;
    const frame = () => {
      waiting = false;
      draw();
      if (!audio.paused && everyFrame) wait();
    };
    const wait = () => {
      if (!waiting) requestAnimationFrame(frame);
      waiting = true;
    };
    for (const name of ["play", "pause", "seeking", "timeupdate", "ended"]) {
      audio.addEventListener(name, () => (everyFrame ? wait() : draw()));
    }
  }

  // --- Players: versions of one recording, at one position.

  function makePlayer(figure, index, group) {
    const { title, kind, seconds, boundary } = figure.dataset;
    const audio = find("audio", figure), picture = find(".picture", figure);
    const player = { title, kind, audio, picture, figure, group, seconds: Number(seconds), boundary: Number(boundary) };
    const position = picture.appendChild(document.createElement("span"));
    position.className = "position";
    if (index < 9) {
      const key = document.createElement("kbd");
      key.textContent = index + 1;
      find("figcaption", figure).prepend(key, " ");
    }
    const shown = (time) => `${time.toFixed(1)} of ${player.seconds.toFixed(1)} seconds`;
    const attributes = { role: "slider", tabindex: 0, "aria-label": `Position in ${audio.getAttribute("aria-label")}`,
      "aria-valuemin": 0, "aria-valuemax": player.seconds, "aria-valuenow": 0, "aria-valuetext": shown(0) };
    for (const [name, value] of Object.entries(attributes)) picture.setAttribute(name, value);

    follow(audio, () => (position.style.left = `${100 * Math.min(1, audio.currentTime / player.seconds)}%`), smooth);
    for (const name of ["seeked", "pause"]) {
      audio.addEventListener(name, () => {
        picture.setAttribute("aria-valuenow", audio.currentTime.toFixed(2));
        picture.setAttribute("aria-valuetext", shown(audio.currentTime));
      });
    }
    // The browser tells of a start later; by then another may have been started.
    audio.addEventListener("play", () => {
      if (audio.paused) return;
      play(audio);
      hear(player);
    });
    picture.addEventListener("pointerdown", (event) => {
      picture.setPointerCapture(event.pointerId);
      seekTo(player, event);
    });
    picture.addEventListener("pointermove", (event) => event.buttons && seekTo(player, event));
    picture.addEventListener("keydown", (event) => onPictureKey(player, event));
    return player;
  }

  function seek(player, time) {
    player.audio.currentTime = Math.max(0, Math.min(time, player.seconds));
    hear(player);
  }

  function seekTo(player, event) {
    const { left, width } = player.picture.getBoundingClientRect();
    seek(player, ((event.clientX - left) / width) * player.seconds);
  }

  function onPictureKey(player, event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { audio, seconds } = player;
    const actions = {
      " ": () => (audio.paused ? play(audio) : audio.pause()),
      Enter: () => (audio.paused ? play(audio) : audio.pause()),
      ArrowLeft: () => seek(player, audio.currentTime - STEP_SECONDS),
      ArrowRight: () => seek(player, audio.currentTime + STEP_SECONDS),
      Home: () => seek(player, 0),
      End: () => seek(player, seconds),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // The version that a group's keys go out from.
  function hear(player) {
    const group = player.group;
    if (group.heard !== player) group.before = group.heard;
    group.heard = current = player;
    for (const figure of all("figure.heard")) figure.classList.remove("heard");
    player.figure.classList.add("heard");
  }

  function switchTo(player) {
    const from = player.group.heard ?? player;
    const time = from.audio.ended ? 0 : from.audio.currentTime;
    player.picture.focus();
    seek(player, time < player.seconds ? time : 0);
    play(player.audio);
  }

  const groups = all(".group").map((section) => {
    const group = { title: section.getAttribute("aria-label"), section, heard: null, before: null };
    group.players = all("figure", section).map((figure, index) => makePlayer(figure, index, group));
    return group;
  });
  find("#keys").hidden = false;

  function onVersionKey(event) {
    const group = groups.find(({ section }) => section.contains(document.activeElement)) ?? current?.group ?? groups[0];
    const key = event.key.toLowerCase();
    if (/^[1-9]$/.test(key) && group.players[key - 1]) switchTo(group.players[key - 1]);
    if (key === "x" && group.before) switchTo(group.before);
    const prompted = group.players.find(({ boundary }) => boundary);
    if (key === "p" && prompted) seek(group.heard ?? prompted, prompted.boundary - BEFORE_BOUNDARY_SECONDS);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, textarea, select")) return;
    onVersionKey(event);
    onBlindKey(event);
  });

  // --- Blind test: which of two is generated?

  const FORMAT = "audiolm-blind-test-1";
  const identity = document.body.dataset.identity;
  const STORE = `audiolm-blind-test:${identity}`;
  const FIRST_OR_SECOND = ["A", "B"];
  const status = find("#blind-status"), blindBar = find("#blind-position"), blindTable = find("#blind-answers");
  const hearButtons = all("[data-hear]"), sayButtons = all("[data-say]");
  const startButton = find("#blind-start"), finishButton = find("#blind-finish"), exportButton = find("#blind-export");
  const sides = [new Audio(), new Audio()];
  const pairs = groups.flatMap(({ title, players }) => {
    const real = players.find(({ kind }) => kind === "reconstruction") ?? players.find(({ kind }) => kind === "original");
    return real ? players.filter(({ kind }) => kind === "generated").map((generated) => ({ title, real, generated })) : [];
  });
  let test = null;  // {seed, answers: [0 or 1: the side said to be generated], finished}
  let trials = [];  // Pairs in the test's order, each with generatedSide, 0 or 1.
  let heard = [false, false];
  let loaded = null;  // The trial whose audio the sides hold.

  // Uniform numbers in [0, 1), the same for the same seed: mulberry32.
  function generator(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let bits = Math.imul(seed ^ (seed >>> 15), seed | 1);
      bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
      return ((bits ^ (bits >>> 14)) >>> 0) / 4294967296;
    };
  }

  function shuffled(seed) {
    const random = generator(seed), order = [...pairs];
    for (let last = order.length - 1; last > 0; last--) {
      const other = Math.floor(random() * (last + 1));
      [order[last], order[other]] = [order[other], order[last]];
    }
    return order.map((pair) => ({ ...pair, generatedSide: random() < 0.5 ? 0 : 1 }));
  }

  // P(X <= most) for so many tosses that each come out right with this chance.
  function chanceOfAtMost(most, tosses, chance) {
    let total = 0, logChoices = 0;
    for (let right = 0; right <= most; right++) {
      total += Math.exp(logChoices + right * Math.log(chance) + (tosses - right) * Math.log1p(-chance));
      logChoices += Math.log((tosses - right) / (right + 1));
    }
    return total;
  }

  // Where a condition on a chance, true for small ones, turns false.
  function turningPoint(condition) {
    let low = 0, high = 1;
    for (let round = 0; round < 60; round++) {
      const middle = (low + high) / 2;
      if (condition(middle)) low = middle;
      else high = middle;
    }
    return low;
  }

  // The exact 95 % interval of a share (Clopper and Pearson 1934).
  function interval(right, count) {
    return [
      right === 0 ? 0 : turningPoint((chance) => 1 - chanceOfAtMost(right - 1, count, chance) < 0.025),
      right === count ? 1 : turningPoint((chance) => chanceOfAtMost(right, count, chance) > 0.025),
    ];
  }

  function begin(seed, answers, finished) {
    playing?.pause();
    test = { seed, answers, finished };
    trials = shuffled(seed);
    show();
  }

  // A browser may keep nothing for files; the answers then live as long as the page.
  function save() {
    try {
      localStorage.setItem(STORE, JSON.stringify(test));
    } catch {
      return;
    }
  }

  function saved() {
    try {
      return JSON.parse(localStorage.getItem(STORE));
    } catch {
      return null;
    }
  }

  function newTest() {
    begin(crypto.getRandomValues(new Uint32Array(1))[0], [], false);
    save();
    hearButtons[0].focus();
  }

  const isOver = () => test.finished || test.answers.length === trials.length;

  function show() {
    const running = test !== null && !isOver(), over = test !== null && isOver();
    find("#blind-trial").hidden = !running;
    blindTable.hidden = !over;
    startButton.hidden = running;
    startButton.textContent = over ? "Start anew, without these answers" : "Start";
    finishButton.hidden = !running || test.answers.length === 0;
    exportButton.hidden = test === null || test.answers.length === 0;
    if (running) status.textContent = `Pair ${test.answers.length + 1} of ${trials.length}.`;
    else if (over) showScore();
    else status.textContent = `${pairs.length} pairs.`;
    if (running) load(trials[test.answers.length]);
  }

  function load(trial) {
    if (loaded === trial) return;
    loaded = trial;
    heard = [false, false];
    for (const [side, audio] of sides.entries()) {
      audio.pause();
      audio.src = (side === trial.generatedSide ? trial.generated : trial.real).audio.src;
    }
    blindBar.value = 0;
    for (const button of hearButtons) button.setAttribute("aria-pressed", false);
    for (const button of sayButtons) button.disabled = true;
  }

  const trialSeconds = () => Math.min(loaded.real.seconds, loaded.generated.seconds);

  function hearSide(side) {
    const audio = sides[side], time = sides[1 - side].paused ? audio.currentTime : sides[1 - side].currentTime;
    const again = !audio.paused || time > trialSeconds() - 0.05;
    audio.currentTime = again ? 0 : time;
    play(audio);
    heard[side] = true;
    for (const [number, button] of hearButtons.entries()) button.setAttribute("aria-pressed", number === side);
    for (const button of sayButtons) button.disabled = !heard.every(Boolean);
  }

  for (const audio of sides) {
    follow(audio, () => {
      if (!loaded) return;
      if (!audio.paused || audio === playing) blindBar.value = Math.min(1, audio.currentTime / trialSeconds());
      if (!audio.paused && audio.currentTime >= trialSeconds()) audio.pause();
    }, true);
  }

  function say(side) {
    playing?.pause();
    test.answers.push(side);
    save();
    show();
    (isOver() ? exportButton : hearButtons[0]).focus();
  }

  function results() {
    return test.answers.map((side, number) => {
      const { title, real, generated, generatedSide } = trials[number];
      return { recording: title, generated: generated.title, against: real.title,
        generated_was: FIRST_OR_SECOND[generatedSide], answer: FIRST_OR_SECOND[side], right: side === generatedSide };
    });
  }

  function score() {
    const answered = results(), right = answered.filter((answer) => answer.right).length;
    const [low, high] = answered.length ? interval(right, answered.length) : [0, 1];
    return { right, answered: answered.length, low, high };
  }

  function showScore() {
    const { right, answered, low, high } = score(), percent = (share) => `${(100 * share).toFixed(1)} %`;
    const verdict = low > 0.5 ? "You can tell." : high < 0.5 ? "You can tell, but take the generated for real."
      : "That is no more than chance could do: 50 % lie in the interval.";
    status.textContent = `${right} of ${answered} right: ${percent(right / answered)}, 95 % interval ${percent(low)} to ${percent(high)}. ${verdict}`;
    blindTable.replaceChildren();
    blindTable.createCaption().textContent = "Answers";
    const titles = blindTable.createTHead().insertRow(), body = blindTable.createTBody();
    for (const title of ["recording", "generated", "against", "it was", "answer", "right"]) {
      const cell = titles.appendChild(document.createElement("th"));
      cell.scope = "col";
      cell.textContent = title;
    }
    for (const answer of results()) {
      const row = body.insertRow();
      for (const value of Object.values({ ...answer, right: answer.right ? "yes" : "no" })) row.insertCell().textContent = value;
    }
  }

  function download() {
    const { seed, finished } = test, title = document.title;
    const text = JSON.stringify({ format: FORMAT, report: identity, title, seed, finished, pairs: pairs.length, score: score(), answers: results() }, null, 2);
    const link = document.createElement("a");
    link.href = `data:application/json,${encodeURIComponent(text)}`;
    link.download = `${title.replace(/\W+/g, "-").toLowerCase()}-answers.json`;
    link.click();
  }

  async function upload(file) {
    try {
      const found = JSON.parse(await file.text());
      if (found.format !== FORMAT) throw new Error("it holds no answers of a blind test");
      if (found.report !== identity) throw new Error(`its answers belong to another report, ${found.title}`);
      const answers = found.answers.map(({ answer }) => FIRST_OR_SECOND.indexOf(answer));
      if (answers.includes(-1) || answers.length > pairs.length || !Number.isInteger(found.seed)) throw new Error("its answers are damaged");
      begin(found.seed, answers, found.finished === true);
      save();
    } catch (error) {
      status.textContent = `${file.name} cannot be used: ${error.message}.`;
    }
  }

  function onBlindKey(event) {
    const side = FIRST_OR_SECOND.indexOf(event.key.toUpperCase());
    if (side < 0 || test === null || isOver()) return;
    if (!event.shiftKey) hearSide(side);
    else if (heard.every(Boolean)) say(side);
  }

  if (pairs.length) {
    find("#blind").hidden = find('a[href="#blind"]').hidden = false;
    startButton.addEventListener("click", newTest);
    finishButton.addEventListener("click", () => {
      playing?.pause();
      test.finished = true;
      save();
      show();
      exportButton.focus();
    });
    exportButton.addEventListener("click", download);
    find("#blind-import").addEventListener("change", (event) => upload(event.target.files[0]));
    for (const [side, button] of hearButtons.entries()) button.addEventListener("click", () => hearSide(side));
    for (const [side, button] of sayButtons.entries()) button.addEventListener("click", () => say(side));
    const before = saved();
    if (before) begin(before.seed, before.answers, before.finished);
    else show();
  }
})();
