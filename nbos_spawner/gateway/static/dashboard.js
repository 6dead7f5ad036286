// Keeps the page fresh: fetches it again and takes over its <main>. The server has escaped everything in it.
"use strict";

const EVERY = 3000; // milliseconds
let updated = Date.now();

function freshness() {
  const seconds = Math.round((Date.now() - updated) / 1000);
  document.getElementById("freshness").textContent =
    seconds < 10 ? "updated now" : `not updated for ${seconds} s; is the gateway running?`;
}

async function refresh() {
  try {
    if (!document.hidden) {
      const reply = await fetch(window.location.href, { credentials: "same-origin", redirect: "error" });
      if (reply.ok) {
        const page = new DOMParser().parseFromString(await reply.text(), "text/html");
        const fresh = page.getElementById("content");
        if (fresh) {
          document.getElementById("content").replaceWith(fresh);
          updated = Date.now();
        }
      }
      freshness();
    }
  } catch {
    freshness(); // The gateway is away, or the login has ended: say how old the page is and try again.
  }
  setTimeout(refresh, EVERY);
}

setTimeout(refresh, EVERY);
