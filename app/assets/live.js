// What changes by itself: asked for twice a second, drawn only where it differs. And what is done to a row or a
// picture: sent at once, the newest value last, without Gradio between.
(() => {
  const EVERY_MS = 400, HIDDEN_MS = 2000, MINE_MS = 800;
  const last = {};  // part -> {mark, content, drawn}: what the server said, and which mark a button was pressed for
  const place = name => document.querySelector(`[data-live="${name}"]`);
  const post = (path, body) => fetch(`loom/${path}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
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
  const send = async (path, key, body) => {
    if (flying.has(key)) { flying.set(key, body); return; }
    flying.set(key, null);
    for (let now = body; now; now = flying.get(key)) {
      flying.set(key, null);
      try {
        const answer = await post(path, now);
        if (!answer.ok) say((await answer.json()).problem || `The server refused this (${answer.status}).`);
      } catch { say('LoRA Loom does not answer; this change was not kept.'); }
    }
    flying.delete(key);
    ask();
  };
  let saying;
  const say = text => {
    let e = document.getElementById('said');
    if (!e) { e = make('div', { id: 'said', role: 'alert' }); document.body.append(e); }
    e.textContent = text;
    clearTimeout(saying);
    saying = setTimeout(() => e.remove(), 8000);
  };

  // --- a row of the mixer --------------------------------------------------------------------------------------
  const number = (label, change, attributes) => make('input', {
    type: 'number', step: 0.05, min: -10, max: 10, 'aria-label': label, ...attributes,
    oninput: e => { mine(e.target); if (e.target.value !== '' && e.target.validity.valid) change(+e.target.value); },
  });
  const weighing = (name, what, label) => {
    const field = number(`${label}, as a number`, value => { slider.value = value; send('row', what + name, { name, [what]: value }); });
    const slider = make('input', {
      type: 'range', min: -1, max: 2, step: 0.05, 'aria-label': label, class: what,
      oninput: e => { mine(slider); mine(field); field.value = e.target.value; send('row', what + name, { name, [what]: +e.target.value }); },
    });
    field.classList.add(`${what}-number`);
    return [slider, field];
  };
  const promptField = () => document.querySelector('#prompt textarea');
  const says = word => promptField()?.value.toLowerCase().includes(word.toLowerCase());
  const toggleWord = word => {
    const field = promptField();
    if (!field) return;
    const parts = field.value.split(',').filter(p => p.trim().toLowerCase() !== word.toLowerCase());
    const text = parts.join(',').replace(/[\s,]+$/, '');
    // whole parts between commas are taken out; a word inside a sentence stays where the user has put it
    field.value = says(word) ? (parts.length < field.value.split(',').length ? text.trimStart() : field.value)
      : (text ? `${text}, ${word}` : word);
    field.dispatchEvent(new Event('input', { bubbles: true }));
    pressWords();
  };
  const pressWords = () => document.querySelectorAll('.word').forEach(
    b => b.setAttribute('aria-pressed', String(!!says(b.textContent))));
  const createRow = ({ name }) => {
    const on = make('input', { type: 'checkbox', onchange: e => { mine(e.target); send('row', `on${name}`, { name, on: e.target.checked }); } });
    const [slider, field] = weighing(name, 'weight', `Weight of ${name}`);
    const [text, textField] = weighing(name, 'text', `Text weight of ${name}`);
    return make('section', { class: 'lora', 'aria-label': name },
      make('div', { class: 'lora-line' },
        make('label', { class: 'lora-name' }, on, make('span', {}, name)),
        slider, field,
        make('button', { class: 'cross', 'aria-label': `Remove ${name}`, title: `Remove ${name}`, onclick: () => send('row', `x${name}`, { name, remove: true }) })),
      make('p', { class: 'aside', hidden: true }),
      make('details', {},
        make('summary', { 'aria-label': `Words of ${name}` }, 'Words and text weight'),
        make('div', { class: 'words' }),
        make('div', { class: 'lora-line' }, make('span', { class: 'lora-name' }, 'Text weight'), text, textField),
        make('button', { class: 'plain solo', 'aria-label': `Only ${name}`, onclick: () => send('row', `solo${name}`, { name, solo: true }) }, 'Only this one'),
        make('button', { class: 'plain follow', onclick: () => { text.dataset.mine = textField.dataset.mine = 0; send('row', `text${name}`, { name, text: null }); } }, 'Follow the main weight'),
        make('span', { class: 'facts' })));
  };
  const updateRow = (e, row) => {
    const get = selector => e.querySelector(selector);
    e.classList.toggle('off', row.silent);
    get('.solo').setAttribute('aria-pressed', String(row.solo));
    show(get('[type=checkbox]'), 'checked', row.on);
    show(get('.weight'), 'value', String(row.weight));
    show(get('.weight-number'), 'value', String(row.weight));
    const text = String(row.text ?? row.weight);
    show(get('.text'), 'value', text);
    show(get('.text-number'), 'value', text);
    get('.follow').disabled = row.text === null;
    get('.facts').textContent = row.facts;
    get('.aside').hidden = !row.aside;
    get('.aside').textContent = row.aside && `Set aside: ${row.aside}`;
    const words = get('.words');
    if (words.dataset.of !== row.words.join('\n')) {
      words.dataset.of = row.words.join('\n');
      words.replaceChildren(...row.words.map(word => make('button', {
        class: 'word', title: 'Into the prompt, or out of it', onclick: () => toggleWord(word),
      }, word)));
    }
    pressWords();
  };

  // --- a picture to learn from -----------------------------------------------------------------------------------
  const createPicture = ({ name }) => make('div', { class: 'thumb' },
    make('img', { class: 'thumb-image', alt: name, loading: 'lazy' }),
    make('label', {}, make('span', {}, `Caption of ${name}`), make('input', {
      type: 'text', placeholder: 'empty: the prompt below',
      oninput: e => { mine(e.target); send('picture', `c${name}`, { name, caption: e.target.value }); },
    })),
    make('button', { class: 'cross', 'aria-label': `Take out ${name}`, title: `Take out ${name}`, onclick: () => send('picture', `x${name}`, { name, remove: true }) }));
  const updatePicture = (e, { name, version, caption }) => {
    const source = `loom/thumb/${encodeURIComponent(name)}?v=${version}`;
    const image = e.querySelector('img');
    if (image.getAttribute('src') !== source) image.src = source;
    const field = e.querySelector('input');
    if (field !== document.activeElement) show(field, 'value', caption);
  };

  const draw = {
    rows: (box, items) => keyed(box, items, 'No LoRA is worn. Drop a <b>.safetensors</b> file anywhere on this page, '
      + 'choose one in the Library, or train your own.', createRow, updateRow),
    pictures: (box, items) => keyed(box, items, 'No pictures yet.', createPicture, updatePicture),
  };

  // --- what is new -------------------------------------------------------------------------------------------------
  const drawNew = () => {
    for (const [name, part] of Object.entries(last)) {
      const box = place(name);
      if (box && box.dataset.mark !== part.mark) {
        if (draw[name]) draw[name](box, part.content);
        else box.innerHTML = part.content;
        box.dataset.mark = part.mark;
      } else if (!box && part.content === null && part.drawn !== part.mark) {
        const button = document.getElementById(`draw-${name}`);
        if (button) { button.click(); part.drawn = part.mark; }
      }
    }
  };
  let timer, server, failed = 0;
  const ask = async () => {
    clearTimeout(timer);
    try {
      const seen = { server, ...Object.fromEntries(Object.entries(last).map(([name, part]) => [name, part.mark])) };
      const answer = await post('news', seen);
      if (!answer.ok) throw new Error(answer.status);
      for (const [name, [mark, content]] of Object.entries(await answer.json())) {
        if (name === 'server') {  // another one than this page was made by: what it knows is in its session
          if (server && server !== mark) { location.reload(); return; }
          server = mark;
        } else if (name === 'said') {  // what was said before this page came is not said again
          if (last.said) say(content);
          last.said = { mark, content: '' };
        } else last[name] = { mark, content, drawn: last[name]?.drawn };
      }
      if (failed > 2) document.getElementById('said')?.remove();
      failed = 0;
    } catch {
      failed += 1;
      if (failed > 2) say('LoRA Loom does not answer. Start it again: this page goes on by itself.');
    }
    drawNew();
    timer = setTimeout(ask, document.hidden ? HIDDEN_MS : EVERY_MS);
  };
  document.addEventListener('visibilitychange', () => { if (!document.hidden) ask(); });
  document.addEventListener('input', e => { if (e.target === promptField()) pressWords(); });
  ask();
})();
