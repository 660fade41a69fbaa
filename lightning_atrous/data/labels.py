"""What the integers in mask files mean, and whether they mean anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lightning_atrous.types import ClassInfo

__all__ = ["LabelTable"]

SPAN = 2**16
"""Raw labels below it are looked up in an array; the few that are negative or larger are searched one by one."""


class LabelTable:
    """Raw labels → classes and the ignore index, by lookup.

    Args:
        classes: What comes out.
        label_map: Raw label in the file → class or ignore index; by default each stands for itself.
        hints: What is probably wrong with a mask that holds such a label, which the map lacks: half a sentence
            that says what to do.

    Raises:
        ValueError: A map to what is neither a class nor the ignore index.
    """

    def __init__(
        self,
        classes: ClassInfo,
        label_map: Mapping[int, int] | None = None,
        hints: Mapping[int, str] | None = None,
    ) -> None:
        k, ignore = len(classes), classes.ignore_index
        identity = {label: label for label in (*range(k), ignore)}
        pairs = identity if label_map is None else dict(label_map)
        wrong = sorted(set(pairs.values()) - set(identity))
        if wrong:
            raise ValueError(
                f"the label map leads to {_listed(wrong)}, expected a class of 0..{k - 1} or the ignore index {ignore}"
            )
        self.classes, self.hints = classes, dict(hints or {})
        self._known, self._is_identity = sorted(pairs), label_map is None
        near = {raw: value for raw, value in pairs.items() if 0 <= raw < SPAN}
        self._far = {raw: value for raw, value in pairs.items() if raw not in near}
        dtype = np.uint8 if k <= 256 and 0 <= ignore <= 255 else np.int64
        self._values = np.zeros(max(256, *(raw + 1 for raw in near), 0), dtype)
        self._is_known = np.zeros(len(self._values), bool)
        self._values[list(near)] = list(near.values())
        self._is_known[list(near)] = True

    def __call__(self, labels: np.ndarray, source: str) -> np.ndarray:
        """Map a mask.

        Args:
            labels: Integers ``(H, W)`` of any type.
            source: What to call the mask where it is refused.

        Returns:
            ``(H, W)`` in uint8, or in int64 where the classes or the ignore index need it.

        Raises:
            ValueError: A label that is not in the map.
        """
        # "clip" keeps the lookup of what is out of range harmless; it is judged below
        mask, known = self._values.take(labels, mode="clip"), self._is_known.take(labels, mode="clip")
        if labels.dtype != np.uint8:
            known &= (labels >= 0) & (labels < len(self._values))
            for raw, value in self._far.items():
                found = labels == raw
                mask[found], known[found] = value, True
        if not known.all():
            raise ValueError(self._refusal(np.unique(labels), np.unique(labels[~known]), source))
        return mask

    def _refusal(self, present: np.ndarray, unknown: np.ndarray, source: str) -> str:
        k, ignore = len(self.classes), self.classes.ignore_index
        sentence = f"{source} has labels {', '.join(map(str, unknown[:10]))}, "
        hints = [self.hints[label] for label in unknown.tolist() if label in self.hints]
        if hints:
            return f"{sentence}so {hints[0]}"
        if not self._is_identity:
            return f"{sentence}expected {_listed(self._known)}, as its label map knows; correct the mask or the map"
        if unknown.tolist() == [k] and 0 not in present:
            advice = "labels seem to count from 1; subtract 1 from each class"
        else:
            advice = "correct the mask, the class names or the ignore index"
        return f"{sentence}expected 0..{k - 1} or the ignore index {ignore}; {advice}"


def _listed(labels: Iterable[int]) -> str:
    """Sorted integers in words, neighbours drawn together: ``-1..18, 255``."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
