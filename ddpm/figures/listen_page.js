"use strict";
// One sound at a time; a click on a spectrogram plays it, or stops it.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const figure = player.closest("figure");
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    figure.classList.add("playing");
  });
  for (const name of ["pause", "ended"]) player.addEventListener(name, () => figure.classList.remove("playing"));
  figure.querySelector("img").addEventListener("click", () => {
    if (!player.paused) return player.pause();
    player.currentTime = 0;
    player.play();
  });
}
