"""This module keeps adapters of one checkpoint by name, read when they are asked for, as many as are used.

The weights of the checkpoint are in memory once; each adapter is a model of its own that shares them, so that asking
one never touches another, and one that is dropped lives until its last answer.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping

import train.predictor
from serve.errors import FieldRefused, StaleModel, without_place
from store.errors import SomaflowError
from train.adapter import attach, use
from train.checkpoint import read_manifest

log = logging.getLogger("somaflow.serve")


class Adapters:
    """The adapters that a server knows by name, for one checkpoint.

    Args:
        predictor: The checkpoint.
        folders: Name to folder.
        at_most: How many stay in memory; the one that was not used for longest goes first.
    """

    def __init__(self, predictor: train.predictor.Predictor, folders: Mapping[str, str], at_most: int) -> None:
        self._predictor, self._folders, self._at_most = predictor, dict(folders), at_most
        self._kept: OrderedDict[str, train.predictor.Predictor] = OrderedDict()
        self._told: dict[str, str] = {}
        self._lock = threading.Lock()

    def digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the SHA-256 of each adapter's weights as they lie on disk now; of those that cannot be used, why."""
        found, refused = {}, {}
        for name, folder in self._folders.items():
            try:
                manifest = read_manifest(folder)
                made_for = str(manifest.get("base_sha256", ""))
                if made_for != self._predictor.manifest["model_sha256"]:
                    refused[name] = f"made for the checkpoint {made_for[:12] or 'of no name'}..., which is not here"
                else:
                    found[name] = str(manifest["adapter_sha256"])
            except (SomaflowError, KeyError) as error:
                whole = str(error) if isinstance(error, SomaflowError) else "not an adapter"
                refused[name] = without_place(whole, folder, "the adapter")
                if self._told.get(name) != whole:  # whoever asks for the card has this looked at again
                    log.error("the adapter %s cannot be used: %s", name, whole)
                self._told[name] = whole
        return found, refused

    def get(self, name: str, sha256: str) -> train.predictor.Predictor:
        """Return what answers with an adapter.

        Args:
            name: One that :meth:`digests` gave.
            sha256: Of the weights that are meant.

        Raises:
            StaleModel: There are other weights under this name now.
            FieldRefused: They cannot be used.
        """
        with self._lock:
            if sha256 in self._kept:
                self._kept.move_to_end(sha256)
                return self._kept[sha256]
            found = self._load(name)
            if found.manifest["adapter_sha256"] != sha256:
                raise StaleModel(f"the adapter {name} was changed meanwhile; send the request again")
            self._kept[sha256] = found
            while len(self._kept) > self._at_most:
                self._kept.popitem(last=False)
            return found

    def _load(self, name: str) -> train.predictor.Predictor:
        folder, plain = self._folders[name], self._predictor
        try:
            manifest = read_manifest(folder)
            model = attach(plain.model, {"asked": folder}, plain.manifest)
        except SomaflowError as error:
            log.error("the adapter %s cannot be used: %s", name, error)
            why = without_place(str(error), folder, "the adapter")
            raise FieldRefused("adapter", f"{name} cannot be used: {why}") from None
        use(model, "asked")
        grown = copy.copy(plain)
        grown.model, grown.reference = model, None  # what is kept for novelty lies where the base puts cells
        grown.manifest = plain.manifest | {"adapter_sha256": manifest["adapter_sha256"]}
        return grown
