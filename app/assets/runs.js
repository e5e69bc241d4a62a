// Every training there was: looked at again, gone on with from there, its report.
(() => {
  const { draw, keyed, make, send } = window.loom;

  const create = ({ name }) => make('div', { class: 'run' },
    make('div', { class: 'what' }, make('b', {}, name), make('span', { class: 'facts' })),
    make('a', { target: '_blank', rel: 'noopener', 'aria-label': `Report of ${name}` }, 'Report'),
    make('button', { class: 'plain', 'aria-label': `Look at ${name}`, onclick: () => send('run', `s${name}`, { name, show: true }) }, 'Look at it'));
  const update = (e, { said, report, shown, closed }) => {
    e.querySelector('.facts').textContent = said;
    const link = e.querySelector('a');
    link.style.visibility = report ? '' : 'hidden';
    if (report) link.href = report;
    const button = e.querySelector('button');
    button.disabled = closed || shown;
    button.textContent = shown ? 'On view' : 'Look at it';
  };

  // On a narrow window the form is long: what was asked for comes into sight once it is there.
  const FOUND = '.check, .card[data-alive=True]', PATIENCE = 20;
  const bring = (left = PATIENCE) => {
    const found = document.querySelector(FOUND);
    if (found) found.scrollIntoView({ block: 'start' });
    else if (left) setTimeout(bring, 250, left - 1);
  };
  document.addEventListener('click', e => {
    const narrow = matchMedia('(max-width: 768px)').matches;
    if (narrow && e.target.closest?.('#train-check, #train-start')) setTimeout(bring, 250);
  });

  draw.runs = (box, items) => {
    let list = box.querySelector('.runs');
    if (!list) {
      list = make('div', { class: 'runs' });
      box.replaceChildren(make('h3', {}, 'All trainings'), list);
    }
    box.hidden = !items.length;
    keyed(list, items, '', create, update);
  };
})();
