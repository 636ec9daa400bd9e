(function () {
  "use strict";
  // Whatever shows the policy under the pointer, or in focus, stands out.
  var all = document.querySelectorAll("[data-policy]");
  function pick(event) {
    var at = event.target.closest ? event.target.closest("[data-policy]") : null;
    var name = at ? at.getAttribute("data-policy") : null;
    document.body.classList.toggle("picking", name !== null);
    all.forEach(function (e) { e.classList.toggle("picked", e.getAttribute("data-policy") === name); });
  }
  document.addEventListener("pointerover", pick);
  document.addEventListener("focusin", pick);

  // The timelines can be read out, by pointer or by arrow keys, both at once.
  var source = document.getElementById("timelines");
  if (!source) return;
  var lines = JSON.parse(source.textContent);
  var probes = Array.prototype.map.call(document.querySelectorAll(".probe"), function (box, i) {
    var rule = document.createElement("i");
    rule.hidden = true;
    box.appendChild(rule);
    var out = box.parentNode.querySelector(".readout");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Nodes over time; arrow keys read them out");
    return { box: box, rule: rule, out: out, words: out.textContent, line: lines[i] };
  });
  var current = 0;
  function show(sample) {
    current = Math.max(0, Math.min(lines[0].nodes.length - 1, sample));
    probes.forEach(function (p) {
      var n = p.line.nodes[Math.min(current, p.line.nodes.length - 1)];
      var at = new Date(1000 * (p.line.begin + current * p.line.width));
      p.rule.hidden = false;
      p.rule.style.left = 100 * (p.line.left + (p.line.right - p.line.left) * (current + 0.5) * p.line.width / p.line.span) + "%";
      p.out.textContent = at.toUTCString().slice(0, 22) + ": " + n[0] + " busy, " + n[1] + " idle, " +
        n[2] + " starting or stopping, " + n[3] + " parked";
    });
  }
  function hide() {
    probes.forEach(function (p) { p.rule.hidden = true; p.out.textContent = p.words; });
  }
  probes.forEach(function (p) {
    p.box.addEventListener("pointermove", function (event) {
      var area = p.box.getBoundingClientRect();
      var share = ((event.clientX - area.left) / area.width - p.line.left) / (p.line.right - p.line.left);
      show(Math.floor(share * p.line.span / p.line.width));
    });
    p.box.addEventListener("pointerleave", hide);
    p.box.addEventListener("blur", hide);
    p.box.addEventListener("keydown", function (event) {
      var step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(p.rule.hidden ? current : current + step);
    });
  });
})();
