// Keeps the page live, its cells walkable and its colours as chosen. Without it
// the page shows everything all the same, once.
"use strict";
const root = document.documentElement;
const kept = (() => { try { return localStorage; } catch { return {}; } })();
if (kept.theme === "dark" || kept.theme === "light") root.dataset.theme = kept.theme;

addEventListener("DOMContentLoaded", () => {
  const live = document.getElementById("live"), theme = document.getElementById("theme"), stall = Number(document.body.dataset.stall);
  if (!live) return;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { theme.textContent = dark() ? "Light colours" : "Dark colours"; };
  theme.hidden = false;
  label();
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { kept.theme = root.dataset.theme; } catch { /* it holds for this page */ }
    label();
  });

  // Details of the node that is pointed at or focused.
  const show = (e) => {
    if (e.target.matches?.("button.cell")) document.getElementById("detail").textContent = e.target.ariaLabel;
  };
  for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show);

  // One tab stop for each lane; arrow keys walk in it.
  document.addEventListener("keydown", (e) => {
    if (!e.target.matches?.("button.cell")) return;
    const cells = [...e.target.parentElement.children], at = cells.indexOf(e.target);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: cells.length - 1 }[e.key];
    if (to === undefined || !cells[to]) return;
    e.preventDefault();
    e.target.tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  });

  // What changed is replaced; what is open, focused and scrolled stays.
  const refresh = async () => {
    const answer = await fetch(location.href, { signal: AbortSignal.timeout(stall) });
    if (!answer.ok) throw new Error("this replica does not answer with a plan");
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const fresh = next.getElementById(part.id);
      if (!fresh) continue;
      for (const d of part.querySelectorAll("details")) {
        const same = d.id ? next.getElementById(d.id) : fresh.querySelector("details:not([id])");
        if (same) same.open = d.open;
      }
      const detail = part.querySelector("#detail")?.textContent;
      if (detail) fresh.querySelector("#detail").textContent = detail;
      const focused = document.activeElement, lane = focused.closest?.(".lane")?.id;
      const name = focused.ariaLabel?.split(": ")[0];
      const inside = part.contains(focused), index = inside ? [...part.querySelectorAll("a,button,summary,[tabindex]")].indexOf(focused) : -1;
      const scrolled = [...part.querySelectorAll(".scroll,.timeline")].map((s) => [s.scrollLeft, s.scrollTop]);
      part.replaceChildren(...fresh.childNodes);
      part.querySelectorAll(".scroll,.timeline").forEach((s, i) => { if (scrolled[i]) s.scrollTo(...scrolled[i]); });
      if (inside) {
        const cells = lane ? [...(document.getElementById(lane)?.querySelectorAll("button.cell") ?? [])] : [];
        const again = cells.find((c) => c.ariaLabel.split(": ")[0] === name) ?? [...part.querySelectorAll("a,button,summary,[tabindex]")][index];
        again?.focus({ preventScroll: true });
      }
    }
    live.textContent = next.getElementById("live").textContent + ", live";
    live.className = "";
  };
  let stream, heard, underway = false;
  const lost = () => { live.textContent = "connection lost; trying again"; live.className = "stalled"; };
  const connect = () => {
    stream?.close();
    heard = Date.now();
    stream = new EventSource("/ui/events");
    let first = true;
    const update = async () => {
      if (underway) return;
      underway = true;
      try { await refresh(); } catch { lost(); } finally { underway = false; }
    };
    stream.addEventListener("changed", () => { heard = Date.now(); update(); });
    stream.addEventListener("alive", () => { heard = Date.now(); if (first || live.className) update(); first = false; });
    stream.addEventListener("error", lost);
  };
  connect();
  // A network that stalls says nothing, and neither does the browser.
  setInterval(() => { if (Date.now() - heard > stall) { lost(); connect(); } }, Math.min(stall / 3, 5000));
});
