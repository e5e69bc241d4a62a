// Dropping files anywhere on the page, and the keys.
//
// The window's drop keeps the files that fit: a mixed drop on Gradio's own zone refuses the good ones with the bad.
// The veil is hidden in a capture listener, because zones inside the page stop the event on its way up.
(() => {
  const veil = () => document.getElementById('veil');
  const carriesFiles = e => [...(e.dataTransfer?.types || [])].includes('Files');
  // Into the file input beside the upload button of this name, as if they had been chosen there.
  const give = (button, files) => {
    const input = document.querySelector(`input[data-testid="${button}-upload-button"]`);
    if (!files.length || !input) return;
    const data = new DataTransfer();
    files.forEach(f => data.items.add(f));
    input.files = data.files;
    input.dispatchEvent(new Event('change', { bubbles: true }));
  };
  window.addEventListener('dragover', e => {
    if (!carriesFiles(e)) return;
    e.preventDefault();
    veil()?.classList.add('on');
  });
  window.addEventListener('dragleave', e => { if (!e.relatedTarget) veil()?.classList.remove('on'); });
  window.addEventListener('drop', () => veil()?.classList.remove('on'), true);
  window.addEventListener('drop', e => {
    if (e.defaultPrevented || !carriesFiles(e)) return;
    e.preventDefault();
    const files = [...e.dataTransfer.files];
    const gathering = document.getElementById('train-upload')?.checkVisibility();
    const toLearn = f => gathering && !f.name.toLowerCase().endsWith('.safetensors');
    give('Choose pictures', files.filter(toLearn));
    give('Add LoRA files', files.filter(f => !toLearn(f)));
  });
  window.addEventListener('keydown', e => {
    const press = id => {
      const button = document.getElementById(id);
      if (!button || button.disabled) return;
      e.preventDefault();
      button.click();
    };
    if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) press('generate');
    else if (e.key === 'Escape') press('stop');
    else if (e.key.toLowerCase() === 's' && (e.ctrlKey || e.metaKey)) press('save-now');
  });
})();
