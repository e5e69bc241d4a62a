// What changes by itself: asked for twice a second, drawn only where it differs. Of what is done to a row, a mix or a
// picture the newest value is sent at once, without Gradio between.
(() => {
  const { draw, keyed, make, mine, post, say, send, show } = window.loom;
  const EVERY_MS = 400, HIDDEN_MS = 2000;
  const last = {};  // part -> {mark, content, drawn}: what the server said, and which mark a button was pressed for
  const place = name => document.querySelector(`[data-live="${name}"]`);

  // --- a picture to learn from -----------------------------------------------------------------------------------
  const createPicture = ({ name }) => make('div', { class: 'thumb' },
    make('img', { class: 'thumb-image', alt: name, loading: 'lazy' }),
    make('label', {}, make('span', {}, `Caption of ${name}`), make('textarea', {
      rows: 1, placeholder: 'empty: the prompt below; of several lines one is drawn each time',
      oninput: e => { mine(e.target); send('picture', `c${name}`, { name, caption: e.target.value }); },
    })),
    make('button', { class: 'cross', 'aria-label': `Take out ${name}`, title: `Take out ${name}`, onclick: () => send('picture', `x${name}`, { name, remove: true }) }));
  const updatePicture = (e, { name, version, caption }) => {
    const source = `loom/thumb/${encodeURIComponent(name)}?v=${version}`;
    const image = e.querySelector('img');
    if (image.getAttribute('src') !== source) image.src = source;
    const field = e.querySelector('textarea');
    if (field !== document.activeElement) show(field, 'value', caption);
  };

  draw.pictures = (box, items) => keyed(box, items, 'No pictures yet.', createPicture, updatePicture);

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
  window.loom.ask = ask;
  ask();
})();
