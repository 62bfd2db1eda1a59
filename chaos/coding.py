"""What a codec makes of pushes and centers on their way, as the replay needs it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chaos.log import Values
from modelaverage.codecs import RAW, Codec
from modelaverage.manifest import Manifest

__all__ = ["Coding"]


@dataclass(frozen=True)
class Coding:
    """The codec of a run, and the layout that it depends on.

    Args:
        codec: the codec of the job.
        manifest: the manifest of the center; all of its variables are float32.
    """

    codec: Codec
    manifest: Manifest

    @property
    def is_raw(self) -> bool:
        """Whether values stay what they are."""
        return self.codec is RAW

    def through(self, values: Values, base: Values) -> Values:
        """What is decoded of values that are encoded relative to a base; all as `chaos.log.flat` orders them."""
        if self.is_raw:
            return values
        ours, theirs = self._laid_out(values), self._laid_out(base)
        decoded = theirs.copy()
        for index in range(self.manifest.fragment_count):
            pieces, bases = self.manifest.piece_arrays(index, ours), self.manifest.piece_arrays(index, theirs)
            data = memoryview(b"".join(self.codec.encode(self.manifest, index, pieces, bases)))
            self.codec.decode_into(self.manifest, decoded, index, data, theirs)
        arrays = self.manifest.arrays(decoded)
        return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])

    def _laid_out(self, values: Values) -> NDArray[np.uint8]:
        flat, start = np.zeros(self.manifest.buffer_size_bytes, np.uint8), 0
        for _, array in sorted(self.manifest.arrays(flat).items()):
            array[...] = values[start : start + array.size].reshape(array.shape)
            start += array.size
        assert start == values.size
        return flat
