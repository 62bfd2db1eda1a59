// The news of the server, as they come: server-sent events, and what to say when they stop.

const SILENT_FROM_S = 10;
const REOPEN_AFTER_S = 30;
const AGAIN_S = 5;

/**
 * Calls `onStatus(document)`, `onRounds(document)` and `onConnection({ isLive, last_at, problem })`; `last_at` is the
 * reader's Unix time of the last news, null if there were none.
 */
export function follow({ onStatus, onRounds, onConnection }) {
  let source = null,
    isLive = false,
    last_at = null,
    opened_at = 0,
    problem = "";

  function tell(live, why = "") {
    isLive = live;
    problem = why;
    onConnection({ isLive, last_at, problem });
  }

  function heard() {
    last_at = Date.now() / 1000;
    if (!isLive) tell(true);
  }

  function open() {
    source?.close();
    opened_at = Date.now() / 1000;
    source = new EventSource("/api/stream");
    source.addEventListener("rounds", (event) => {
      onRounds(JSON.parse(event.data));
      heard();
    });
    source.addEventListener("status", (event) => {
      onStatus(JSON.parse(event.data));
      heard();
    });
    source.addEventListener("error", () => {
      if (source.readyState === EventSource.CLOSED) refused();
      else tell(false, "the server does not answer");
    });
  }

  /** EventSource gives up after an HTTP error; the server says why in JSON. */
  async function refused() {
    let why = "the server does not answer";
    try {
      const answer = await fetch("/api/status", { headers: { accept: "application/json" } });
      if (!answer.ok) {
        const said = await answer.json();
        why = [said.error, said.hint].filter(Boolean).join("; ");
      }
    } catch {
      // Not reachable, or not JSON: said above.
    }
    tell(false, why);
    setTimeout(open, AGAIN_S * 1000);
  }

  /** A connection can be lost without a word: then nothing comes, and EventSource does not know. */
  setInterval(() => {
    const now = Date.now() / 1000;
    if (isLive && now - last_at > SILENT_FROM_S) tell(false, "nothing has come from the server");
    else if (!isLive && last_at !== null) onConnection({ isLive, last_at, problem });
    const isOpen = source.readyState === EventSource.OPEN;
    if (isOpen && now - Math.max(last_at ?? 0, opened_at) > REOPEN_AFTER_S) open();
  }, 1000);
  open();
}
