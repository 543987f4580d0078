/* Browser side of the pages: theme, keys, search, and the notice of a lost connection. */
window.traceml = (() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  // The theme that was chosen, and the one of the last visit; given by the server, as access to cookies or storage takes
  // long in a new tab, and would delay the first paint.
  const cookies = { ...window.tracemlCookies };
  function keep(name, value) {
    if (cookies[name] === value) return;
    cookies[name] = value;
    document.cookie = `${name}=${value}; path=/; max-age=31536000; SameSite=Lax`;
  }
  const theme = () => cookies.traceml_chosen_theme ?? (system.matches ? "dark" : "light");

  function applyTheme() {
    const name = theme();
    root.dataset.theme = name;
    const button = document.getElementById("theme");
    if (button) button.textContent = name === "dark" ? "Light" : "Dark";
    // Retried until NiceGUI is connected: the server then redraws the charts if it had assumed another theme.
    const tell = () => {
      if (!window.did_handshake) return setTimeout(tell, 30);
      keep("traceml_theme", name);
      emitEvent("traceml_theme", name);
    };
    tell();
  }

  /* Calls a function when NiceGUI has built the page, which takes seconds on a busy machine. */
  function whenBuilt(act) {
    if (document.getElementById("content") && !document.getElementById("first-paint")) act();
    else setTimeout(() => whenBuilt(act), 25);
  }

  function toggleTheme() {
    keep("traceml_chosen_theme", theme() === "dark" ? "light" : "dark");
    applyTheme();
  }

  function filter(box) {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const part of document.getElementById(box.dataset.filter)?.querySelectorAll("[data-words]") ?? []) {
      part.classList.toggle("filtered", !words.every((word) => part.dataset.words.includes(word)));
    }
  }

  const tabs = () => [...document.querySelectorAll(".tabs a")].filter((tab) => tab.offsetParent !== null);
  function follow() {
    let here = null;
    for (const tab of tabs()) {
      const place = document.getElementById(tab.hash.slice(1));
      if (place && place.getBoundingClientRect().top < 160) here = tab;
    }
    for (const tab of tabs()) tab.classList.toggle("here", tab === (here ?? tabs()[0]));
  }

  /* The button that has opened the menu gets the focus: that of a hidden part is lost. */
  function closeMenu(menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName ?? "") && event.target.type !== "checkbox";
    if (event.key === "Escape") {
      const menu = event.target.closest?.("details.menu[open]");
      if (menu) closeMenu(menu);
      else document.activeElement?.blur?.();
      return;
    }
    if (typing) return;
    const number = Number(event.key);
    if (number >= 1 && tabs()[number - 1]) tabs()[number - 1].click();
    else if (event.key === "t") toggleTheme();
    else if (event.key === "r") location.href = "/";
    else if (event.key === "/") whenBuilt(() => document.getElementById("search")?.focus());
    else if (event.key === "j" || event.key === "k") whenBuilt(() => move(event.key === "j" ? 1 : -1));
    else if (event.key === "?") help();
    else return;
    event.preventDefault();
  }

  function move(by) {
    const links = [...document.querySelectorAll("a.name")].filter((each) => each.offsetParent !== null);
    const at = links.indexOf(document.activeElement);
    links[Math.max(0, Math.min(links.length - 1, at + by))]?.focus();
  }

  /* A row of the list that moves loses the focus in browsers: the run that has it gets it back. */
  let focused = null;
  const selector = (part) => {
    if (part.matches("a.name")) return `a.name[href="${CSS.escape(part.getAttribute("href"))}"]`;
    return part.dataset.run ? `input[data-run="${CSS.escape(part.dataset.run)}"]` : null;
  };
  function keepFocus() {
    document.addEventListener("focusin", (event) => { focused = selector(event.target); });
    document.addEventListener("focusout", (event) => queueMicrotask(() => {
      if (event.target.isConnected && document.activeElement === document.body) focused = null;
    }));
    new MutationObserver(() => {
      if (focused && document.activeElement === document.body) document.querySelector(focused)?.focus({ preventScroll: true });
    }).observe(document.getElementById("content"), { childList: true, subtree: true });
  }

  function help() {
    const dialog = document.getElementById("keys");
    if (dialog?.open) dialog.close();
    else dialog?.showModal();
  }

  function watchConnection() {
    const popup = document.getElementById("popup");
    if (!popup) return;
    popup.setAttribute("role", "status");
    popup.innerHTML = "<b>Connection lost</b><span></span>";
    const message = popup.querySelector("span");
    const change = () => {
      const away = popup.getAttribute("aria-hidden") === "false";
      root.classList.toggle("away", away);
      const at = new Date().toLocaleTimeString();
      if (away) message.textContent = `This page shows the state of ${at}. Reconnecting. If the server has ended, start it again with "traceml serve --web".`;
    };
    new MutationObserver(change).observe(popup, { attributes: true, attributeFilter: ["aria-hidden"] });
  }

  applyTheme();
  system.addEventListener("change", applyTheme);
  document.addEventListener("keydown", key);
  document.addEventListener("input", (event) => event.target.dataset?.filter && filter(event.target));
  document.addEventListener("click", (event) => {
    const id = event.target.closest?.("button")?.id;
    if (id === "theme") toggleTheme();
    else if (id === "help" || id === "close-keys") help();
    else if (id === "keep-runs") document.getElementById("delete-runs").close();
  });
  document.addEventListener("scroll", follow, { passive: true });
  document.addEventListener("DOMContentLoaded", () => {
    applyTheme();
    watchConnection();
    whenBuilt(() => { applyTheme(); follow(); keepFocus(); });
  });
  return { closeMenu, follow, theme, whenBuilt };
})();
