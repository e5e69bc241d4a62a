"""A LiveMix that can say what it does to the models (burn.py)."""

from __future__ import annotations

from itertools import combinations

from lora_core import burn
from lora_core.base_weights import BaseReport
from lora_core.errors import LoraError
from lora_core.live_mix import LiveMix


class MeasuredMix(LiveMix):
    """Whether the base is untouched, how strong the mix is, per block, and which LoRAs pull the same way."""

    def verify_base(self) -> BaseReport:
        """Every parameter against the checkpoint on disk, or, for a wrapped pipeline, as it was when wrapped."""
        with self._lock:
            return self._base.verify()

    def heal(self) -> BaseReport:
        """Copy every parameter that differs from the checkpoint back from it; unfuses first."""
        with self._lock:
            self._unfuse()
            return self._base.heal()

    def strengths(self) -> dict[str, float]:
        """How far the mix moves the weights, |Σ w ΔW| / |W| per block, where in the denoising it moves them furthest:
        see burn.strength, burn.advice. Raises LoraError while the mix is fused, for the layers must hold W0."""
        with self._lock:
            if self.fused:
                raise LoraError("How strong the mix is cannot be measured while it is fused. Unfuse first.")
            # Between two points of the curves the sum is linear in the progress: its norm is largest at one of them.
            points = sorted({0.0, *(at for weight in self._mix.values() for at, _ in weight.curve)})
            measured = [burn.strength(*self._changes(at)) for at in points]
            return {
                block: max(figures.get(block, 0.0) for figures in measured)
                for block in dict.fromkeys(block for figures in measured for block in figures)
            }

    def normalise(self, limit: float = burn.LIMIT) -> str:
        """Bring every block that is moved further than `limit` down to it -> a sentence. See burn.normalised."""
        with self._lock:
            strengths = self.strengths()
            above = [block for block in strengths if burn.advice({block: strengths[block]}, limit)]
            if not above:
                return f"No block is moved by more than {limit:.0%} of its size: nothing was changed."
            paths = [path for own in self._layers.values() for path in own]
            self.set_weights(burn.normalised(self._mix, strengths, limit, paths=paths))
            moved = ", ".join(f"{block} (from {strengths[block]:.0%})" for block in above)
            return f"Brought down to {limit:.0%}: {moved}. What the LoRAs change there is smaller, and else the same."

    def overlaps(self) -> dict[tuple[str, str], float]:
        """The cosine between each two loaded LoRAs at weight 1 (burn.overlap), by their names."""
        with self._lock:
            if self.fused:
                raise LoraError("LoRAs cannot be compared while they are fused. Unfuse first.")
            return {
                (a, b): burn.overlap(self._adapters[a], self._adapters[b], self._layers[a]).cosine
                for a, b in combinations(self._adapters, 2)
            }
