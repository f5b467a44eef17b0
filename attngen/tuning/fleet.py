"""Several tuners at one study, processes of a machine or machines of a fleet: who is still there, and who runs the final race.

Everything they have to agree about stands in the study itself, so any Optuna storage that they share will do.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any

BEAT = 5.0  # seconds between two signs of life
GONE = 30.0  # seconds without one after which a tuner counts as killed
ENDED = "ended"


class Presence:
    """This tuner among those of a study: its signs of life, an attribute of the study, and those of the others.

    A sign's age is judged by how long it has not changed in the eyes of this process: clocks of machines need not agree.
    """

    def __init__(self, study: Any):
        self.name = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(2)}"
        self._study = study
        self._seen: dict[str, tuple[object, float]] = {}  # the last sign of each tuner, and since when it is known
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        self._over.clear()
        self._say(_now())
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._say(ENDED)

    def gone(self, name: str) -> bool:
        """Whether a tuner has ended or was killed."""
        sign, now = self._study.user_attrs.get(_attribute(name)), time.monotonic()
        last, since = self._seen.setdefault(name, (sign, now))
        if sign != last:
            self._seen[name], since = (sign, now), now
        return sign == ENDED or now - since > GONE

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._say(_now())
            except (
                Exception
            ):  # a server that does not answer now may do so at the next one; the search says what is wrong
                continue

    def _say(self, sign: str) -> None:
        self._study.set_user_attr(_attribute(self.name), sign)


def _attribute(name: str) -> str:
    return f"tuner {name}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Claims:
    """Names of which each belongs to the first who asks for it: a study of that name, which only one process can create."""

    def __init__(self, storage: Any, presence: Presence):
        self._storage, self._presence = storage, presence

    def claim(self, name: str) -> tuple[Any, bool]:
        """The study, and whether it is this tuner's to fill. Until `ended`, it is: a tuner that is gone loses it."""
        import optuna

        try:
            study = optuna.create_study(study_name=name, storage=self._storage, direction="minimize")
        except optuna.exceptions.DuplicatedStudyError:
            return optuna.load_study(study_name=name, storage=self._storage), False
        study.set_user_attr("tuner", self._presence.name)
        return study, True

    def ended(self, study: Any) -> bool:
        """Whether no more will come: it was filled, given up, or its tuner is gone, which is noted."""
        notes = study.user_attrs
        if ENDED in notes:
            return True
        if not self._presence.gone(notes.get("tuner", "")):
            return False
        study.set_user_attr(ENDED, "its tuner is gone")
        return True
