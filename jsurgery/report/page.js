"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = (id) => JSON.parse(element(id)?.textContent ?? "null");
  const digits = (value) => (value === 0 || Math.abs(value) >= 0.001 ? String(Number(value.toPrecision(4))) : value.toExponential(2));

  // The tooltip: details of what is under the pointer.
  const tip = element("tip");

  function tell(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const { clientWidth } = document.documentElement;
    tip.style.left = `${Math.max(8, Math.min(clientWidth - width - 8, x - width / 2))}px`;
    tip.style.top = `${y - height - 14 < 8 ? y + 18 : y - height - 14}px`;
  }

  const forget = () => (tip.hidden = true);

  for (const table of document.querySelectorAll(".heat")) {
    const show = (event) => {
      const cell = event.target.closest("[data-tip]");
      if (cell) tell(cell.dataset.tip, event.clientX, event.clientY);
      else forget();
    };
    for (const kind of ["pointermove", "pointerdown"]) table.addEventListener(kind, show);
    table.addEventListener("pointerleave", forget);
  }
  addEventListener("scroll", forget, { passive: true });

  function nearest(points, x) {
    return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  }

  for (const plot of document.querySelectorAll("[data-chart]")) {
    const chart = JSON.parse(plot.dataset.chart);
    const rule = document.createElement("div");
    rule.className = "rule";
    rule.hidden = true;
    plot.append(rule);
    const show = (event) => {
      const box = plot.getBoundingClientRect();
      const [left, right] = chart.x;
      const at = left + ((event.clientX - box.left) / box.width) * (right - left);
      const x = nearest(chart.lines.map((line) => nearest(line.points, at)), at)[0];
      const reach = (right - left) / 30;
      const lines = chart.lines.map((line) => [line.label, nearest(line.points, x)]).filter(([, point]) => Math.abs(point[0] - x) <= reach);
      rule.style.left = `${(100 * (x - left)) / (right - left)}%`;
      rule.hidden = false;
      tell([digits(x), ...lines.map(([label, point]) => `${label}: ${digits(point[1])}`)].join("\n"), event.clientX, event.clientY);
    };
    for (const kind of ["pointermove", "pointerdown"]) plot.addEventListener(kind, show);
    plot.addEventListener("pointerleave", () => {
      forget();
      rule.hidden = true;
    });
  }

  // The slider that shows the best plan within another budget.
  function budgets({ front, depths }) {
    const { shares, errors, plans, rates, chosen, forward } = front;
    const slider = element("budget-slider");
    const cells = [...document.querySelectorAll("#strip b")];
    const plot = element("front");
    const percent = (share) => `${(100 * share).toFixed(1)}%`;
    const teacher = forward.fixed + cells.length * forward.softmax;
    const mark = document.createElement("div");
    mark.className = "mark";
    plot?.append(mark);

    function best(share) {
      let low = 0;
      let high = plans.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (shares[middle] <= share * (1 + 1e-9)) low = middle;
        else high = middle - 1;
      }
      return { share: shares[low], error: errors[low], plan: plans[low] };
    }

    function show({ share, error, plan }, budget, own) {
      cells.forEach((cell, block) => {
        const name = rates[plan[block]];
        cell.textContent = name;
        cell.style.setProperty("--depth", depths[name] ?? 0);
        cell.classList.toggle("full", depths[name] === 100);
        cell.classList.toggle("differs", plan[block] !== chosen.plan[block]);
      });
      const flops = plan.reduce((sum, rate) => sum + forward.block[rate], forward.fixed);
      element("budget-value").textContent = own ? `${percent(share)} of the teacher’s` : `${percent(share)} within ${percent(budget)}`;
      element("budget-error").textContent = error.toFixed(4);
      element("budget-forward").textContent = percent(flops / teacher);
      element("budget-differ").textContent = plan.filter((rate, block) => rate !== chosen.plan[block]).length;
      element("own-plan").disabled = own;
      if (!plot) return;
      const { x, y, log } = JSON.parse(plot.dataset.chart);
      const scale = log ? Math.log : Number;
      const top = log && error <= 0 ? 1 : (scale(y[1]) - scale(error)) / (scale(y[1]) - scale(y[0]));
      mark.style.left = `${(100 * (100 * share - x[0])) / (x[1] - x[0])}%`;
      mark.style.top = `${100 * Math.min(1, Math.max(0, top))}%`;
    }

    const showOwn = () => {
      slider.value = 100 * chosen.share;
      show(chosen, chosen.share, true);
    };
    slider.addEventListener("input", () => {
      const budget = Number(slider.value) / 100;
      show(best(budget), budget, false);
    });
    element("own-plan").addEventListener("click", showOwn);
    element("budget").hidden = false;
    showOwn();
  }

  // All models' clips of a prompt are one video, from which the canvases are drawn, so that they stay in step.
  function play(rows) {
    const [left, right, difference] = ["left", "right", "difference"].map(element);
    const models = [element("left-model"), element("right-model")];
    const player = element("player");
    const [toggle, scrub, shown] = [player.querySelector("button"), player.querySelector("[type=range]"), player.querySelector("output")];
    const options = { willReadFrequently: true };
    const video = document.createElement("video");
    const whole = document.createElement("canvas"); // holds a frame while its clips are read: the video may advance meanwhile
    const GAIN = 4;
    let row = rows[0];
    let drawn = "";
    let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    video.muted = video.loop = video.playsInline = true;

    const frameAt = (time) => Math.min(row.frames - 1, Math.floor(time * row.fps + 0.01));

    function choose(number) {
      row = rows[number];
      for (const canvas of [left, right, difference]) [canvas.width, canvas.height] = [row.width, row.height];
      [whole.width, whole.height] = [row.offset * row.models.length, row.height];
      scrub.max = row.frames - 1;
      drawn = "";
      video.src = "data:video/webm;base64," + element(`video-${number}`).textContent;
      setPlaying(playing);
    }

    function setPlaying(value) {
      playing = value;
      toggle.textContent = playing ? "Pause" : "Play";
      if (playing) video.play().catch((error) => error.name === "NotAllowedError" && setPlaying(false));
      else video.pause();
    }

    function note(side, model) {
      const numbers = row.notes?.[model] ?? {};
      const parts = [];
      if (!row.models.includes(model)) parts.push("This clip is missing.");
      if (numbers.score !== undefined) parts.push(`score ${numbers.score.toFixed(2)}`);
      if (numbers.distance) parts.push(`distance ${numbers.distance.toFixed(2)}`);
      element(`${side}-note`).textContent = parts.join(", ");
    }

    function draw() {
      const state = [video.src.length, video.currentTime, ...models.map((model) => model.value)].join();
      if (video.readyState >= 2 && !video.seeking && state !== drawn) {
        drawn = state;
        const frame = frameAt(video.currentTime);
        const context = whole.getContext("2d", options);
        context.drawImage(video, 0, 0);
        const halves = models.map((model) => {
          const place = row.models.indexOf(model.value);
          return place < 0 ? null : context.getImageData(place * row.offset, 0, row.width, row.height);
        });
        [left, right].forEach((canvas, side) => {
          const own = canvas.getContext("2d", options);
          if (halves[side]) own.putImageData(halves[side], 0, 0);
          else own.clearRect(0, 0, row.width, row.height);
        });
        const shownDifference = difference.getContext("2d", options);
        if (halves[0] && halves[1]) {
          const [one, two] = halves.map((half) => half.data);
          const result = new ImageData(row.width, row.height);
          let sum = 0;
          for (let i = 0; i < one.length; i += 4) {
            for (let channel = i; channel < i + 3; channel++) {
              const apart = Math.abs(one[channel] - two[channel]);
              sum += apart;
              result.data[channel] = GAIN * apart;
            }
            result.data[i + 3] = 255;
          }
          shownDifference.putImageData(result, 0, 0);
          element("difference-note").textContent = `mean ${(sum / (0.75 * one.length)).toFixed(1)} of 255 in this frame`;
        } else {
          shownDifference.clearRect(0, 0, row.width, row.height);
          element("difference-note").textContent = "";
        }
        models.forEach((model, side) => note(["left", "right"][side], model.value));
        scrub.value = frame;
        shown.textContent = `frame ${frame + 1} of ${row.frames}`;
      }
      requestAnimationFrame(draw);
    }

    toggle.addEventListener("click", () => setPlaying(!playing));
    scrub.addEventListener("input", () => {
      setPlaying(false);
      video.currentTime = (Number(scrub.value) + 0.5) / row.fps;
    });
    // For a moment after a seek has ended, a browser may still have the frame before: draw again when it has the new one.
    const drawAgain = () => {
      drawn = "";
      video.requestVideoFrameCallback?.(drawAgain);
    };
    drawAgain();
    video.addEventListener("error", () => {
      element("fault").textContent = "This browser cannot play the clips (VP9 in WebM).";
      element("fault").hidden = false;
    });
    for (const button of player.querySelectorAll("[name=prompt]")) {
      button.addEventListener("change", () => choose(Number(button.value)));
    }
    player.hidden = false;
    choose(Number(player.querySelector("[name=prompt]:checked").value));
    draw();
  }

  const [front, clips] = [data("front-data"), data("clips-data")];
  if (front) budgets(front);
  if (clips) play(clips);
})();
