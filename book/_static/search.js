/* A summary below each search result, from search_texts.js: no request, no raw TeX. */
(() => {
  const GREEK = {alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ε", varepsilon: "ε", zeta: "ζ", eta: "η",
    theta: "θ", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", rho: "ρ", sigma: "σ", tau: "τ", phi: "φ",
    varphi: "φ", chi: "χ", psi: "ψ", omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Sigma: "Σ", Phi: "Φ",
    Psi: "Ψ", Omega: "Ω"};
  const SIGNS = {times: "×", cdot: "·", pm: "±", le: "≤", leq: "≤", ge: "≥", geq: "≥", approx: "≈", infty: "∞",
    to: "→", rightarrow: "→", leftarrow: "←", in: "∈", sim: "~", ne: "≠", neq: "≠", sum: "Σ", partial: "∂", nabla: "∇",
    log: "log", exp: "exp", max: "max", min: "min", ldots: "…", dots: "…", mid: "|", lVert: "‖", rVert: "‖", ell: "ℓ",
    circ: "°", top: "T", quad: " ", left: "", right: ""};

  /* A formula as one line of text; an ellipsis where that would still be TeX. */
  const plain = tex => {
    const text = tex
      .replace(/\\(?:mathbb|mathcal|mathrm|mathbf|operatorname|text|hat|tilde|bar)\s*\{([^{}]*)\}/g, "$1")
      .replace(/\\([a-zA-Z]+)/g, (all, name) => GREEK[name] ?? SIGNS[name] ?? all)
      .replace(/\\[,;:! ]/g, " ")
      .replace(/([_^])\{(\w{1,3})\}/g, "$1$2");
    return /[\\{}&]/.test(text) ? "…" : text.trim();
  };
  const readable = text => text.replace(/\\\(([\s\S]*?)\\\)/g, (_, tex) => plain(tex)).replace(/\\\[[\s\S]*?\\\]/g, "…");

  const query = new URLSearchParams(location.search).get("q") || "";
  const words = query.toLowerCase().split(/[^\p{Letter}\p{Number}_]+/u).filter(Boolean);
  const stemmer = new Stemmer();
  const stems = [...new Set(words.map(word => stemmer.stemWord(word)))].filter(Boolean);

  const find = text => {
    const lower = text.toLowerCase();
    const exact = words.map(word => lower.indexOf(word)).filter(i => i >= 0);
    const roots = stems.map(stem => lower.indexOf(stem)).filter(i => i >= 0);
    return exact.length ? Math.min(...exact) : roots.length ? Math.min(...roots) : -1;
  };

  const summary = (page, anchor) => {
    const sections = (window.SEARCH_TEXTS || {})[page] || [];
    const own = sections.filter(([id]) => id === anchor);
    for (const [, text] of [...own, ...sections]) {
      const clean = readable(text);
      const at = find(clean);
      if (at < 0) continue;
      const from = at < 90 ? 0 : clean.indexOf(" ", at - 80) + 1;
      const to = from + 220 >= clean.length ? clean.length : clean.lastIndexOf(" ", from + 220);
      return (from ? "… " : "") + clean.slice(from, to) + (to < clean.length ? " …" : "");
    }
    return own.length ? readable(own[0][1]).slice(0, 200) : "";
  };

  /* Text with the words of the query marked. */
  const marked = text => {
    const into = document.createElement("p");
    into.className = "context";
    const looked = [...new Set([...words, ...stems])].map(w => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const parts = looked.length ? text.split(new RegExp(`(?<!\\p{Letter})((?:${looked.join("|")})[\\p{Letter}]*)`, "giu")) : [text];
    parts.forEach((part, i) => {
      if (i % 2) into.appendChild(document.createElement("mark")).textContent = part;
      else into.append(part);
    });
    return into;
  };

  const complete = item => {
    const link = item.querySelector("a");
    if (!link || item.dataset.complete) return;
    item.dataset.complete = "yes";  // also where there is no summary: what is written here calls the observer again
    const [file, anchor = ""] = link.getAttribute("href").split("#");
    link.textContent = readable(link.textContent);
    const text = summary(file.split("?")[0].replace(/\.html$/, ""), decodeURIComponent(anchor));
    if (text) item.append(marked(text));
    const twin = [...out.querySelectorAll("ul.search > li")].find(other => other !== item
      && other.textContent === item.textContent);  // the page and the section that holds the word
    if (twin) item.remove();
  };

  const out = document.getElementById("search-results");
  if (!out) return;
  new MutationObserver(() => out.querySelectorAll("ul.search > li").forEach(complete))
    .observe(out, {childList: true, subtree: true});
})();
