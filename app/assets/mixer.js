// A row of the mixer: on or off, how strong; and folded away, its words and where and when it acts.
(() => {
  const { draw, keyed, make, mine, send, show } = window.loom;
  const CURVES = { Even: '', 'Fade out': '0:1, 0.5:1, 1:0', 'Fade in': '0:0, 0.5:1', 'First half': '0.45:1, 0.55:0', 'Second half': '0.45:0, 0.55:1' };
  const shown = weight => String(+(+weight).toFixed(3));

  // A slider and a field that are one; `change` gets the number.
  const weighing = (what, label, change) => {
    const field = make('input', {
      type: 'number', step: 0.05, min: -10, max: 10, 'aria-label': `${label}, as a number`, class: `${what}-number`,
      oninput: () => {
        mine(field);
        const { badInput, rangeOverflow, rangeUnderflow } = field.validity;  // any number between, 0.33 too
        if (field.value === '' || badInput || rangeOverflow || rangeUnderflow) return;
        slider.value = field.value;
        change(+field.value);
      },
    });
    const slider = make('input', {
      type: 'range', min: -1, max: 2, step: 0.05, 'aria-label': label, class: what,
      oninput: () => { mine(slider); mine(field); field.value = slider.value; change(+slider.value); },
    });
    return [slider, field];
  };
  const showWeight = (e, what, weight) => {
    show(e.querySelector(`.${what}`), 'value', shown(weight));
    show(e.querySelector(`.${what}-number`), 'value', shown(weight));
  };
  const letGo = e => e.querySelectorAll('input').forEach(i => { i.dataset.mine = 0; });  // the server's word counts at once
  const back = (label, press) => make('button', { class: 'back', 'aria-label': label, title: label, onclick: e => {
    e.currentTarget.parentElement.querySelector('input').focus();  // the button goes: whoever came by keyboard stays here
    press();
  } });

  // --- its words, into the prompt and out of it ---------------------------------------------------------------------
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
  document.addEventListener('input', e => { if (e.target === promptField()) pressWords(); });

  // --- where it acts: blocks -----------------------------------------------------------------------------------------
  const createBlock = lora => ({ name: key, group }) => {
    const set = weight => send('row', `block ${key} ${lora}`, { name: lora, block: [key, weight] });
    const label = group ? `${lora} follows its main weight in ${key}` : `Take block ${key} of ${lora} out`;
    const e = make('div', { class: 'lora-line block', role: 'group', 'aria-label': `Block ${key}` },
      make('code', { class: 'lora-name' }, key),
      ...weighing('block-weight', `Block ${key} of ${lora}`, set),
      back(label, () => { letGo(e); set(null); }));
    return e;
  };
  const updateBlock = (e, block) => {
    showWeight(e, 'block-weight', block.weight);
    e.classList.toggle('own', block.own);
    e.querySelector('.back').style.visibility = block.own ? '' : 'hidden';
  };
  const addBlock = (lora, weight) => {
    const id = `blocks-of-${lora}`;
    const field = make('input', {
      type: 'text', list: id, placeholder: 'such as down.1', 'aria-label': `Another block of ${lora}`,
      onkeydown: e => { if (e.key === 'Enter' && !e.ctrlKey) add(); },
    });
    const add = async () => {
      const key = field.value.trim();
      if (key && await send('row', `block ${key} ${lora}`, { name: lora, block: [key, weight()] })) field.value = '';
      else field.focus();
    };
    return make('div', { class: 'add-block' }, field, make('datalist', { id }),
      make('button', { class: 'plain', 'aria-label': `Add the block to ${lora}`, onclick: add }, 'Add block'));
  };

  // --- when it acts: the curve, drawn ----------------------------------------------------------------------------------
  const drawCurve = (svg, points) => {
    const top = Math.max(1, ...points.map(([, y]) => y)), low = Math.min(0, ...points.map(([, y]) => y));
    const at = ([x, y]) => `${(x * 100).toFixed(1)},${(36 - 32 * (y - low) / (top - low)).toFixed(1)}`;
    const line = points.length ? [[0, points[0][1]], ...points, [1, points.at(-1)[1]]] : [[0, 1], [1, 1]];
    svg.innerHTML = `<path d="M${at([0, 0])} L${at([1, 0])}"/><polyline points="${line.map(at).join(' ')}"/>`;
  };
  const curveOf = name => {
    const set = text => send('row', `curve${name}`, { name, curve: text });
    const field = make('input', {
      type: 'text', class: 'curve', placeholder: 'the same at every step', 'aria-label': `Curve of ${name} over the steps`,
      title: 'How far the picture is, and the factor there: 0:1, 0.6:1, 1:0', onchange: () => set(field.value),
    });
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    svg.setAttribute('viewBox', '-2 -2 104 44');
    svg.setAttribute('preserveAspectRatio', 'none');
    svg.setAttribute('aria-hidden', 'true');
    return make('div', { class: 'curve-part' }, svg, make('div', {}, field, make('div', { class: 'shapes' },
      ...Object.entries(CURVES).map(([shape, text]) => make('button', {
        class: 'plain shape', 'aria-label': `${shape}: curve of ${name}`, 'data-curve': text,
        onclick: () => { field.value = text; set(text); },
      }, shape)))));
  };

  // --- the row ---------------------------------------------------------------------------------------------------------
  const part = (title, hint, ...inside) => make('div', { class: 'part' },
    make('p', { class: 'part-title' }, title, make('span', {}, hint)), ...inside);
  const createRow = ({ name }) => {
    const on = make('input', { type: 'checkbox', onchange: e => { mine(e.target); send('row', `on${name}`, { name, on: e.target.checked }); } });
    const weight = weighing('weight', `Weight of ${name}`, value => send('row', `weight${name}`, { name, weight: value }));
    const text = make('div', { class: 'lora-line' }, make('span', { class: 'lora-name' }, 'Text weight'),
      ...weighing('text', `Text weight of ${name}`, value => send('row', `text${name}`, { name, text: value })),
      back(`The text weight of ${name} follows its main weight`, () => { letGo(text); send('row', `text${name}`, { name, text: null }); }));
    const half = make('input', { type: 'checkbox', class: 'half', onchange: e => {
      mine(e.target);
      send('row', `half${name}`, { name, half: e.target.checked ? 'conditional' : 'both' });
    } });
    const e = make('section', { class: 'lora', 'aria-label': name },
      make('div', { class: 'lora-line' },
        make('label', { class: 'lora-name' }, on, make('span', {}, name)), ...weight,
        make('button', { class: 'cross', 'aria-label': `Remove ${name}`, title: `Remove ${name}`, onclick: () => send('row', `x${name}`, { name, remove: true }) })),
      make('p', { class: 'aside', hidden: true }),
      make('details', {},
        make('summary', {}, 'More', make('span', { class: 'unseen' }, ` of ${name}`), make('span', { class: 'set' })),
        make('div', { class: 'words' }),
        text,
        part('Blocks', ' of the UNet, each with a weight of its own in place of the main one', make('div', { class: 'blocks' }),
          addBlock(name, () => +e.querySelector('.weight-number').value || 0)),
        part('Over the steps', ' the weight is multiplied by this curve', curveOf(name)),
        make('label', { class: 'half-line' }, half, 'Act on the prompt alone, not on the negative prompt'),
        make('button', { class: 'plain solo', 'aria-label': `Only ${name}`, onclick: () => send('row', `solo${name}`, { name, solo: true }) }, 'Only this one'),
        make('button', { class: 'plain plainly', 'aria-label': `Reset ${name}`, onclick: () => { letGo(e); send('row', `plainly${name}`, { name, plainly: true }); } }, 'Reset to the main weight alone'),
        make('span', { class: 'facts' })));
    return e;
  };
  const updateRow = (e, row) => {
    const get = selector => e.querySelector(selector);
    e.classList.toggle('off', row.silent);
    get('.solo').setAttribute('aria-pressed', String(row.solo));
    show(get('[type=checkbox]'), 'checked', row.on);
    showWeight(e, 'weight', row.weight);
    showWeight(e, 'text', row.text ?? row.weight);
    get('.back').style.visibility = row.text === null ? 'hidden' : '';
    keyed(get('.blocks'), row.blocks, '', createBlock(row.name), updateBlock);
    const known = get('datalist');
    if (known.dataset.of !== row.known.join()) {
      known.dataset.of = row.known.join();
      known.replaceChildren(...row.known.map(value => make('option', { value })));
    }
    const curve = get('.curve');
    if (curve !== document.activeElement) show(curve, 'value', row.curve);
    drawCurve(get('svg'), row.points);
    e.querySelectorAll('.shape').forEach(b => b.setAttribute('aria-pressed', String(b.dataset.curve === row.curve)));
    show(get('.half'), 'checked', row.half === 'conditional');
    get('.set').textContent = row.set.join(' · ');
    get('.plainly').disabled = !row.set.length;
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

  draw.rows = (box, items) => keyed(box, items, 'No LoRA is worn. Drop a <b>.safetensors</b> file anywhere on this page, '
    + 'choose one in the Library, or train your own.', createRow, updateRow);
})();
