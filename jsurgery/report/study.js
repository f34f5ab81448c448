"use strict";
(() => {
  const { study, pairs } = JSON.parse(document.getElementById("study").textContent);
  const byId = new Map(pairs.map((pair) => [pair.id, pair]));
  const storageKey = `jsurgery study ${study}`;
  const element = (id) => document.getElementById(id);
  const canvases = [element("one"), element("two")];
  const buttons = [...document.querySelectorAll("[data-answer]")];
  const keys = { ArrowLeft: "one", 1: "one", ArrowDown: "none", 0: "none", ArrowRight: "two", 2: "two" };
  const video = document.createElement("video");
  const frame = document.createElement("canvas"); // holds a frame while both halves are drawn: the video may advance meanwhile
  video.muted = video.loop = video.playsInline = true;
  let state = restore() ?? begin();
  let shownAt = 0;
  let drawn = -1;

  function random(below) {
    return Math.floor((crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32) * below);
  }

  function begin() {
    const order = pairs.map((pair) => pair.id);
    for (let i = order.length - 1; i > 0; i--) {
      const j = random(i + 1);
      [order[i], order[j]] = [order[j], order[i]];
    }
    const participant = [...crypto.getRandomValues(new Uint8Array(6))].map((n) => n.toString(16).padStart(2, "0")).join("");
    const first = Object.fromEntries(order.map((id) => [id, random(2) ? "one" : "two"]));
    return { participant, order, first, answers: {}, at: -1 };
  }

  function restore() {
    try {
      const saved = JSON.parse(localStorage.getItem(storageKey));
      const fits = saved.order.every((id) => byId.has(id) && saved.first[id]) && saved.order.length === pairs.length;
      return fits && saved.answers ? saved : null;
    } catch {
      return null;
    }
  }

  function keep() {
    try {
      localStorage.setItem(storageKey, JSON.stringify(state));
    } catch {
      fault("This browser does not keep your answers when the page is closed: please finish without closing it.");
    }
  }

  function fault(text) {
    element("fault").textContent = text;
    element("fault").hidden = !text;
  }

  function show() {
    const now = state.at < 0 ? "intro" : state.at < pairs.length ? "pair" : "end";
    for (const id of ["intro", "pair", "end"]) element(id).hidden = id !== now;
    video.pause();
    if (now !== "pair") return;
    const pair = byId.get(state.order[state.at]);
    const before = state.answers[pair.id];
    element("prompt").textContent = pair.prompt;
    element("place").textContent = `${state.at + 1} of ${pairs.length}`;
    element("bar").value = Object.keys(state.answers).length;
    element("back").disabled = state.at === 0;
    for (const button of buttons) {
      button.classList.toggle("chosen", before !== undefined && before.shown === button.dataset.answer);
      button.blur();
    }
    for (const canvas of canvases) {
      canvas.width = pair.width;
      canvas.height = pair.height;
    }
    frame.width = pair.offset + pair.width;
    frame.height = pair.height;
    fault("");
    drawn = -1;
    video.src = "data:video/webm;base64," + element(`video-${pair.id}`).textContent;
    play();
    shownAt = performance.now();
  }

  function play() {
    video.play().catch((error) => {
      if (error.name === "NotAllowedError") fault("Press the space bar or tap a video to play.");
    });
  }

  function draw() {
    if (element("pair").hidden === false && video.readyState >= 2 && video.currentTime !== drawn) {
      drawn = video.currentTime;
      const pair = byId.get(state.order[state.at]);
      const swapped = state.first[pair.id] === "two";
      frame.getContext("2d").drawImage(video, 0, 0);
      canvases.forEach((canvas, side) => {
        const from = (side === 1) === swapped ? 0 : pair.offset;
        const size = [pair.width, pair.height];
        canvas.getContext("2d").drawImage(frame, from, 0, ...size, 0, 0, ...size);
      });
    }
    requestAnimationFrame(draw);
  }

  function go(to) {
    state.at = Math.max(0, Math.min(pairs.length, to));
    show();
    keep();
  }

  function answer(shown) {
    const id = state.order[state.at];
    const meant = shown === "none" ? "none" : shown === state.first[id] ? "first" : "second";
    const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
    state.answers[id] = { answer: meant, shown, seconds };
    go(state.at + 1);
  }

  function toggle() {
    if (video.paused) play();
    else video.pause();
  }

  function save() {
    const answers = state.order
      .filter((id) => id in state.answers)
      .map((id) => ({ pair: id, answer: state.answers[id].answer, first: state.first[id], seconds: state.answers[id].seconds }));
    const text = JSON.stringify({ study, participant: state.participant, answers }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `study-${study}-${state.participant}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  for (const button of buttons) button.addEventListener("click", () => answer(button.dataset.answer));
  for (const canvas of canvases) canvas.addEventListener("click", toggle);
  video.addEventListener("error", () => fault("This browser cannot play the videos (VP9 in WebM)."));
  element("begin").addEventListener("click", () => go(0));
  element("back").addEventListener("click", () => go(state.at - 1));
  element("return").addEventListener("click", () => go(pairs.length - 1));
  element("save").addEventListener("click", save);
  element("again").addEventListener("click", () => {
    if (!confirm("This deletes your answers from this browser. Start again?")) return;
    state = begin();
    show();
    keep();
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = document.activeElement instanceof HTMLButtonElement;
    if (state.at < 0) {
      if (event.key !== "Enter" || onButton) return;
      go(0);
    } else if (event.key === "Backspace" && state.at > 0) go(state.at - 1);
    else if (state.at >= pairs.length) return;
    else if (event.key in keys) answer(keys[event.key]);
    else if (event.key === " " && !onButton) toggle();
    else return;
    event.preventDefault();
  });
  show();
  draw();
})();
