"""A text encoder that has learnt enough stays as it is for the rest of a run."""

from __future__ import annotations

from trainers.bench import Bench, keep_words


def stop_learning(bench: Bench, component: str) -> None:
    """Nothing about this text encoder is trained from now on. Its optimizer's state stays, for an exact resume."""
    own = [p for layer in bench.form.of(component) for p in layer.parameters()]
    if bench.form.words is not None:
        rows = bench.form.words.rows.items()
        own += [p for name, p in rows if name.split(":", 1)[0] == component]
    for p in own:
        p.requires_grad_(False)
        p.grad = None
    keep_words(bench, component)
