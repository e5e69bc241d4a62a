// Mixes kept by name: save this one, wear another, and a slider that leads from one to the other.
(() => {
  const { draw, keyed, make, mine, send, show } = window.loom;

  // --- one saved mix -----------------------------------------------------------------------------------------------
  const createMix = ({ name }) => make('div', { class: 'mix' },
    make('div', {}, make('b', {}, name), make('span', { class: 'what' })),
    make('button', { class: 'plain wear', 'aria-label': `Wear ${name}`, onclick: () => send('mix', 'mix', { name, wear: true }) }),
    make('button', { class: 'cross', 'aria-label': `Delete the mix ${name}`, title: `Delete the mix ${name}`, onclick: () => send('mix', 'mix', { name, remove: true }) }));
  const updateMix = (e, mix) => {
    e.querySelector('.what').textContent = mix.problem || mix.what;
    e.classList.toggle('unreadable', !!mix.problem);
    const wear = e.querySelector('.wear');
    wear.disabled = !!mix.problem;
    wear.textContent = mix.worn ? 'Worn' : 'Wear';
    wear.setAttribute('aria-pressed', String(mix.worn));
  };

  // --- the crossfade -----------------------------------------------------------------------------------------------
  const createFade = box => {
    const choice = (label, change) => make('select', { 'aria-label': label, onchange: e => { mine(e.target); change(); } });
    const choose = () => { name(); send('mix', 'choose', { name: from.value, choose: [to.value, +slider.value] }); };
    const from = choice('Crossfade from', choose), to = choice('Crossfade to', choose);
    const place = make('output', { class: 'place' });
    const name = () => {
      slider.setAttribute('aria-label', `Crossfade from ${from.value} to ${to.value}`);
      slider.disabled = from.value === to.value;
      place.textContent = `${Math.round(slider.value * 100)} %`;
    };
    const slider = make('input', {
      type: 'range', min: 0, max: 1, step: 0.01, class: 'fade',
      oninput: () => { mine(slider); name(); send('mix', 'fade', { name: from.value, fade: [to.value, +slider.value] }); },
    });
    box.append(make('p', { class: 'part-title' }, 'Crossfade', make('span', {}, ' from one mix to another; moving it wears them')),
      make('div', { class: 'fade-line' }, from, slider, to, place));
    box.update = fade => {
      for (const select of [from, to]) {
        if (select.dataset.of === fade.names.join('\n')) continue;
        select.dataset.of = fade.names.join('\n');
        select.replaceChildren(...fade.names.map(value => make('option', { value }, value)));
      }
      show(from, 'value', fade.a);
      show(to, 'value', fade.b);
      show(slider, 'value', String(fade.at));
      name();
    };
  };

  // --- all of it ---------------------------------------------------------------------------------------------------
  const create = box => {
    box.classList.add('mixes');
    const field = make('input', { type: 'text', 'aria-label': 'Name of this mix', maxlength: 80, oninput: () => box.rename(),
      onkeydown: e => { if (e.key === 'Enter' && !e.ctrlKey && !button.disabled) save(); } });
    const save = async () => { if (await send('mix', 'mix', { name: field.value.trim(), save: true })) { field.value = ''; box.rename(); } };
    const button = make('button', { class: 'plain save', onclick: save });
    const list = make('div', { class: 'saved' }), fade = make('div', { class: 'part', hidden: true });
    const hint = make('p', { class: 'hint' });
    const line = (words, label, body) => make('p', { class: 'again', hidden: true }, make('span', {}),
      make('button', { class: 'plain', onclick: () => { field.focus(); send('mix', 'mix', body); } }, label));  // the line goes
    const before = line('', 'Back to it', { name: '', before: true }), deleted = line('', 'Bring it back', { name: '', restore: true });
    box.append(make('div', { class: 'save-line' }, field, button), list, before, deleted, fade, hint);
    createFade(fade);
    let mixes;
    box.rename = () => {
      const typed = field.value.trim().toLowerCase();
      button.disabled = !mixes.sounds;
      button.textContent = mixes.saved.some(mix => mix.name.toLowerCase() === typed) ? 'Replace' : 'Save this mix';
    };
    box.update = data => {
      mixes = data;
      field.placeholder = data.proposed || 'a name for it';
      box.rename();
      keyed(list, data.saved, 'No mix is saved yet. Set the LoRAs as you like them, and save them together under a name.', createMix, updateMix);
      before.hidden = !data.before;
      before.firstChild.textContent = `Before: ${data.before} `;
      deleted.hidden = !data.deleted;
      deleted.firstChild.textContent = `“${data.deleted}” is deleted. `;
      fade.hidden = data.fade.names.length < 2;
      hint.hidden = data.fade.names.length !== 1;
      hint.textContent = 'With a second one saved, a slider leads from one to the other.';
      if (!fade.hidden) fade.update(data.fade);
    };
  };
  draw.mixes = (box, data) => {
    if (!box.update) create(box);
    box.update(data);
  };
})();
