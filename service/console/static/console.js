// What the console's pages do with scripts: dropping and pasting images, keys, and telling what has changed.
// Every page can be read, and every form sent, without any of it.
"use strict";
(() => {
  const TYPING = "input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]";
  const KEYS_OFF = "hardlook-console-keys-off";

  // --- dropping and pasting images ---------------------------------------------------------------------------------

  function imageOf(transfer) {
    return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/") || file.type === "") ?? null; // not every system knows HEIC or AVIF
  }

  function submitWith(form, file) {
    const input = form.querySelector("input[type=file]");
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    if (form.dataset.drop === "fill") input.focus(); // there is more to fill in
    else form.requestSubmit();
  }

  function say(text) {
    const announcer = document.getElementById("announcer");
    if (announcer) announcer.textContent = text;
  }

  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      const form = event.target.closest?.("form[data-drop]") ?? document.querySelector("form[data-drop]");
      if (!form || !event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault(); // else the browser opens the file, and leaves the page
      form.classList.toggle("dropping", type === "dragover");
      if (type !== "drop") return;
      const file = imageOf(event.dataTransfer);
      const note = form.querySelector("[data-said]");
      if (note) note.textContent = file ? "" : "What was dropped is no image file.";
      if (file) submitWith(form, file);
      else if (!note) say("What was dropped is no image file.");
    });
  }

  document.addEventListener("paste", (event) => {
    const form = document.querySelector("form[data-drop]");
    const file = imageOf(event.clipboardData);
    if (!form || !file) return;
    event.preventDefault();
    submitWith(form, file);
  });

  // --- keys --------------------------------------------------------------------------------------------------------

  function keysAreOn() {
    return localStorage.getItem(KEYS_OFF) === null;
  }

  function moveAlong(key) {
    const rows = [...document.querySelectorAll("[data-row]")];
    if (!rows.length || (key !== "j" && key !== "k")) return false;
    const at = rows.indexOf(document.activeElement);
    rows[at < 0 ? 0 : Math.min(Math.max(at + (key === "j" ? 1 : -1), 0), rows.length - 1)].focus();
    return true;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
    if (!keysAreOn() || event.target.closest?.(TYPING)) return;
    if (document.querySelector("dialog[open]")) return;
    if (moveAlong(event.key)) return event.preventDefault();
    const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (!target) return;
    event.preventDefault();
    target.focus();
    target.click();
  });

  function prepare(root) {
    for (const toggle of root.querySelectorAll("input[data-keys]")) {
      toggle.checked = keysAreOn();
      toggle.addEventListener("change", () => {
        if (toggle.checked) localStorage.removeItem(KEYS_OFF);
        else localStorage.setItem(KEYS_OFF, "1");
      });
    }
    for (const part of root.querySelectorAll(".script-only")) part.hidden = false;
  }

  document.addEventListener("click", (event) => {
    const opener = event.target.closest?.("[data-opens]");
    const dialog = opener && document.getElementById(opener.dataset.opens);
    if (dialog && !dialog.open) dialog.showModal();
  });

  // --- time that runs out --------------------------------------------------------------------------------------------

  const openedAt = performance.now();
  setInterval(() => {
    for (const part of document.querySelectorAll("[data-left]")) {
      const left = Math.max(0, Math.floor(Number(part.dataset.left) - (performance.now() - openedAt) / 1000));
      part.textContent = left ? `${Math.floor(left / 60)} min ${left % 60} s` : "0 s; reload the page";
    }
  }, 1000);

  // A page that answers a form at once has the address of the form; this is where it can be read again.
  const readable = document.querySelector("[data-address]");
  if (readable) history.replaceState(null, "", readable.dataset.address);

  // --- forms -------------------------------------------------------------------------------------------------------

  document.addEventListener("submit", (event) => {
    const question = event.submitter?.dataset.confirm ?? event.target.dataset.confirm;
    if (question && !window.confirm(question)) event.preventDefault();
    // A button that sends its form elsewhere opens another page: that is not for htmx.
    if (event.submitter?.hasAttribute("formaction")) event.stopPropagation();
  }, true);

  // --- after a part of the page was exchanged ----------------------------------------------------------------------

  document.addEventListener("htmx:before:request", (event) => {
    const quiet = event.target.closest?.("[data-quiet]");
    if (quiet && document.hidden) event.preventDefault(); // nobody looks
    if (!quiet) say("Working.");
  });
  document.addEventListener("htmx:after:request", (event) => {
    const answer = event.detail.ctx.response;
    if (answer?.raw?.redirected && new URL(answer.raw.url).pathname === "/console/sign-in") {
      event.preventDefault(); // the sign-in has ended
      location.assign(answer.raw.url);
    } else if (event.target.closest?.("[data-quiet]")) {
      const failed = answer?.status !== 200;
      if (failed) event.preventDefault(); // what is there stays, with its time
      for (const part of document.querySelectorAll("[data-stale]")) part.hidden = !failed;
    }
  });
  document.addEventListener("htmx:after:swap", () => {
    prepare(document);
    const result = document.querySelector("#result");
    if (!result) return;
    const heading = result.querySelector("h2, h1") ?? result;
    heading.setAttribute("tabindex", "-1");
    heading.focus({ preventScroll: false });
    say(heading.textContent.trim());
  });
  document.addEventListener("htmx:error", (event) => {
    if (!event.target.closest?.("[data-quiet]")) return say("The service did not answer.");
    for (const part of document.querySelectorAll("[data-stale]")) part.hidden = false;
  });

  prepare(document);
})();
