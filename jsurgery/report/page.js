"use strict";
(() => {
  const player = document.querySelector(".player");
  if (!player) return;
  const videos = [...document.querySelectorAll(".clip video")];
  const [toggle, scrub, shown] = ["button", "input", "output"].map((tag) => player.querySelector(tag));
  const frames = Number(player.dataset.frames);
  const fps = Number(player.dataset.fps);
  const period = frames / fps;
  const tolerance = Math.max(0.75 / fps, 0.05);
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  const leader = () => videos.find((video) => !video.paused) ?? videos[0];
  const frameOf = (video) => Math.min(frames - 1, Math.floor(video.currentTime * fps + 0.01));

  function show(frame) {
    scrub.value = frame;
    shown.textContent = `frame ${frame + 1} of ${frames}`;
  }

  function seek(frame) {
    for (const video of videos) video.currentTime = (frame + 0.5) / fps;
    show(frame);
  }

  function setPlaying(value) {
    const frame = frameOf(leader());
    playing = value;
    toggle.textContent = playing ? "Pause" : "Play";
    for (const video of videos) playing ? video.play().catch(() => {}) : video.pause();
    if (!playing) seek(frame);
  }

  function follow() {
    if (playing) {
      const first = leader();
      for (const video of videos) {
        const drift = video.currentTime - first.currentTime;
        const apart = drift - period * Math.round(drift / period);
        if (!video.paused && !video.seeking && Math.abs(apart) > tolerance) video.currentTime = first.currentTime;
      }
      show(frameOf(first));
    }
    requestAnimationFrame(follow);
  }

  toggle.addEventListener("click", () => setPlaying(!playing));
  scrub.addEventListener("input", () => {
    const frame = Number(scrub.value);
    setPlaying(false);
    seek(frame);
  });
  player.hidden = false;
  setPlaying(playing);
  follow();
})();
