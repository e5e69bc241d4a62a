// What the scripts of the page share: making elements, drawing what differs, sending what the user does.
window.loom = (() => {
  const MINE_MS = 800;
  const post = (path, value, options = {}) => fetch(`loom/${path}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(value), ...options,
  });

  // --- small helpers for elements ------------------------------------------------------------------------------
  const make = (tag, attributes = {}, ...inside) => {
    const e = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith('on')) e.addEventListener(key.slice(2), value);
      else if (value === true) e.setAttribute(key, '');
      else if (value !== false && value != null) e.setAttribute(key, value);
    }
    e.append(...inside);
    return e;
  };
  // What the user has just typed or dragged is newer than what the server says.
  const mine = e => { e.dataset.mine = Date.now(); };
  const show = (e, key, value) => {
    if (Date.now() - (e.dataset.mine || 0) > MINE_MS && e[key] !== value) e[key] = value;
  };
  // Children of `box`, one per item, kept by name: who has the focus keeps it.
  const keyed = (box, items, empty, create, update) => {
    const before = new Map([...box.children].map(e => [e.dataset.key, e]));
    const focused = [...box.children].findIndex(e => e.contains(document.activeElement));
    items.forEach((item, i) => {
      let e = before.get(item.name);
      if (!e) { e = create(item); e.dataset.key = item.name; }
      before.delete(item.name);
      update(e, item);
      if (box.children[i] !== e) box.insertBefore(e, box.children[i] || null);
    });
    before.forEach(e => e.remove());
    if (!items.length) box.innerHTML = `<div class="empty">${empty}</div>`;
    if (focused >= 0 && !box.contains(document.activeElement)) {
      const next = box.children[Math.min(focused, box.children.length - 1)];
      next?.querySelector('input, button')?.focus();
    }
  };

  // --- sending: per control one call at a time, and of those that wait only the newest ------------------------------
  const flying = new Map();
  // -> whether the last of them was taken; undefined for one that waits
  const send = async (path, key, body) => {
    if (flying.has(key)) { flying.set(key, body); return undefined; }
    flying.set(key, null);
    let taken = false;
    for (let now = body; now; now = flying.get(key)) {
      flying.set(key, null);
      try {
        // the browser carries on with it when the page is left, for which all bodies together have 64 KiB
        const answer = await post(path, now, { keepalive: JSON.stringify(now).length < 8000 });
        taken = answer.ok;
        if (!taken) say((await answer.json()).problem || `The server refused this (${answer.status}).`);
      } catch { taken = false; say('LoRA Loom does not answer; this change was not kept.'); }
    }
    flying.delete(key);
    window.loom.ask();
    return taken;
  };
  let saying;
  const say = text => {
    let e = document.getElementById('said');
    if (!e) { e = make('div', { id: 'said', role: 'alert' }); document.body.append(e); }
    e.textContent = text;
    clearTimeout(saying);
    saying = setTimeout(() => e.remove(), Math.max(8000, 60 * text.length));  // as long as it takes to read
  };

  return { draw: {}, ask: () => {}, make, mine, show, keyed, post, send, say };
})();
